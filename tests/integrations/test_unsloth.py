"""Unsloth's DPOTrainer with and without `fastdpo.integrations.unsloth.patch()`.

Everywhere: on a trainer generated as Unsloth generates its own, a copy of TRL's module with names of its own.
Where Unsloth is installed: on what the real one generates, in a process of its own. That was run on a CPU:

    python3.11 -m venv us && . us/bin/activate
    pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    pip install --no-deps unsloth==2026.10.9 unsloth_zoo==2026.10.9 bitsandbytes==0.50.2 torchao==0.18.0
    pip install trl==1.15.0 transformers==5.17.0 'datasets>=4.8,<5' peft cut_cross_entropy diffusers \\
        hf_transfer sentencepiece protobuf msgspec nest-asyncio structlog typer json5 psutil triton einops \\
        pillow matplotlib pytest pytest-timeout
    pip install --no-deps -e .
    python -m pytest tests/integrations/test_unsloth.py

Without a GPU Unsloth leaves TRL's trainers as they are, so the process sets Unsloth's UNSLOTH_ALLOW_CPU and
then makes the calls that are left out under it: the DPOTrainer is the one that its own code generation
writes. Its fast llama (forward, layers, attention, PeftModel) runs with three stand-ins in plain torch: for
the Triton kernels of RMS norm and rotary embeddings, and for the table of the latter. Not run: its Triton
kernels, FastLanguageModel.from_pretrained, its LoRA kernels, 4-bit weights, models that unsloth_zoo.compiler
rewrites.
"""

import importlib.util
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.process import python_path
from fastdpo.errors import ConfigError
from tests.docs.snippets import block
from tests.tiny import rows

needs_it = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None, reason="needs Unsloth, whose pins exclude this environment's"
)
LORA = {"lora": True, "learning_rate": 2e-2}
CASES = {
    "plain": {},
    "plain, ipo": {"loss_type": "ipo"},
    "plain, checkpointing": {"gradient_checkpointing": True},
    "plain, LoRA": LORA,
    "plain, precomputed": {"precompute_ref_log_probs": True},
    "fast": {"fast": True},
    "fast, LoRA": {"fast": True, **LORA},
}


def import_unsloth():
    """As on a machine with a GPU."""
    if torch.cuda.is_available():
        import unsloth
    else:
        os.environ["UNSLOTH_ALLOW_CPU"] = "1"
        import unsloth  # noqa: F401
        import unsloth.models.rl as rl
        from unsloth.trainer import _patch_trl_trainer

        del os.environ["UNSLOTH_ALLOW_CPU"]
        rl.PatchFastRL()
        _patch_trl_trainer()


class Rotary(torch.nn.Module):
    """A stand-in for the rotary table of Unsloth's llama, which lies on a GPU."""

    def __init__(self, config):
        super().__init__()
        self.size = config.hidden_size // config.num_attention_heads

    def extend_rope_embedding(self, *args, **kwargs):
        pass

    def get_cached(self, *args, **kwargs):
        angle = torch.arange(256)[:, None] * 10000 ** (-torch.arange(0, self.size, 2) / self.size)
        return angle.repeat(1, 2).cos(), angle.repeat(1, 2).sin()


def rotate(q, k, cos, sin, indices=None):
    rows = slice(q.shape[2]) if indices is None else indices.reshape(-1).long()
    cos, sin = cos[rows], sin[rows]
    turned = lambda x: torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1)
    return q * cos + turned(q) * sin, k * cos + turned(k) * sin


def rms_norm(norm, x, **kwargs):
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


def make_llama_fast():
    """Unsloth's llama forward, attention, layers and PeftModel forward, for models made from now on."""
    import transformers.models.llama.modeling_llama as modeling
    import unsloth.models.llama as fast_llama

    fast_llama.FastLlamaModel.pre_patch()
    fast_llama.fast_rope_embedding, fast_llama.fast_rms_layernorm = rotate, rms_norm
    modeling.LlamaRotaryEmbedding = Rotary


def train(folder, on, fast=False, lora=False, **more):
    """(log history, the warnings of ours, the trainer's module)."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fastdpo.integrations.unsloth as ours

    if fast:
        make_llama_fast()
    model = AutoModelForCausalLM.from_pretrained(folder)
    model._unsloth_forced_float32 = True
    torch.manual_seed(0)
    config = dict(output_dir=str(Path(folder) / "out"), per_device_train_batch_size=2, max_steps=3)
    config |= dict(max_length=64, logging_steps=1, report_to="none", save_strategy="no", use_cpu=True)
    config |= dict(learning_rate=2e-3, gradient_checkpointing=False, bf16=False) | more
    options = {}
    if lora:
        from peft import LoraConfig

        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if on:
                ours.patch()
            trainer = trl.DPOTrainer(
                model,
                args=trl.DPOConfig(**config),
                train_dataset=datasets.Dataset.from_list(rows(6)),
                processing_class=AutoTokenizer.from_pretrained(folder),
                **options,
            )
            trainer.train()
        finally:
            if on:
                ours.unpatch()
    told = [str(w.message) for w in caught if "fastdpo: " in str(w.message)]
    return trainer.state.log_history, told, type(trainer).__module__


def run_all(folder: Path) -> None:
    """Every case, stock and patched; called in a process of its own."""
    import_unsloth()
    from fastdpo.integrations.trl_forward import FusedForward
    from tests.tiny import save_model

    model = save_model(folder / "model")
    ways, decide = [], FusedForward.decide
    FusedForward.decide = lambda *args: ways.append(decide(*args)) or ways[-1]
    results = {}
    for name, case in CASES.items():
        ways.clear()
        stock = train(model, False, **case)
        assert not ways
        results[name] = (stock, train(model, True, **case), list(ways))
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unsloth")
    env = os.environ | {"OMP_NUM_THREADS": "1", "UNSLOTH_COMPILE_DISABLE": "1"}
    env |= python_path()
    command = [sys.executable, "-m", "tests.integrations.test_unsloth", str(folder)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    return json.loads((folder / "results.json").read_text())


def same(stock: list[dict], ours: list[dict]) -> None:
    """All metrics, by name and value."""
    assert len(stock) == len(ours) == 4
    for theirs, mine in zip(stock, ours):
        assert list(theirs) == list(mine)
        kept = [k for k in theirs if not any(w in k for w in ("runtime", "per_second", "flos"))]
        if abs(theirs.get("rewards/margins", 1)) < 1e-5:  # who is ahead is rounding
            kept.remove("rewards/accuracies")
        assert [mine[k] for k in kept] == pytest.approx([theirs[k] for k in kept], rel=1e-4, abs=1e-4)
    assert max(log.get("grad_norm", 0) for log in stock) > 1e-3


@needs_it
@pytest.mark.parametrize("name", CASES)
def test_the_real_trainer(real, name):
    (stock, none, module), (ours, told, _), ways = real[name]
    assert module == "UnslothDPOTrainer" and not none
    same(stock, ours)
    if CASES[name].get("fast"):
        assert set(ways) == {"padded"}
        assert len(told) == len(ways) and all("0 of its 2 layers ask AttentionInterface" in t for t in told)
    else:
        assert set(ways) == {"shared"} and not told


# ---- without Unsloth


@pytest.fixture
def generated(monkeypatch):
    """trl.DPOTrainer as Unsloth leaves it: of a module of its own, with what that imported from TRL's."""
    import inspect

    import trl
    import trl.trainer.dpo_trainer as dpo_trainer

    module = types.ModuleType("UnslothDPOTrainer")
    module.__package__ = "trl.trainer"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    exec(inspect.getsource(dpo_trainer), module.__dict__)
    monkeypatch.setattr(trl, "DPOTrainer", module.DPOTrainer)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.tiny import save_model

    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("lora", [False, True])
def test_a_generated_trainer(folder, generated, monkeypatch, lora):
    from fastdpo.integrations.trl_forward import FusedForward

    seen, shared = [], FusedForward.shared
    monkeypatch.setattr(FusedForward, "shared", lambda *args: seen.append(1) or shared(*args))
    if lora:  # Unsloth's PeftModel hands these on, always
        peft = pytest.importorskip("peft", reason="needs peft")
        forward = peft.PeftModelForCausalLM.forward
        given = {"causal_mask": None, "num_logits_to_keep": 0, "logits_to_keep": 0}
        monkeypatch.setattr(
            peft.PeftModelForCausalLM, "forward", lambda self, **kwargs: forward(self, **kwargs, **given)
        )
    before = generated.add_fused_lm_head
    stock, _, module = train(folder, False, lora=lora)
    assert module == "UnslothDPOTrainer" and not seen
    ours, told, _ = train(folder, True, lora=lora)
    same(stock, ours)
    assert not told and len(seen) == 6  # 3 steps, of policy and reference
    assert generated.add_fused_lm_head is before


def test_the_documented_snippet(folder, generated, monkeypatch):
    """As written, on what Unsloth would generate, but for what a CPU needs in DPOConfig."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import fastdpo.integrations.unsloth as ours
    from fastdpo.integrations.trl_forward import FusedForward

    seen, shared = [], FusedForward.shared
    monkeypatch.setattr(FusedForward, "shared", lambda *args: seen.append(1) or shared(*args))
    code = block("drop_ins.md", "Unsloth 2026.10.9 with TRL 1.15", "python")
    assert 'trl.DPOConfig("run")' in code
    short = dict(use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no")
    names = {"config": trl.DPOConfig(str(Path(folder) / "out"), **short)}
    names |= {
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "dataset": datasets.Dataset.from_list(rows(8)),
    }
    names["tokenizer"] = AutoTokenizer.from_pretrained(folder)
    try:
        exec(code.replace('trl.DPOConfig("run")', "config"), names)
        names["trainer"].train()
    finally:
        ours.unpatch()
    assert seen


def test_a_head_that_is_asked_for_logits_is_left_alone(folder, generated):
    """logits_to_keep is no default then: the model's own forward gets it."""
    from transformers import AutoModelForCausalLM

    import fastdpo.integrations.unsloth as ours

    model = AutoModelForCausalLM.from_pretrained(folder)
    ours.add_fused_lm_head(model)
    assert model(input_ids=torch.ones(1, 7, dtype=torch.int64), logits_to_keep=2).logits.shape[1] == 2


def test_what_we_do_not_know_is_said(generated, monkeypatch):
    import trl

    import fastdpo.integrations.unsloth as ours

    monkeypatch.setenv("UNSLOTH_RETURN_HIDDEN_STATES", "1")
    with pytest.raises(ConfigError, match="UNSLOTH_RETURN_HIDDEN_STATES"):
        ours.patch()
    monkeypatch.delenv("UNSLOTH_RETURN_HIDDEN_STATES")
    monkeypatch.setattr(trl, "__version__", "0.24.0")
    with pytest.raises(ConfigError, match=r"TRL 0\.24\.0"):
        ours.patch()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "unsloth", types.ModuleType("unsloth"))
    monkeypatch.setattr(trl, "DPOTrainer", type("DPOTrainer", (), {"__module__": __name__}))
    with pytest.raises(ConfigError, match="has no fused lm_head"):
        ours.patch()
    monkeypatch.delitem(sys.modules, "unsloth")
    with pytest.raises(ConfigError, match="comes first"):
        ours.patch()


if __name__ == "__main__":
    run_all(Path(sys.argv[1]))
