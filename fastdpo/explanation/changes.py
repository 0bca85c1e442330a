"""How much a tensor changed, and the "weights" of explain.json that changes are told in.

Of a matrix, dW = after - before: |dW| / |W| (Frobenius norms), its share of all squared change, and the
stable rank |dW|^2 / s_1^2, s_1 the largest singular value (Rudelson and Vershynin 2007, "Sampling from large
matrices", section 1.1): 1 where the change is one direction, the number of equal ones where it is several.
"""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.errors import ModelError
from fastdpo.explanation.spectrum import largest_singular_value

_CHUNK = 1 << 22  # entries that are fp64 at once


class Change(NamedTuple):
    """Of one tensor: |dW|^2, |W|^2, the stable rank of dW, and how many entries of how many changed (None:
    not counted)."""

    squared: float
    before: float
    stable_rank: float
    changed: int | None
    entries: int


def squared_norm(tensor: Tensor) -> float:
    """|W|^2, in f64."""
    parts = tensor.detach().reshape(-1).split(_CHUNK)
    return sum(float(part.double().square().sum()) for part in parts)


def change_of(name: str, before: Tensor, after: Tensor) -> Change:
    """Of two tensors of one shape, of any float dtypes, on after's device. An entry has changed where the two
    differ at all. Raises ModelError, which names the tensor, for other shapes and for what is not finite."""
    if before.shape != after.shape:
        shapes = f"{list(before.shape)} before and {list(after.shape)} after"
        raise ModelError(f"weights: {name} is of shape {shapes}; both have to be of the same architecture")
    kind = torch.promote_types(torch.promote_types(before.dtype, after.dtype), torch.float32)
    old, new = before.reshape(-1), after.reshape(-1)
    difference = torch.empty(len(new), dtype=kind, device=new.device)
    sums, changed = torch.zeros(2, dtype=torch.float64, device=new.device), 0
    for some in range(0, len(new), _CHUNK):
        part = slice(some, some + _CHUNK)
        a, b = old[part].to(new.device).double(), new[part].double()
        sums += torch.stack([(b - a).square().sum(), a.square().sum()])
        changed += int((a != b).sum())
        difference[part] = b - a
    squared, norm = sums.tolist()
    check_finite(name, norm, squared)
    matrix = difference.reshape(after.shape)
    return Change(squared, norm, _stable_rank(matrix, squared), changed, len(new))


def check_finite(name: str, before: float, squared: float) -> None:
    """Raises ModelError where |W|^2 or |dW|^2 is not."""
    if not math.isfinite(before + squared):
        which = "after" if math.isfinite(before) else "before"
        raise ModelError(f"weights: {name} has entries {which} that are not finite numbers; train it again")


def _stable_rank(difference: Tensor, squared: float) -> float:
    """0 of no change; of a vector 1. Stacked experts count as one matrix, their rows below each other."""
    if not squared or difference.ndim < 2:
        return float(squared > 0)
    matrix = difference.flatten(0, -2)
    return max(1.0, squared / largest_singular_value(matrix) ** 2)


def unknown(reason: str, kind: str, dtype: str) -> dict:
    """The "weights" of explain.json where there is nothing to tell."""
    return dict(reason=reason, kind=kind, dtype=dtype, relative=None, changed=None, modules=[])


def told(changes: dict[str, Change], kind: str, dtype: str, whole: float | None = None) -> dict:
    """The "weights" of explain.json. whole: |W|^2 of the model, where more than what is listed."""
    whole = sum(one.before for one in changes.values()) if whole is None else whole
    total, places = sum(one.squared for one in changes.values()), _places(changes)
    counted = None not in [one.changed for one in changes.values()]
    entries = sum(one.entries for one in changes.values())
    modules = []
    for name, one in changes.items():
        short, layer, sort = places[name]
        row = dict(name=short, layer=layer, kind=sort, relative=_relative(one.squared, one.before))
        row |= dict(norm=math.sqrt(one.squared), share=one.squared / total if total else 0.0)
        share = None if one.changed is None else one.changed / max(one.entries, 1)
        modules.append(row | dict(stable_rank=one.stable_rank, changed=share))
    changed = sum(one.changed or 0 for one in changes.values()) / max(entries, 1)
    out = dict(reason=None, kind=kind, dtype=dtype, relative=_relative(total, whole))
    return out | dict(changed=changed if counted and kind == "whole" else None, modules=modules)


def _relative(squared: float, before: float) -> float:
    """|dW| / |W|; 1 where W is 0 and does not stay so (a fresh bias): then all of it is change."""
    return math.sqrt(squared / before) if before else float(squared > 0)


def _places(changes: dict[str, Change]) -> dict[str, tuple[str, int | None, str]]:
    """{parameter: (its name as people write it, its layer, its kind within a layer)}. Where there are several
    stacks of layers (a vision tower's), those of the most weights are the model's; others have no layer."""
    short = {
        name: re.sub(r"^(base_model\.model\.)?((model|transformer)\.(?=.*\.))?", "", name) for name in changes
    }
    short = {name: one.removesuffix(".weight") for name, one in short.items()}
    found = {name: re.match(r"(.*?)\.?\b(\d+)\.(.+)$", one) for name, one in short.items()}
    stacks = dict[str, int]()
    for name, match in found.items():
        if match:
            stacks[match[1]] = stacks.get(match[1], 0) + changes[name].entries
    main = max(stacks, key=stacks.__getitem__, default=None)
    inside = {name: match for name, match in found.items() if match and match[1] == main}
    kinds = _kinds({match[3] for match in inside.values()})
    out = dict[str, tuple[str, int | None, str]]()
    for name, one in short.items():
        layer = int(inside[name][2]) if name in inside else None
        out[name] = (one, layer, kinds[inside[name][3]] if name in inside else one.rpartition(".")[2])
    return out


def _kinds(paths: set[str]) -> dict[str, str]:
    """{path within a layer: its shortest end that no other has}: down_proj, but attn.c_proj and mlp.c_proj; a
    bias is named with its module."""
    out = {}
    for path in paths:
        parts = path.split(".")
        least = 2 if parts[-1] == "bias" and len(parts) > 1 else 1
        ends = (".".join(parts[-n:]) for n in range(least, len(parts) + 1))
        alone = lambda end: sum(f".{other}".endswith(f".{end}") for other in paths) == 1
        out[path] = next(filter(alone, ends), path)
    return out
