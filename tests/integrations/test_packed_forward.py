"""fastdpo.integrations.packed_forward against the model's own logits: values and every gradient."""

import pytest
import torch

SCALED = dict(logit_scale=0.7)
SOFTCAP = dict(final_logit_softcapping=1.5, attn_logit_softcapping=5.0, query_pre_attn_scalar=16)


def batch(vocab, lengths=((5, 9, 7), (3, 4, 8), (6, 10, 10))):
    """Padded rows of (prompt, chosen, rejected) lengths: ids, mask and labels, chosen rows first."""
    draw = torch.Generator().manual_seed(1)
    width = max(p + max(c, r) for p, c, r in lengths) + 2
    ids = torch.zeros(2 * len(lengths), width, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (prompt, *responses) in enumerate(lengths):
        shared = torch.randint(3, vocab, (prompt,), generator=draw)
        for row, n in zip((i, i + len(lengths)), responses):
            ids[row, : prompt + n] = torch.cat([shared, torch.randint(3, vocab, (n,), generator=draw)])
            mask[row, : prompt + n] = 1
            labels[row, prompt : prompt + n] = ids[row, prompt : prompt + n]
    labels[0, lengths[0][0] + 2] = -100  # a gap, as a multi-turn row has
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def plain(model, batch):
    """The definition: logp and mean logit of labels[:, 1:], f32[N, S - 1]."""
    logits = (
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    )
    target = batch["labels"][:, 1:]
    logp = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return {k: v * (target != -100) for k, v in (("logp", logp), ("mean_logit", logits.mean(-1)))}


HYBRID = dict(layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1)
HYBRID |= dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, head_dim=16)
HYBRID |= dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16)
HYBRID |= dict(linear_value_head_dim=16)
MODELS = {
    "llama": ("shared", {}),
    # eager: the sdpa that transformers up to 5.20 chooses leaves the softcap of attention out
    "gemma2": ("shared", SOFTCAP | {"sliding_window": 4, "attn_implementation": "eager"}),
    "cohere": ("shared", SCALED),
    "qwen3_next": ("padded", HYBRID),
}


def make(name="llama", lora=None, **more):
    """Two copies of a model with equal weights; the second has our forward."""
    from transformers import AutoModelForCausalLM

    from fastdpo.integrations.packed_forward import PackedForward
    from tests.tiny import model_config

    out = []
    for _ in range(2):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config(name, **more))
        if lora:
            peft = pytest.importorskip("peft", reason="needs peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=3, task_type="CAUSAL_LM", **lora))
            for key, weight in model.named_parameters():
                if "lora_B" in key:
                    torch.nn.init.normal_(weight, std=0.2)
        out.append(model.train())
    inner = out[1].get_base_model() if lora else out[1]
    return *out, PackedForward(inner)


def said(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "fastdpo"]


def check(stock, ours, rows, **more):
    """Values and every gradient, of one forward with labels."""
    truth = plain(stock, rows)
    inputs = {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]} | more
    found = ours(**inputs, use_cache=False, fastdpo_labels=rows["labels"])
    for name, value in truth.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=2e-5)
    factor = torch.randn(truth["logp"].shape, generator=torch.Generator().manual_seed(2))
    for out in (truth, found):
        (out["logp"] * factor).sum().backward()
    for (name, a), b in zip(stock.named_parameters(), ours.parameters()):
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_forward_is_the_models_own(name, caplog):
    way, more = MODELS[name]
    stock, ours, packed = make(name, **more)
    check(stock, ours, batch(131))
    assert packed.ways == {False: way}
    assert len(said(caplog)) == (way != "shared")
    assert ours(input_ids=batch(131)["input_ids"]).logits.ndim == 3  # without labels: the model's own


def test_checkpointed_layers():
    stock, ours, packed = make()
    kwargs = {"use_reentrant": True}  # LLaMA-Factory's default
    for model in (stock, ours):
        model.gradient_checkpointing_enable(kwargs)
        model.enable_input_require_grads()
    check(stock, ours, batch(131))
    assert packed.ways == {False: "shared"}


LORAS = {
    "plain": (True, {"target_modules": ["q_proj", "lm_head"]}),
    "a trained copy": (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "DoRA": (False, {"target_modules": ["q_proj", "lm_head"], "use_dora": True}),
    "bias": (False, {"target_modules": ["q_proj", "lm_head"], "lora_bias": True}),
}


@pytest.mark.parametrize("kind", LORAS)
def test_adapters_of_the_lm_head(kind, caplog):
    known, lora = LORAS[kind]
    stock, ours, packed = make(lora=lora)
    check(stock, ours, batch(131))
    assert packed.ways == ({False: "shared"} if known else {})
    assert bool(said(caplog)) is not known
    with stock.disable_adapter(), ours.disable_adapter(), torch.no_grad():  # as the reference runs
        check_values = plain(stock, batch(131))["logp"]
        rows = batch(131)
        labels = rows.pop("labels")
        torch.testing.assert_close(ours(**rows, fastdpo_labels=labels)["logp"], check_values)


ODD = {
    "left padding": "the rows are not padded on the right",
    "padding scored": "the labels are not the rows' own tokens",
    "more inputs": "the batch brings position_ids",
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_batches_are_the_models_own_and_said_once(kind, caplog):
    stock, ours, _ = make()
    rows, more = batch(131), {}
    if kind == "left padding":
        rows = {k: v.flip(1) for k, v in rows.items()}
    elif kind == "padding scored":  # ignore_pad_token_for_loss: false
        rows["labels"] = rows["labels"].where(rows["attention_mask"] == 1, 0)
    else:
        more["position_ids"] = torch.arange(rows["input_ids"].shape[1])[None]
    check(stock, ours, rows, **more)
    ours(
        input_ids=rows["input_ids"],
        attention_mask=rows["attention_mask"],
        fastdpo_labels=rows["labels"],
        **more,
    )
    assert [ODD[kind] in message for message in said(caplog)] == [True]


def test_dropout_is_not_shared(caplog):
    _, ours, packed = make()
    ours.model.layers[0].self_attn.attention_dropout = 0.3
    rows = batch(131)
    ours(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"], fastdpo_labels=rows["labels"])
    assert packed.ways == {False: "padded"} and "drops out at random" in said(caplog)[0]


def test_a_forward_that_accelerate_has_wrapped(caplog):
    """A device_map's hooks make the forward a partial, which hides the model's own."""
    import inspect

    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    from fastdpo.integrations.packed_forward import PackedForward

    stock, ours, _ = make()
    del ours.forward
    add_hook_to_module(ours, AlignDevicesHook(execution_device="cpu"))
    packed = PackedForward(ours)
    assert next(iter(inspect.signature(ours.forward).parameters)) == "input_ids"
    check(stock, ours, batch(131))
    assert packed.ways == {False: "shared"}
