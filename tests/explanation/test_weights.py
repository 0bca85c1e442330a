"""What of the weights changed: norms, ranks and entries against dense products, adapters without merging."""

import io
import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM

from fastdpo.errors import ConfigError, ModelError
from fastdpo.explanation.changes import change_of
from fastdpo.explanation.spectrum import largest_singular_value, of_product
from fastdpo.explanation.weights import compare, dump, of_lora
from fastdpo.model.adapters import steady_dora
from tests import tiny

QUIET = Console(file=io.StringIO())


def model(model_type="llama", dtype=torch.float64, **overrides):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny.model_config(model_type, **overrides)).to(dtype).eval()


def moved(one, size=1e-3, only="", seed=1):
    """All weights, or those whose name has `only`, a little elsewhere."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in one.named_parameters():
        if only in name:
            parameter.data += size * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return one


def compared(before, after, folder):
    dump(before, folder / "before.safetensors")
    return compare(folder / "before.safetensors", after, QUIET)


def by_name(told):
    return {row["name"]: row for row in told["modules"]}


def with_lora(base, fill=0.05, **settings):
    settings = dict(r=4, target_modules="all-linear", task_type="CAUSAL_LM", lora_alpha=12) | settings
    out = get_peft_model(base, LoraConfig(**settings)).to(base.dtype)
    draw = torch.Generator().manual_seed(3)
    for parameter in out.parameters():
        if parameter.requires_grad:
            parameter.data += fill * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype)
    return out.eval()


# ---- whole models


def test_norms_ranks_and_shares_are_those_of_the_difference(tmp_path):
    before, after = model(), moved(model())
    told = compared(before, after, tmp_path)
    old = dict(before.named_parameters())
    differences = {name: p.detach() - old[name].detach() for name, p in after.named_parameters()}
    total = sum(float(d.square().sum()) for d in differences.values())
    whole = sum(float(p.detach().square().sum()) for p in old.values())
    assert len(told["modules"]) == len(old)
    assert told["relative"] == pytest.approx(math.sqrt(total / whole), rel=1e-12)
    assert (told["reason"], told["kind"], told["dtype"], told["changed"]) == (None, "whole", "float64", 1)
    rows = by_name(told)
    for name, d in differences.items():
        row = rows[name.removeprefix("model.").removesuffix(".weight")]
        norm = float(d.norm())
        assert row["norm"] == pytest.approx(norm, rel=1e-12)
        assert row["relative"] == pytest.approx(norm / float(old[name].detach().norm()), rel=1e-12)
        assert row["share"] == pytest.approx(norm**2 / total, rel=1e-12)
        rank = norm**2 / float(torch.linalg.matrix_norm(d, 2)) ** 2 if d.ndim == 2 else 1
        assert row["stable_rank"] == pytest.approx(rank, rel=1e-5)
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1)
    json.dumps(told, allow_nan=False)


def test_nothing_changed_is_zeros(tmp_path):
    told = compared(model(), model(), tmp_path)
    assert (told["relative"], told["changed"]) == (0, 0)
    keys = ("relative", "norm", "share", "stable_rank", "changed")
    assert all(row[key] == 0 for row in told["modules"] for key in keys)


def test_names_layers_and_kinds(tmp_path):
    rows = by_name(compared(model(), moved(model()), tmp_path))
    assert (rows["layers.1.mlp.down_proj"]["layer"], rows["layers.1.mlp.down_proj"]["kind"]) == (
        1,
        "down_proj",
    )
    assert (rows["embed_tokens"]["layer"], rows["embed_tokens"]["kind"]) == (None, "embed_tokens")
    assert rows["norm"]["layer"] is None and rows["lm_head"]["layer"] is None


def test_kinds_of_one_name_are_told_apart(tmp_path):
    """GPT-2: each layer has two c_proj, with a bias each."""
    rows = by_name(compared(model("gpt2"), moved(model("gpt2")), tmp_path))
    kinds = {row["kind"] for name, row in rows.items() if name.startswith("h.1.")}
    assert {"attn.c_proj", "mlp.c_proj", "attn.c_proj.bias", "mlp.c_proj.bias", "c_attn", "ln_1"} <= kinds
    assert len(kinds) == sum(name.startswith("h.1.") for name in rows)
    assert rows["h.1.mlp.c_proj"]["layer"] == 1


def test_a_bias_is_named_with_its_module(tmp_path):
    """Where there is but one."""
    layer = lambda: nn.ModuleDict(dict(fc=nn.Linear(3, 2), norm=nn.Linear(3, 2, bias=False)))
    stack = lambda: nn.ModuleDict(dict(layers=nn.ModuleList([layer(), layer()])))
    rows = by_name(compared(stack(), stack(), tmp_path))
    assert {row["kind"] for row in rows.values()} == {"fc", "fc.bias", "norm"} and len(rows) == 6


def test_a_tied_weight_is_listed_once(tmp_path):
    tied = lambda: model(tie_word_embeddings=True)
    told = compared(tied(), moved(tied()), tmp_path)
    assert "embed_tokens" in by_name(told) and "lm_head" not in by_name(told)
    with safe_open(tmp_path / "before.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()


def test_ends_that_only_one_of_them_ties_are_both_compared(tmp_path):
    """A merged LoRA on the head of a tied base has two weights."""
    tied, apart = model(tie_word_embeddings=True), model(tie_word_embeddings=False)
    ends = {n: p.detach().clone() for n, p in tied.named_parameters()}
    apart.load_state_dict(ends | {"lm_head.weight": ends["model.embed_tokens.weight"] + 0.5})
    for before, after in ((tied, apart), (apart, tied)):
        rows = by_name(compared(before, after, tmp_path))
        assert rows["embed_tokens"]["norm"] == 0 and rows["lm_head"]["share"] == 1
        assert rows["lm_head"]["norm"] == pytest.approx(0.5 * math.sqrt(tiny.VOCAB * 64))


def test_bf16_entries_that_changed_are_counted(tmp_path):
    """Steps of 1e-6 are below bf16's step in most entries: those are still as they were."""
    before, after = model(dtype=torch.bfloat16), model(dtype=torch.bfloat16)
    weight = after.model.layers[0].mlp.up_proj.weight.data
    flat = weight.view(-1)
    flat[5:12] = flat[5:12] * 2 + 1
    flat[100:] += 1e-6 * flat[100:]  # rounded away
    told = compared(before, after, tmp_path)
    row = by_name(told)["layers.0.mlp.up_proj"]
    assert told["dtype"] == "bfloat16"
    assert row["changed"] == 7 / weight.numel()
    assert told["changed"] == 7 / sum(p.numel() for p in after.parameters())
    assert [name for name, one in by_name(told).items() if one["changed"]] == ["layers.0.mlp.up_proj"]


def test_bits_are_kept_in_every_dtype(tmp_path):
    one = nn.ParameterDict(
        {
            "a": nn.Parameter(torch.randn(3, 5).T),  # not contiguous
            "b": nn.Parameter(torch.randn(7).bfloat16()),
            "c": nn.Parameter(torch.tensor(2.5)),
            "d": nn.Parameter(torch.randn(2, 2, 3).half()),
            "e": nn.Parameter(torch.randn(4).double()),
        }
    )
    dump(one, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        for name, parameter in one.items():
            stored = file.get_tensor(name)
            assert stored.dtype == parameter.dtype and torch.equal(stored, parameter)
    one["c"].data += 1
    rows = by_name(compare(tmp_path / "x.safetensors", one, QUIET))
    assert {name: row["norm"] for name, row in rows.items()} == dict(a=0, b=0, c=1, d=0, e=0)
    assert rows["c"]["stable_rank"] == 1


def test_a_bias_that_was_zero_is_all_change(tmp_path):
    before, after = model("gpt2"), model("gpt2")
    after.transformer.h[0].mlp.c_proj.bias.data += 1
    rows = by_name(compared(before, after, tmp_path))
    assert (rows["h.0.mlp.c_proj.bias"]["relative"], rows["h.1.mlp.c_proj.bias"]["relative"]) == (1, 0)


def test_large_tensors_go_by_in_parts(monkeypatch):
    monkeypatch.setattr("fastdpo.explanation.changes._CHUNK", 10)
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(7, 9, generator=draw, dtype=torch.float64) for _ in range(2))
    got = change_of("x", a, b)
    assert got.squared == pytest.approx(float((b - a).square().sum()), rel=1e-14)
    assert got.before == pytest.approx(float(a.square().sum()), rel=1e-14) and got.changed == 63


def test_torch_s_random_numbers_go_on_as_they_were(tmp_path):
    before, after = model(), moved(model())
    state = torch.get_rng_state()
    compared(before, after, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


def test_its_dump_needs_no_second_model(tmp_path):
    size = sum(p.numel() * p.element_size() for p in model().parameters())
    dump(model(), tmp_path / "x.safetensors")
    assert size < (tmp_path / "x.safetensors").stat().st_size < size + 10_000


# ---- singular values


@pytest.mark.parametrize("shape", [(40, 60), (300, 50), (1, 9), (9, 1), (5, 5), (300, 280)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_largest_singular_value(shape, scale, dtype):
    draw = torch.Generator().manual_seed(0)
    matrix = scale * torch.randn(shape, generator=draw, dtype=torch.float64)
    expected = float(torch.linalg.matrix_norm(matrix, 2))
    assert largest_singular_value(matrix.to(dtype)) == pytest.approx(expected, rel=3e-6)


def test_the_largest_singular_value_of_low_ranks():
    draw = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 2, generator=draw) @ torch.randn(2, 50, generator=draw)
    expected = float(torch.linalg.matrix_norm(matrix.double(), 2))
    assert largest_singular_value(matrix) == pytest.approx(expected, rel=3e-6)
    assert largest_singular_value(torch.zeros(4, 3)) == 0
    assert largest_singular_value(torch.eye(30)) == pytest.approx(1)


def test_a_product_s_norms_without_the_product():
    draw = torch.Generator().manual_seed(0)
    b, a = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((70, 4), (4, 90)))
    squared, largest = of_product(b, a)
    values = torch.linalg.svdvals(b @ a)
    assert math.sqrt(squared) == pytest.approx(float((b @ a).norm()), rel=1e-12)
    assert largest == pytest.approx(float(values[0]), rel=1e-12)
    wide = of_product(a.T @ torch.ones(4, 200, dtype=torch.float64), torch.ones(200, 3, dtype=torch.float64))
    assert wide[1] == pytest.approx(math.sqrt(wide[0]), rel=1e-12)  # rank 1, more rows than columns


# ---- adapters

ADAPTERS = {
    "lora": dict(),
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "ends": dict(target_modules=["q_proj", "lm_head", "embed_tokens"]),
    "dora on embeddings": dict(use_dora=True, target_modules=["q_proj", "embed_tokens"]),
    "whole head": dict(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "conv1d": dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
    "dora on conv1d": dict(target_modules=["c_proj"], fan_in_fan_out=True, use_dora=True),
}


@pytest.mark.filterwarnings("ignore")  # peft's, on embeddings
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_is_what_its_merged_model_differs_by(tmp_path, name):
    kind = "gpt2" if "conv1d" in name else "llama"
    apart = dict(tie_word_embeddings=False)
    told = of_lora(with_lora(model(kind, **apart), **ADAPTERS[name]))
    merged = with_lora(model(kind, **apart), **ADAPTERS[name]).merge_and_unload()
    dense = compared(model(kind, **apart), merged, tmp_path)
    expected = {name: row for name, row in by_name(dense).items() if row["norm"]}
    rows = by_name(told)
    assert rows.keys() == expected.keys() and len(rows) >= 2
    assert (told["kind"], told["changed"], told["reason"]) == ("lora", None, None)
    assert told["relative"] == pytest.approx(dense["relative"], rel=1e-12)
    for one, row in rows.items():
        assert (row["layer"], row["kind"]) == (expected[one]["layer"], expected[one]["kind"])
        for key, off in (("norm", 1e-12), ("relative", 1e-12), ("share", 1e-12), ("stable_rank", 1e-5)):
            assert row[key] == pytest.approx(expected[one][key], rel=off), (one, key)
    json.dumps(told, allow_nan=False)


def test_two_adapters_at_once_are_their_sum(tmp_path):
    lora = LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    both = with_lora(model(), target_modules=["up_proj"])
    both.add_adapter("second", lora)
    both = both.double()
    for name, parameter in both.named_parameters():
        if ".second." in name:
            parameter.data += 0.1
    both.base_model.set_adapter(["default", "second"])
    rows = by_name(of_lora(both))
    for number, layer in enumerate(both.base_model.model.model.layers):
        delta = sum(layer.mlp.up_proj.get_delta_weight(one) for one in ("default", "second"))
        assert rows[f"layers.{number}.mlp.up_proj"]["norm"] == pytest.approx(
            float(delta.detach().norm()), rel=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_is_no_change(dtype, dora):
    settings = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", use_dora=dora)
    fresh = get_peft_model(model(dtype=dtype), settings)
    for parameter in fresh.parameters():  # as fastdpo does
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    steady_dora(fresh, fresh=True)
    told = of_lora(fresh)
    assert len(told["modules"]) == 14 and told["relative"] == 0
    assert all(row["norm"] == row["share"] == row["stable_rank"] == 0 for row in told["modules"])


def test_a_lora_is_read_without_a_product_as_large_as_a_weight(monkeypatch):
    one = with_lora(model())
    monkeypatch.setattr("peft.tuners.lora.layer.Linear.get_delta_weight", lambda *_: 1 / 0)
    monkeypatch.setattr("fastdpo.explanation.weights.change_of", lambda *_: 1 / 0)
    assert of_lora(one)["relative"] > 0


# ---- what is refused


def test_another_shape_or_name(tmp_path):
    with pytest.raises(ModelError) as caught:
        compared(model(), model(intermediate_size=80), tmp_path)
    expected = "weights: model.layers.0.mlp.gate_proj.weight is of shape [96, 64] before and [80, 64] after; "
    assert str(caught.value) == expected + "both have to be of the same architecture"
    with pytest.raises(ModelError, match=r"model.layers.1.* is there before, not after; both have"):
        compared(model(), model(num_hidden_layers=1), tmp_path)
    with pytest.raises(ModelError, match=r"model.layers.2.* is there after, not before; both have"):
        compared(model(), model(num_hidden_layers=3), tmp_path)


@pytest.mark.parametrize("which", ["before", "after"])
def test_weights_that_are_not_numbers(tmp_path, which):
    both = dict(before=model(), after=model())
    both[which].model.norm.weight.data[3] = float("nan")
    message = f"weights: model.norm.weight has entries {which} that are not finite"
    with pytest.raises(ModelError, match=message):
        compared(both["before"], both["after"], tmp_path)


def test_adapters_and_whole_models_are_not_mixed_up(tmp_path):
    lora = with_lora(model())
    with pytest.raises(ModelError, match="has an adapter on it; merge it"):
        dump(lora, tmp_path / "x")
    dump(model(), tmp_path / "x")
    with pytest.raises(ModelError, match="has an adapter on it; merge it"):
        compare(tmp_path / "x", lora, QUIET)
    with pytest.raises(ModelError, match="LlamaForCausalLM has no adapter; dump and compare whole models"):
        of_lora(model())
    lora.merge_adapter()
    with pytest.raises(ModelError, match=r"the adapter on .*q_proj is merged into it; unmerge it first"):
        of_lora(lora)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"weights: cannot write .*absent/x: .*; free some space"):
        dump(model(), tmp_path / "absent/x")
    (tmp_path / "x").write_text("no")
    for name in ("x", "absent"):
        with pytest.raises(ModelError, match=rf"weights: cannot read .*{name}: .*; run it again"):
            compare(tmp_path / name, model(), QUIET)


class InFourBits(nn.Module):
    """As bitsandbytes has it: packed bytes with a state beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
        self.norm = nn.Parameter(torch.ones(16))


def test_four_bits_are_not_compared(tmp_path):
    told = compared(InFourBits(), InFourBits(), tmp_path)
    assert "quantised" in told["reason"] and told["modules"] == [] and told["relative"] is None
    assert set(told) == set(compared(model(), model(), tmp_path))
    told = compared(InFourBits(), model(), tmp_path)  # either of them
    assert "quantised" in told["reason"]
    eight = nn.ParameterDict({"a": nn.Parameter(torch.zeros(2).to(torch.float8_e4m3fn), requires_grad=False)})
    assert "quantised" in compared(eight, eight, tmp_path)["reason"]
    lora = InFourBits()
    lora.peft_config = {}
    assert "quantised" in of_lora(lora)["reason"]
