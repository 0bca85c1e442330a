"""Shared prompts give what separate rows give: log-probs and every gradient, family by family."""

import pytest
import torch
from rich.console import Console

from fastdpo.data.packing import pack
from fastdpo.model import attention, support
from fastdpo.model.policy import Policy
from fastdpo.records import Pair
from tests.rounding import model_ulps
from tests.tiny import group, groups, policy

# One entry a way of doing attention: rotary and learned positions, q/k norms, parallel blocks,
# windows on all or some layers (6 tokens, shorter than the prompts), softcaps, scaled logits, MoE.
FAMILIES = {
    "llama": {},
    "qwen2": dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "qwen3": dict(head_dim=16),
    "qwen3_moe": dict(num_experts=4, moe_intermediate_size=32, num_experts_per_tok=2),
    "mistral": dict(sliding_window=6),
    "mixtral": dict(num_local_experts=4),
    "gemma": dict(head_dim=16),
    "gemma2": dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=16),
    "gemma3_text": dict(head_dim=16, sliding_window=6, query_pre_attn_scalar=16),
    "phi": {},
    "phi3": dict(sliding_window=6),
    "olmo2": {},
    "olmo3": dict(sliding_window=6),
    "gpt2": {},
    "gpt_neox": {},
    "granite": dict(logits_scaling=0.5),
    "cohere": dict(logit_scale=2.0),
    "cohere2": dict(logit_scale=2.0, sliding_window=6, head_dim=16),
    "opt": {},
    "smollm3": {},
    "starcoder2": dict(sliding_window=6),
    "glm4": dict(head_dim=16),
}


def gradients(model):
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def assert_gradients_close(ours, truth, tolerance):
    """Each within `tolerance` of its size; a small one (a key's bias, whose gradient cancels to nothing) of a
    hundredth of all gradients', for the terms that cancel have their size, and their rounding stays."""
    assert ours.keys() == truth.keys()
    total = torch.stack([g.norm() for g in truth.values()]).norm()
    for name, grad in truth.items():
        error = (ours[name] - grad).norm()
        assert error <= tolerance * max(grad.norm(), 1e-2 * total), (name, float(error))


def separate(p, batch_groups, upstream):
    """The truth: the stock model, one row a response, full logits; log-probs and gradients."""
    logp = torch.cat([support.stock_logp(p, g) for g in batch_groups])
    (logp * upstream).sum().backward()
    return logp.detach(), gradients(p.model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_equals_separate(family, checkpointing):
    p, batch_groups = policy(family, **FAMILIES[family]), groups()
    upstream = torch.randn(sum(g.scored_tokens for g in batch_groups))
    logp, grads = separate(p, batch_groups, upstream)
    assert logp.std() > 0.5  # random but not flat: a leak would show
    if checkpointing:
        p.model.gradient_checkpointing_enable({"use_reentrant": False})
    p.set_sharing(True)
    ours = p.token_logp(pack(batch_groups))
    torch.testing.assert_close(ours, logp, rtol=0, atol=model_ulps(logp))
    (ours * upstream).sum().backward()
    assert_gradients_close(gradients(p.model), grads, 1e-5)


@pytest.mark.parametrize("share", [True, False])
def test_gpt2_in_fp64_is_exact(share):
    """gpt2 rounds nowhere to fp32, so here only the order of sums is left."""
    p, batch_groups = policy("gpt2", dtype=torch.float64), groups()
    upstream = torch.randn(sum(g.scored_tokens for g in batch_groups), dtype=torch.float64)
    logp = torch.cat([double_logp(p, g) for g in batch_groups])
    (logp * upstream).sum().backward()
    logp, grads = logp.detach(), gradients(p.model)
    p.set_sharing(share)
    ours = p.token_logp(pack(batch_groups, share))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, logp, rtol=0, atol=1e-12)
    (ours * upstream).sum().backward()
    assert_gradients_close(gradients(p.model), grads, 1e-11)


def double_logp(p, g):
    out = []
    for r in g.responses:
        ids = torch.tensor([*g.prompt, *r.ids])
        logp = p.model(input_ids=ids[None, :-1], use_cache=False).logits[0].log_softmax(-1)
        scored = logp.gather(1, ids[1:, None])[len(g.prompt) - 1 :, 0]
        out.append(scored[torch.from_numpy(r.target_mask)])
    return torch.cat(out)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("window", [None, 3, 11])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_backends_agree(n, window, softcap):
    """Segments against the dense oracle, outputs and gradients in fp64, with one-token responses."""
    lengths = [5, 1, 3, 8][:n]
    layout = pack([group(0, 9, lengths), group(1, 1, lengths[::-1]), group(2, 30, lengths)]).layout
    q = torch.randn(len(layout.seen_until), 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(len(q), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    results = []
    for backend in ("dense", "segments"):
        out = attention.attend(q, k, v, layout, window=window, softcap=softcap, backend=backend)
        grads = torch.autograd.grad(out.sin().sum(), (q, k, v))
        results.append((out, *grads))
    for dense, ours in zip(*results):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)


def test_gather_backward_sums_in_fp32():
    """bf16 gradients of a shared prompt are summed wide: 1 + 200 * 2^-9 would stay 1 in bf16."""
    layout = pack([group(0, 4, [2] * 201)]).layout
    rows = torch.zeros(len(layout.seen_until), 1, 1, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.full((len(layout.kv_index), 1, 1), 2.0**-9, dtype=torch.bfloat16)
    grad[layout.first_copy] = 1
    attention.gather_copies(rows, layout).backward(grad)
    assert float(rows.grad[0]) == float(torch.tensor(1 + 200 * 2.0**-9).bfloat16())


# What must not be shared, and why the user is told so.
REFUSED = {
    "stablelm": ({}, "does not pass"),  # its layers drop keyword arguments
    "gpt_oss": (dict(head_dim=16, num_local_experts=4), "s_aux"),  # attention sinks
    "bloom": (dict(n_layer=2, n_head=4), "AttentionInterface"),
    "falcon": ({}, "AttentionInterface"),
    "mamba": ({}, "linear_attention"),
}


@pytest.mark.parametrize("family", REFUSED)
def test_models_that_cannot_share_fall_back_and_say_so(family, capsys):
    overrides, reason = REFUSED[family]
    p, batch_groups = policy(family, **overrides), groups()
    upstream = torch.randn(sum(g.scored_tokens for g in batch_groups))
    logp, grads = separate(p, batch_groups, upstream)
    support.prepare(p, batch_groups, Console(width=1000))
    said = capsys.readouterr().out
    assert not p.share and "prompts are not shared" in said and reason in said
    ours = p.token_logp(pack(batch_groups, share=False))
    torch.testing.assert_close(ours, logp, rtol=0, atol=model_ulps(logp))
    (ours * upstream).sum().backward()
    assert_gradients_close(gradients(p.model), grads, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_supported_models_share_without_a_word(family, capsys):
    p = policy(family, **FAMILIES[family])
    support.prepare(p, groups(), Console())
    assert p.share and capsys.readouterr().out == ""


def test_the_softcap_of_attention_is_never_left_out():
    """Whichever attention transformers chose: sdpa is not the model's own where the scores have a softcap."""
    truth = support.stock_logp(
        policy("gemma2", attn_implementation="eager", **FAMILIES["gemma2"]), groups()[0]
    )
    p = policy("gemma2", **FAMILIES["gemma2"])
    p.core.config._attn_implementation_internal = "sdpa"
    p = Policy(p.model, p.dtype)
    torch.testing.assert_close(support.stock_logp(p, groups()[0]), truth, rtol=0, atol=0)
    support.prepare(p, groups(), Console())
    assert p.share
    plain = policy("llama")
    assert plain.stock_attention == plain.core.config._attn_implementation == "sdpa"


def test_a_window_that_lives_only_in_the_mask_is_refused(capsys):
    """qwen2_moe builds a sliding mask but passes no window on, and short rows would not show it."""
    window = dict(use_sliding_window=True, sliding_window=6)
    p = policy("qwen2_moe", num_experts=4, moe_intermediate_size=32, **window)
    support.prepare(p, [group(0, 3, [2, 1])], Console(width=1000))
    assert not p.share and "sliding window" in capsys.readouterr().out


def test_a_backend_that_fails_falls_back(capsys, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no kernel image [is available]")

    monkeypatch.setattr(attention, "attend", broken)
    p = policy("llama")
    support.prepare(p, groups(), Console(width=1000))
    assert not p.share and "no kernel image [is available]" in capsys.readouterr().out


def test_large_bf16_logits_are_no_reason_to_refuse():
    """bf16 logits near -100 are 0.5 apart: the model's own log-probs are the rounded side."""
    p = policy("llama", initializer_range=0.8)
    with torch.no_grad():
        p.model.lm_head.weight += 4 * torch.randn(64)
    p.dtype = torch.bfloat16
    assert support._stock(p, groups())[1] > 0.5
    support.prepare(p, groups(), Console())
    assert p.share


def test_large_fp32_logits_are_no_reason_to_refuse():
    """Logits near 1e5 are 0.008 apart, whatever the weights are."""
    p = policy("llama", initializer_range=0.2)
    with torch.no_grad():
        p.model.lm_head.weight *= 1e4
    support.prepare(p, groups(), Console())
    assert p.share


def test_chunked_attention_is_refused():
    p = policy("llama")
    p.core.config.attention_chunk_size = 4
    assert "chunked" in support.sharing_refusal(p.core.config)


def test_an_unknown_logit_transform_is_an_error():
    """A head that fastdpo does not know must stop the run, not train on wrong log-probs."""
    p = policy("llama")
    stock = p.model.lm_head.forward
    p.model.lm_head.forward = lambda hidden: stock(hidden) * 1.5
    with pytest.raises(support.ModelError, match="differ from the model's own"):
        support.prepare(p, groups(), Console())


def test_broken_weights_are_no_unknown_head():
    p = policy("llama")
    with torch.no_grad():
        p.model.lm_head.weight[5, 0] = torch.nan
    with pytest.raises(support.ModelError, match=r"are not numbers \(rows 1 and 2\); its weights"):
        support.prepare(p, groups(), Console())


def test_a_call_without_layout_raises():
    p = policy("llama")
    p.set_sharing(True)
    with pytest.raises(attention.UnsharedAttention, match="does not pass"):
        p.model(input_ids=torch.tensor([[5, 6]]))
    with p.stock() as model:
        model(input_ids=torch.tensor([[5, 6]]))  # and inside stock() it runs


def test_dropout_in_attention_raises():
    p = policy("llama", attention_dropout=0.1)
    for layer in p.model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    p.set_sharing(True)
    with pytest.raises(attention.UnsharedAttention, match="dropout"):
        p.token_logp(pack([group(0, 3, [2, 2], pairs=[Pair(0, 1)])]))
