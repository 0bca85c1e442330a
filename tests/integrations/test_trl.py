"""trl.DPOTrainer with and without `fastdpo.integrations.trl.patch()`: the same numbers, step by step."""

import inspect

import datasets
import pytest
import torch
import trl
import trl.trainer.dpo_trainer as dpo_trainer
import trl.trainer.utils as trl_utils
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdpo.integrations.trl as fast
from benchmarks.peers.trl_dpo import run_training
from fastdpo.errors import ConfigError
from fastdpo.integrations import trl_forward
from fastdpo.integrations.versions import check_version
from tests.docs.snippets import block
from tests.integrations.test_trl_rows import batch
from tests.integrations.trl_runs import MOE, SOFTCAP, compare, make, patched, run, same
from tests.tiny import rows, save_model

pytestmark = pytest.mark.peer
LOSSES = "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down"
LOSSES = [*LOSSES.split(), "discopop", "sft", "sigmoid_norm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(folder, loss):
    smoothing = {"exo_pair": 1e-3, "robust": 0.1, "aot": 0.1}
    compare(folder, loss_type=loss, label_smoothing=smoothing.get(loss, 0.0), max_steps=2)


SETTINGS = {
    "WPO": {"use_weighting": True},
    "LD-DPO": {"ld_alpha": 0.3},
    "LD-DPO, precomputed": {"ld_alpha": 0.3, "precompute_ref_log_probs": True},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
    "several losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "keep_end": {"max_length": 9, "truncation_mode": "keep_end"},
    "short": {"max_length": 8},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(folder, name):
    compare(folder, **SETTINGS[name])


def test_layers_are_recomputed_with_our_attention(folder, monkeypatch):
    """Else a checkpoint's recompute would run the model's own attention on packed rows."""
    seen = []
    real = trl_forward.FusedForward.shared
    monkeypatch.setattr(trl_forward.FusedForward, "shared", lambda *a: seen.append(1) or real(*a))
    ours = run(folder, gradient_checkpointing=True)
    assert len(seen) == 2 * len(ours.run.losses)  # policy and reference
    assert ours.trainer.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("adapter", ["fresh", "trained before"])
def test_lora(folder, adapter):
    peft = pytest.importorskip("peft", reason="needs peft")
    settings = peft.LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    options = {"gradient_checkpointing": True, "learning_rate": 2e-2}
    if adapter == "fresh":
        compare(folder, more=lambda: {"peft_config": settings}, **options)
        return

    def trained():
        torch.manual_seed(3)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        return model

    stock, ours = compare(folder, model=trained, **options)
    assert "ref" in ours.trainer.model.peft_config and abs(stock.run.losses[0] - 0.6931) < 1e-3


def test_prompt_learning(folder):
    """Virtual tokens come before the rows as embeddings: TRL's own forward, said once."""
    peft = pytest.importorskip("peft", reason="needs peft")
    tuning = lambda: {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)}
    with pytest.warns(UserWarning, match="fastdpo: the batch brings .*inputs_embeds") as seen:
        compare(folder, more=tuning, learning_rate=1e-2)
    assert len([w for w in seen if "fastdpo" in str(w.message)]) == 1


def test_moe(tmp_path):
    stock, _ = compare(save_model(tmp_path / "moe", "qwen3_moe", **MOE), gradient_checkpointing=True)
    assert "aux_loss" in stock.logs[0]


def test_softcap(tmp_path):
    folder = save_model(tmp_path / "gemma2", "gemma2", sliding_window=4, **SOFTCAP)
    # eager: the sdpa that transformers up to 5.20 chooses leaves the softcap of attention out
    models = {name: lambda: with_attention(folder, "eager") for name in ("model", "ref_model")}
    compare(folder, gradient_checkpointing=True, **models)


def test_sdpa_without_the_softcap_is_left_for_eager(tmp_path):
    """Said once for each model, and prompts are shared: by the check's own words, nothing is slower."""
    folder = save_model(tmp_path / "gemma2", "gemma2", sliding_window=4, **SOFTCAP)
    models = {name: with_attention(folder, "eager") for name in ("model", "ref_model")}
    stock = run(folder, False, **models)
    models = {name: with_attention(folder, "sdpa") for name in ("model", "ref_model")}
    with pytest.warns(UserWarning, match="eager attention from now on: sdpa") as seen:
        ours = run(folder, True, **models)
    same(stock, ours)
    assert len([w for w in seen if "fastdpo" in str(w.message)]) == 2
    assert all(model.config._attn_implementation == "eager" for model in models.values())


def with_attention(folder, name):
    """The folder's model with this attention, also where transformers would refuse it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config._attn_implementation_internal = name
    return model


def test_a_model_that_cannot_share(tmp_path):
    """Linear attention keeps a state along the row: padded rows, said once, and right."""
    sizes = dict(layer_types=["linear_attention", "full_attention"], num_experts=2, num_experts_per_tok=1)
    sizes |= dict(moe_intermediate_size=32, shared_expert_intermediate_size=32, head_dim=16)
    sizes |= dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16)
    folder = save_model(tmp_path / "hybrid", "qwen3_next", **sizes, linear_value_head_dim=16)
    with pytest.warns(UserWarning, match="linear_attention layers.*padded") as seen:
        compare(folder, max_steps=2)
    assert len([w for w in seen if "fastdpo" in str(w.message)]) == 2  # policy and reference


def test_dropout_is_not_shared(folder):
    with pytest.warns(UserWarning, match="drops out at random"):
        peft = pytest.importorskip("peft", reason="needs peft")
        settings = peft.LoraConfig(r=4, lora_dropout=0.5, task_type="CAUSAL_LM")
        compare(folder, more=lambda: {"peft_config": settings}, disable_dropout=False, learning_rate=1e-2)


def chat(plain):
    turn = lambda role, text: {"role": role, "content": text.strip()}
    tool = {"type": "function", "function": {"name": "look", "description": "x", "parameters": {}}}
    return [
        {
            "prompt": [turn("user", r["prompt"])],
            "chosen": [turn("assistant", r["chosen"])],
            "rejected": [turn("assistant", r["rejected"])],
            "tools": [tool],
        }
        for r in plain
    ]


def test_conversations_with_tools_and_eval(folder):
    import datasets

    held_out = lambda: {"eval_dataset": datasets.Dataset.from_list(chat(rows(3, seed=9)))}
    stock, _ = compare(folder, data=chat(rows(6)), more=held_out, eval_strategy="steps", eval_steps=1)
    assert any("eval_rewards/margins" in log for log in stock.logs)


def test_explicit_reference_and_its_updates(folder):
    other = lambda: AutoModelForCausalLM.from_pretrained(folder)
    sync = dict(sync_ref_model=True, ref_model_sync_steps=1)
    compare(folder, ref_model=other, **sync)


def test_bf16_autocast(folder):
    """The two round at other places, so only nearly the same."""
    stock, ours = (run(folder, on, bf16=True) for on in (False, True))
    assert not torch.is_autocast_enabled("cpu")
    same(stock, ours, tolerance=5e-2)


def test_resume(folder, tmp_path):
    straight = run(folder, False, max_steps=4, data=rows(8))
    saved = dict(save_strategy="steps", save_steps=2, output_dir=str(tmp_path / "run"), data=rows(8))
    run(folder, max_steps=2, **saved)
    with patched():
        trainer = make(folder, max_steps=4, **saved)
        trainer.step_losses = []
        trainer.train(resume_from_checkpoint=True)
    assert [float(loss) for loss in trainer.step_losses] == pytest.approx(straight.run.losses[2:], abs=1e-4)


def test_generation_is_the_models_own(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("the red cat", return_tensors="pt")
    before = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    parameters = inspect.signature(model.forward).parameters
    with patched():
        run_training(make(folder, model=model, max_steps=1, learning_rate=0.0))
        assert torch.equal(model.generate(**prompt, max_new_tokens=5, do_sample=False), before)
        assert list(inspect.signature(model.forward).parameters) == list(parameters)
        assert model(**prompt).logits.shape[-1] == len(tokenizer)


def test_unpatch_restores_everything(folder):
    originals = (dpo_trainer.add_fused_lm_head, trl_utils._ChunkedLogProbFunction)
    with patched():
        assert dpo_trainer.add_fused_lm_head is not originals[0]
        fast.patch()  # twice is once
        trainer = make(folder)
        model = trainer.model
    assert (dpo_trainer.add_fused_lm_head, trl_utils._ChunkedLogProbFunction) == originals
    model(**batch(), fused_lm_head=True)  # by TRL: nothing of ours is decided
    (fused,) = [f for f in trl_forward._LIVE if f.own.__self__ is model]
    assert not fused.ways and not any(m._forward_pre_hooks for m in model.modules())


def test_other_trl_versions():
    for version in ("1.14.2", "0.29.0", "1.17.0", "2.0.0"):
        with pytest.raises(ConfigError, match=r"TRL .* is installed.*1\.15 to 1\.16"):
            check_version("trl", version)
    for version in ("1.15.0", "1.16.3"):
        check_version("trl", version)


@pytest.mark.parametrize("number", [0, 1], ids=["patch", "FastDPOTrainer"])
def test_the_documented_snippets(folder, tmp_path, monkeypatch, number):
    """As written, but for what a CPU needs in DPOConfig."""
    seen, real = [], trl_forward.FusedForward.shared
    monkeypatch.setattr(trl_forward.FusedForward, "shared", lambda *a: seen.append(1) or real(*a))
    code = block("drop_ins.md", "TRL 1.15 and 1.16", "python", number)
    short = dict(use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no")
    config = trl.DPOConfig(str(tmp_path), **short)
    names = {"model": AutoModelForCausalLM.from_pretrained(folder), "config": config}
    names["dataset"] = datasets.Dataset.from_list(rows(8))
    before = [p.detach().clone() for p in names["model"].parameters()]
    assert 'trl.DPOConfig("run")' in code
    try:
        exec(code.replace('trl.DPOConfig("run")', "config"), names)
    finally:
        fast.unpatch()
    assert seen and any((a != b).any() for a, b in zip(before, names["model"].parameters()))
