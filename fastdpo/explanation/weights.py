"""What of a model's weights changed: of a whole model, or by adapters that are on it."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastdpo.console.progress import make_progress
from fastdpo.errors import ConfigError, ModelError
from fastdpo.explanation.changes import Change, change_of, check_finite, squared_norm, told, unknown
from fastdpo.explanation.spectrum import of_product

_CODES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TIED, _DTYPE, _REASON = "fastdpo.tied", "fastdpo.dtype", "fastdpo.reason"
_IN_4_BITS = "the model's weights are quantised, so a difference of them says nothing exact"


# ---- whole models


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All of them by all of their names: a tied one comes under each."""
    return dict(model.named_parameters(remove_duplicate=False))


def _storage(tensor: Tensor) -> tuple:
    """Equal of tensors that are the same entries in memory."""
    if not tensor.numel():
        return (id(tensor),)
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device


def _canonical(parameters: dict[str, nn.Parameter]) -> dict[str, str]:
    """{name: the first name of the same entries}"""
    first = dict[tuple, str]()
    return {name: first.setdefault(_storage(p), name) for name, p in parameters.items()}


def _quantised(model: nn.Module) -> bool:
    return any(p.dtype not in _CODES or hasattr(p, "quant_state") for p in model.parameters())


def _dtype(model: nn.Module) -> str:
    """Of most of its weights."""
    sizes = dict[str, int]()
    for p in model.parameters():
        name = str(p.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + p.numel()
    return max(sizes, key=sizes.__getitem__) if sizes else "none"


def _no_adapter(model: nn.Module) -> None:
    if hasattr(model, "peft_config"):
        raise ModelError(
            f"weights: {type(model).__name__} has an adapter on it; merge it, or compare by `of_lora`"
        )


def dump(model: nn.Module, path: Path) -> None:
    """Writes the parameters to a file of safetensors, one after the other: no copy of the model in memory.
    What is tied is written once, its other names in the file's metadata. Of a quantised model it writes why
    there is nothing. Raises ConfigError where it cannot be written, ModelError for a model with an adapter on
    it."""
    _no_adapter(model)
    parameters, meta = _parameters(model), {_DTYPE: _dtype(model)}
    if _quantised(model):
        parameters, meta = {}, meta | {_REASON: _IN_4_BITS}
    first = _canonical(parameters)
    stored = {name: p for name, p in parameters.items() if first[name] == name}
    meta[_TIED] = json.dumps({name: other for name, other in first.items() if name != other})
    header, end = dict[str, Any](__metadata__=meta), 0
    for name, p in stored.items():
        offsets = [end, end := end + p.numel() * p.element_size()]
        header[name] = dict(dtype=_CODES[p.dtype], shape=list(p.shape), data_offsets=offsets)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the format: a length, the header padded to 8 bytes, the tensors' bytes
    try:
        with open(path, "wb") as file:
            file.write(len(head).to_bytes(8, "little") + head)
            for p in stored.values():
                flat = p.detach().cpu().contiguous().reshape(-1)
                file.write(flat.view(torch.uint8).numpy().data)
    except OSError as error:
        raise ConfigError(
            f"weights: cannot write {path}: {error}; free some space, or name another --output"
        ) from None


@torch.no_grad()
def compare(path: Path, model: nn.Module, console: Console) -> dict:
    """The "weights" of explain.json: the model against what `dump` wrote, one tensor at a time, on the
    model's device. A weight that is tied in both is listed once; tied in one only, under both names. Raises
    ModelError for a name or a shape that differs, and for a file that cannot be read."""
    _no_adapter(model)
    parameters = _parameters(model)
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata()
            reason = meta.get(_REASON) or (_IN_4_BITS if _quantised(model) else None)
            if reason:
                return unknown(reason, "whole", meta[_DTYPE])
            tied = json.loads(meta[_TIED])
            theirs, ours = {name: name for name in file.keys()} | tied, _canonical(parameters)
            _check_names(theirs, ours)
            pairs = dict[tuple[str, str], str]()
            for name in ours:
                pairs.setdefault((theirs[name], ours[name]), name)
            changes = dict[str, Change]()
            with make_progress(console) as bar:
                task = bar.add_task("comparing weights", total=len(pairs), unit="tensors", info="")
                for (stored, _), name in pairs.items():
                    changes[name] = change_of(name, file.get_tensor(stored), parameters[name].detach())
                    bar.update(task, advance=1)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"weights: cannot read {path}: {error}; run it again") from None
    return told(changes, "whole", _dtype(model))


def _check_names(theirs: dict[str, str], ours: dict[str, str]) -> None:
    for name in chain(theirs, ours):
        if name not in theirs or name not in ours:
            where = "before, not after" if name in theirs else "after, not before"
            raise ModelError(f"weights: {name} is there {where}; both have to be of the same architecture")


# ---- adapters


@torch.no_grad()
def of_lora(model: nn.Module) -> dict:
    """The "weights" of explain.json where the model before is the same with its adapters off: a row for each
    matrix that these change. |dW| of s B A is s sqrt(sum (B'B) * (AA')), and its singular values are those
    of the QR factors' product: nothing larger than the factors is made. A DoRA's, and a whole matrix of its
    own (modules_to_save), are taken as they are, one at a time. Raises ModelError for a merged adapter, and
    where there is none."""
    if not hasattr(model, "peft_config"):
        raise ModelError(f"weights: {type(model).__name__} has no adapter; dump and compare whole models")
    if _quantised(model):
        return unknown(_IN_4_BITS, "lora", _dtype(model))
    if any(hasattr(module, "parameter_name") for module in model.modules()):  # peft's ParamWrapper
        text = "the adapter is on stacked weights (target_parameters); merge it, and compare whole models"
        return unknown(text, "lora", _dtype(model))
    changes = dict[str, Change]()
    for name, module in model.named_modules():
        if getattr(module, "merged", False):
            raise ModelError(f"weights: the adapter on {name} is merged into it; unmerge it first")
        if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
            changes |= _replaced(name, module)
        elif getattr(module, "lora_A", None) or getattr(module, "lora_embedding_A", None):
            changes |= _added(name, module)
    base = {_storage(p): p for name, p in _parameters(model).items() if _of_base(name)}
    whole = sum(squared_norm(p) for p in base.values())
    return told(changes, "lora", _dtype(model), whole)


def _of_base(name: str) -> bool:
    return ".lora_" not in name and ".modules_to_save." not in name


def _replaced(name: str, module: Any) -> dict[str, Change]:
    """Of a module that is trained whole beside the original."""
    before, out = dict(module.original_module.named_parameters()), dict[str, Change]()
    for adapter in module.active_adapters:
        if adapter in module.modules_to_save:
            for key, after in module.modules_to_save[adapter].named_parameters():
                full = f"{name}.{key}"
                out[full] = change_of(full, before[key.replace("base_layer.", "")].detach(), after.detach())
    return out


def _added(name: str, module: Any) -> dict[str, Change]:
    """Of a LoRA's base weight."""
    weight, full = module.get_base_layer().weight.detach(), f"{name}.weight"
    factors = list(_factors(module))
    if not factors:
        return {}
    if any(adapter in getattr(module, "lora_magnitude_vector", {}) for adapter, _, _ in factors):
        dora = change_of(full, weight, _with_dora(module, weight, factors))
        return {full: dora._replace(changed=None)}  # rounding changes each
    squared, largest = of_product(
        torch.cat([b for _, b, _ in factors], 1), torch.cat([a for *_, a in factors])
    )
    before = squared_norm(weight)
    check_finite(full, before, squared)
    rank = max(1.0, squared / largest**2) if squared else 0.0
    return {full: Change(squared, before, rank, None, weight.numel())}


def _factors(module: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(adapter, s B [out, r], A [r, in]), f64, of each active one."""
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        elif adapter in getattr(module, "lora_embedding_A", {}):
            a, b = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
        else:
            continue
        yield (
            adapter,
            module.scaling[adapter] * b.detach().double().flatten(1),
            a.detach().double().flatten(1),
        )


def _with_dora(module: Any, weight: Tensor, factors: list[tuple[str, Tensor, Tensor]]) -> Tensor:
    """f64: the rows of W + s B A scaled to their magnitudes (arXiv 2402.09353, equation 5), of one adapter
    after the other, as peft merges them. The norms are the module's own, in its dtype: so a fresh DoRA
    changes nothing here, either."""
    turned = bool(getattr(module, "lora_embedding_A", None)) or bool(getattr(module, "fan_in_fan_out", False))
    wide = (weight.T if turned else weight).double()  # [out, in]: an embedding's and a Conv1D's is [in, out]
    kind = torch.promote_types(weight.dtype, torch.float32)
    for adapter, b, a in factors:
        delta = b @ a
        if adapter in module.lora_magnitude_vector:
            layer = module.lora_magnitude_vector[adapter]
            as_stored = wide.T if layer.fan_in_fan_out else wide
            norms = layer.get_weight_norm(as_stored.to(kind), delta.to(kind), scaling=1)
            wide = (wide + delta) * (layer.weight.detach() / norms).double()[:, None]
        else:
            wide = wide + delta
    return wide.T if turned else wide
