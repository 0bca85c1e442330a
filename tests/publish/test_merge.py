"""`fastdpo merge`, and adapters as peft and vLLM want them."""

import copy
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.cli import main
from fastdpo.errors import ConfigError, ModelError
from fastdpo.publish import merge as module
from fastdpo.publish.merge import merge
from fastdpo.publish.model_card import unserved_by_vllm
from fastdpo.training import trainer
from tests import tiny
from tests.model.test_adapter import edit, new_adapter
from tests.rounding import ulps
from tests.training.test_trainer import Run

IDS = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
SHARED = ("model.embed_tokens.weight", "lm_head.weight")


@torch.no_grad()
def logits(model):
    """In fp64, so that they are of the weights alone, whatever the processor adds up first."""
    return copy.deepcopy(model).eval().double()(IDS).logits


def assert_same_logits(model, expected):
    """But for the one rounding of each merged weight to fp32, and of the norms, which are fp32 in any model:
    1 to 5 units in the last place of the largest logit. (An fp32 forward adds its own, 5 to 20 units and on
    Intel 55: rslora's attention is so sharp here that it enlarges every rounding before it.) A change that
    was rounded to fp16 on its way, the smallest fault thought of, is 1,000 and more off."""
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=ulps(24, expected.float()))


def load(folder, **keys):
    return AutoModelForCausalLM.from_pretrained(folder, **keys)


def said_by(*args, **keys):
    """(the folder, what was printed)"""
    console = Console(file=io.StringIO(), width=10**4)
    return merge(*args, console=console, **keys), console.file.getvalue()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A LoRA run, and its policy's logits when it was saved."""
    kept, save = [], trainer.save_model

    def keep(policy, *rest):
        with policy.stock() as model:
            kept.append(logits(model))
        save(policy, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "save_model", keep)
        patch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
        torch.manual_seed(0)
        run = Run(tmp_path_factory.mktemp("run"), lora_rank=4, learning_rate=1e-2, max_steps=5)
    run.logits = kept[0]
    return run


@pytest.fixture
def adapter(tmp_path):
    """An adapter on a tied base, to break; both in tmp_path."""
    base = tiny.save_model(tmp_path / "base", tie_word_embeddings=True)
    new_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    tiny.tokenizer().save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- the adapter folder of a run


def test_a_run_s_adapter_loads_in_peft(trained):
    model = PeftModel.from_pretrained(load(trained.start), trained.folder / "model")
    assert_same_logits(model, trained.logits)
    assert (logits(load(trained.start)) - trained.logits).abs().max() > 0.1


def test_a_run_s_adapter_lies_as_vllm_reads_it(trained):
    """vllm/lora/peft_helper.py (r, lora_alpha, use_rslora; what it refuses), lora_model.py (file, modules)
    and utils.py (tensor names). vLLM itself needs a GPU and was not run."""
    folder = trained.folder / "model"
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= settings.keys()
    assert settings["bias"] == "none" and not settings["modules_to_save"] and not settings["use_dora"]
    assert settings["r"] <= 512 and not settings["rank_pattern"] and not settings["alpha_pattern"]
    weights, found = load(trained.start).state_dict(), {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert name.startswith("base_model.model.model.layers.") and name.count("base_model.model.") == 1
        layer, which, last = name.removeprefix("base_model.model.").rsplit(".", 2)
        assert which in ("lora_A", "lora_B") and last == "weight"
        assert layer.rsplit(".", 1)[-1] in re.findall(r"\w+_proj", str(settings["target_modules"]))
        found.setdefault(layer, {})[which] = tensor
    assert len(found) == 14
    for layer, pair in found.items():  # what vLLM computes: y = x W' + alpha / r * (x A') B'
        assert pair["lora_A"].shape[0] == pair["lora_B"].shape[1] == settings["r"]
        weights[f"{layer}.weight"] += settings["lora_alpha"] / settings["r"] * pair["lora_B"] @ pair["lora_A"]
    model = load(trained.start)
    model.load_state_dict(weights)
    assert_same_logits(model, trained.logits)


@pytest.mark.parametrize(
    "settings",
    [
        dict(use_dora=True),
        dict(modules_to_save=["lm_head"]),
        dict(bias="lora_only"),
        dict(r=1024),
        dict(alpha_pattern={"q_proj": 8}),
    ],
    ids=str,
)
def test_what_vllm_cannot_serve_is_known(settings):
    plain = dict(r=8, bias="none", use_dora=False, use_rslora=True, modules_to_save=None)
    assert unserved_by_vllm(plain) == []
    (why,) = unserved_by_vllm(plain | settings)
    assert next(iter(settings)) in why or "rank" in why


# ---- every kind merges to the same logits

KINDS = {
    "lora": dict(),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "ranks": dict(rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 3}),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "embeddings": dict(target_modules=["q_proj", "embed_tokens"]),
    "both": dict(target_modules=["lm_head", "embed_tokens"]),
    "dora head": dict(target_modules=["q_proj", "lm_head"], use_dora=True),
    "whole head": dict(modules_to_save=["lm_head"]),
    "whole embeddings": dict(modules_to_save=["embed_tokens"]),
    "tied by peft": dict(modules_to_save=["lm_head"], ensure_weight_tying=True),
    "tokens": dict(trainable_token_indices=[5, 7]),
    "pissa": dict(init_lora_weights="pissa"),
}
APART = ("head", "embeddings", "both", "dora head", "whole head", "whole embeddings")


@pytest.mark.filterwarnings("ignore")  # peft's, on embeddings
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_logits_are_those_of_base_and_adapter(tmp_path, name, tie):
    base = tiny.save_model(tmp_path / "base", tie_word_embeddings=tie)
    new_adapter(tmp_path / "adapter", base, **KINDS[name])
    expected = logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter"))
    folder, said = said_by(tmp_path / "adapter")
    assert folder == tmp_path / "adapter-merged"
    assert not list(folder.glob("adapter*"))  # so that peft has nothing to do
    assert_same_logits(load(folder), expected)
    assert (logits(load(base)) - expected).abs().max() > 0.05
    on_disk = load_file(folder / "model.safetensors")
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert tied == (sum(key in on_disk for key in SHARED) == 1)
    assert tied == (tie and name not in APART)
    assert ("the base ties its lm_head" in said) == (tie and not tied)


def test_gpt2_s_transposed_weights_and_biases(tmp_path):
    base = tiny.save_model(tmp_path / "base", "gpt2")
    new_adapter(
        tmp_path / "adapter", base, lora_bias=True, fan_in_fan_out=True, target_modules=["c_attn", "c_fc"]
    )
    expected = logits(PeftModel.from_pretrained(load(base), tmp_path / "adapter"))
    folder = merge(tmp_path / "adapter")
    assert_same_logits(load(folder), expected)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]


def test_experts(tmp_path):
    sizes = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
    base = tiny.save_model(tmp_path / "base", "qwen3_moe", **sizes)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    new_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], target_parameters=experts)
    looped = dict(experts_implementation="eager")  # the grouped GEMM has no fp64
    expected = logits(PeftModel.from_pretrained(load(base, **looped), tmp_path / "adapter"))
    assert_same_logits(load(merge(tmp_path / "adapter"), **looped), expected)


def test_bf16_is_rounded_once(tmp_path):
    base = tiny.save_model(tmp_path / "base")
    load(base).bfloat16().save_pretrained(base)
    new_adapter(tmp_path / "adapter", base, use_rslora=True)
    exact = load_file(merge(tmp_path / "adapter", tmp_path / "fp32", "fp32") / "model.safetensors")
    rounded = load_file(merge(tmp_path / "adapter", tmp_path / "auto") / "model.safetensors")
    assert json.loads((tmp_path / "auto/config.json").read_text())["dtype"] == "bfloat16"
    assert {t.dtype for t in exact.values()} == {torch.float32}
    for name, tensor in rounded.items():
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor, exact[name].bfloat16()), name


def test_a_change_below_bf16_is_said(tmp_path):
    base = tiny.save_model(tmp_path / "base")
    model = new_adapter(tmp_path / "adapter", base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 1e-3
    model.save_pretrained(tmp_path / "adapter")
    _, said = said_by(tmp_path / "adapter", dtype="bf16")
    assert "rounds away much of the adapter; --dtype fp32 keeps it" in said
    _, said = said_by(tmp_path / "adapter", tmp_path / "fp32", dtype="fp32")
    assert "rounds away" not in said


# ---- the command


def test_a_run_merges_into_a_folder_that_is_whole(trained, tmp_path, capsys):
    assert main(["merge", str(trained.folder), "--output", str(tmp_path / "out")]) == 0
    model, tokenizer = load(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert_same_logits(model, trained.logits)
    assert tokenizer.chat_template == tiny.CHATML
    assert (tmp_path / "out/generation_config.json").exists()
    assert "trained with fastdpo" in (tmp_path / "out/README.md").read_text()
    assert f"merging {trained.folder}/model into {trained.start}" in capsys.readouterr().out.replace("\n", "")


def test_the_tokenizer_is_the_adapter_s_where_it_has_one(adapter, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(adapter)
    read = lambda folder: AutoTokenizer.from_pretrained(folder).get_vocab()
    assert "<extra>" in read(merge(adapter, tmp_path / "one"))
    for path in adapter.glob("*token*"):
        path.unlink()
    assert "<extra>" not in read(merge(adapter, tmp_path / "two"))


def test_a_base_in_4_bits_is_said(trained, tmp_path):
    run = shutil.copytree(trained.folder, tmp_path / "run")
    assert "4 bits" not in said_by(run, tmp_path / "one")[1]
    text = (run / "config.yaml").read_text()
    assert "load_in_4bit: false" in text
    (run / "config.yaml").write_text(text.replace("load_in_4bit: false", "load_in_4bit: true"))
    folder, said = said_by(run, tmp_path / "two")
    assert "load_in_4bit: the run trained on this base in 4 bits" in said
    assert "quantization_config" not in (folder / "config.json").read_text()


def test_nothing_is_overwritten(adapter, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("precious")
    with pytest.raises(ConfigError, match="out exists already"):
        merge(adapter, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


DIE = """import os, sys
from fastdpo.publish import merge as m
m.add_card = lambda *a, **k: os._exit(9)
m.merge(*sys.argv[1:])
"""


def test_killed_at_the_end_leaves_no_half_model(adapter, tmp_path):
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", DIE, str(adapter), str(out)], capture_output=True)
    assert done.returncode == 9 and not out.exists()
    assert (tmp_path / ".out.part").exists()
    load(merge(adapter, out))
    assert not (tmp_path / ".out.part").exists()


def test_an_interrupt_leaves_nothing(adapter, tmp_path, monkeypatch, capsys):
    def interrupted(*args, **keys):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "add_card", interrupted)
    assert main(["merge", str(adapter)]) == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# ---- what is refused


def nan(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def less(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def biased(folder):
    new_adapter(folder, str(folder.parent / "base"), target_modules=["q_proj"], lora_bias=True)


def quantised(folder):
    path = folder.parent / "base/config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    path.write_text(json.dumps(config))


def stacked(folder):
    edit(folder, base_model_name_or_path=str(shutil.copytree(folder, folder.parent / "first")))


REFUSED = {
    "base gone": (
        lambda f: edit(f, base_model_name_or_path="/gone/base"),
        "'/gone/base', the base that .*adapter names, does not exist here; set base_model_name_or_path in",
    ),
    "no base": (
        lambda f: edit(f, base_model_name_or_path=None),
        "names no base; set base_model_name_or_path",
    ),
    "an adapter's adapter": (stacked, "is an adapter itself; merge it first"),
    "another kind": (lambda f: edit(f, peft_type="PREFIX_TUNING"), "PREFIX_TUNING; only LORA"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot read .*adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
    "other rank": (lambda f: edit(f, r=8), "does not fit"),
    "other modules": (lambda f: edit(f, target_modules=["v_proj"]), "is not in the base"),
    "a tensor short": (less, "is not in the adapter"),
    "newer": (lambda f: edit(f, use_magic=True), "use_magic.*update peft"),
    "lora_bias": (biased, "lora_bias=True.* base layer has no bias"),
    "quantised": (quantised, "is stored quantised, .* set base_model_name_or_path"),
    "nan": (nan, "(?i)nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(adapter, tmp_path, name):
    spoil, message = REFUSED[name]
    spoil(adapter)
    with pytest.raises(ModelError, match=message):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_merge_that_changes_the_logits_is_refused(adapter, tmp_path, monkeypatch):
    """Without its check, what peft leaves out would be lost silently."""
    from peft.tuners.lora import Linear

    monkeypatch.setattr(Linear, "merge", lambda self, **keys: None)
    with pytest.raises(ModelError, match=r"merged logits are .* it cannot be merged; nothing was written"):
        merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype, least", [(torch.float32, 33), (torch.bfloat16, 17)], ids=str)
def test_rounding_is_no_reason_to_refuse(dtype, least):
    """Of an adapter that hardly moves the logits: what is off then is the order of sums, which grows with
    their length in fp32. What is more, or a hundredth of a large effect, is refused."""
    logits, quiet = torch.randn(1, 32, 300), Console(quiet=True)

    def check(units, width, effect=0.0):
        got = logits * (1 + units * torch.finfo(dtype).eps)
        units = module._units_of_rounding(width, dtype)
        module._check(got, logits, effect * logits, units, dtype, quiet)

    check(0.9 * least, 64)
    with pytest.raises(ModelError, match="cannot be merged"):
        check(least, 64)
    if dtype == torch.float32:
        check(least, 128)
        with pytest.raises(ModelError, match="cannot be merged"):
            check(0.02 * 2**23, 64, effect=1.0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["base"], "is a whole model already"),
        (["nowhere"], "nowhere does not exist"),
        (["."], "holds no model"),
        (
            ["adapter", "--dtype", "int8"],
            '"int8" for --dtype. Choose from: "auto", "bf16", "fp32"',
        ),
        (["adapter", "--dtype"], "--dtype requires an argument"),
        (["adapter", "--rank", "3"], "Unknown option: --rank"),
        (["adapter", "base"], "unexpected argument 'base'"),
        ([], "FOLDER requires an argument"),
        (["adapter", "--output", "base"], "base exists already"),
        (["adapter", "--output", "/dev/null/out"], "cannot write"),
    ],
    ids=str,
)
def test_wrong_commands(adapter, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main(["merge", *argv]) == 2
    assert words in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_the_default_folder_is_beside_it(adapter, monkeypatch):
    monkeypatch.chdir(adapter)
    assert merge(".") == Path(f"{adapter}-merged")
