"""Other values in a model's place: constants, or those that another model has at the same tokens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdpo.console.progress import make_progress
from fastdpo.data.packing import Cut
from fastdpo.errors import ModelError
from fastdpo.explanation.hooks import Hooks, hooks
from fastdpo.explanation.places import Places, neurons_of
from fastdpo.model.policy import Policy

_FIRST = "layer 0"


@dataclass(frozen=True, eq=False)
class Patch:
    """What to put in place of a model's own values."""

    neurons: tuple[Tensor, ...] = ()  # a layer each, i64[n]: which ones; an empty tuple: none
    # A layer each, [n]: constants, at the scored rows. None: the recorded ones of the same token, at all rows
    values: tuple[Tensor, ...] | None = None
    embedding: bool = False  # the recorded ones, at all rows
    attention: bool = False  # likewise, of every layer
    mlp: bool = False


@contextmanager
def patched(
    places: Places,
    patch: Patch,
    *,
    rows: Tensor | None = None,
    recorded: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Inside, the model computes with the patch: its input to the MLPs' last projections, and what its parts
    give. A patch of nothing leaves the model's own bits. Off again whatever happens.

    rows: where constants go, places in the flattened [T] tokens of a pack (its score_row); None: the last
    position of every sequence, for generation with padding on the left. recorded: another model's values of
    the very same pack (`record`), which may be read lazily.

    Raises ModelError where the model has not so many layers or neurons, a value is missing or of another
    shape, and where a patched place was not computed inside.
    """
    _check(places, patch, recorded)
    with hooks() as on:
        _put(on, places, patch, rows, {} if recorded is None else recorded)
        yield


def _check(places: Places, patch: Patch, recorded: Mapping[str, Tensor] | None) -> None:
    L = len(places.layers)
    for what, given in (("neurons", patch.neurons), ("values", patch.values or ())):
        if given and len(given) != L:
            raise ModelError(f"patch: {what} of {len(given)} layers, and the model has {L}; give one a layer")
    if any(len(some) for some in patch.neurons) and places.experts:
        raise ModelError("patch: the model is a mixture of experts, whose neurons are not patched")
    for number, (which, values) in enumerate(zip(patch.neurons, patch.values or ())):
        if len(which) != len(values):
            raise ModelError(f"patch: layer {number}: {len(which)} neurons and {len(values)} values for them")
    per_token = patch.values is None and any(len(some) for some in patch.neurons)
    if recorded is None and (per_token or patch.embedding or patch.attention or patch.mlp):
        raise ModelError("patch: values of the same token are asked for, and no record of them is given")


def _put(on: Hooks, places: Places, patch: Patch, rows: Tensor | None, values: Mapping[str, Tensor]) -> None:
    if any(map(len, patch.neurons)) and patch.values is not None:
        on.before(places.first, _FIRST, lambda x: None)  # for its shape
    if patch.embedding:
        on.before(places.first, "the embedding", partial(_same, values, "embedding"))
    for number, layer in enumerate(places.layers):
        where = f"layer {number}: the"
        if patch.attention:
            on.after(layer.attention, f"{where} attention", partial(_same, values, f"attention.{number}"))
        which = patch.neurons[number] if patch.neurons else torch.empty(0, dtype=torch.int64)
        if len(which):
            assert layer.last is not None
            if patch.values is None:
                call = partial(_same_columns, values, f"neurons.{number}", which)
            else:
                call = partial(_constants, on, which, patch.values[number], rows)
            on.before(layer.last, f"{where} neurons", call)
        if patch.mlp:
            on.after(layer.mlp, f"{where} MLP", partial(_same, values, f"mlp.{number}"))


def _same(values: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """The recorded [T, width] in place of x."""
    return _read(values, name, x).to(x)


def _read(values: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    if name not in values:
        raise ModelError(f"patch: the record has no {name}; make it with fastdpo.explanation.patch.record")
    found = values[name]
    if found.shape != x.shape:
        raise ModelError(
            f"patch: the record's {name} is {list(found.shape)} and the model's {list(x.shape)}; give the "
            "record of the same pack, of a model of the same shape"
        )
    return found


def _same_columns(values: Mapping[str, Tensor], name: str, which: Tensor, x: Tensor) -> Tensor:
    which = _within(which, x, name)
    found = _read(values, name, x)
    return x.index_copy(1, which, found[:, which.to(found.device)].to(x))


def _constants(on: Hooks, which: Tensor, values: Tensor, rows: Tensor | None, x: Tensor) -> Tensor:
    """x [T, N] with these values of these neurons at the rows, or at each sequence's last position."""
    sequences, length = on.shapes[_FIRST][:2]
    if len(x) != sequences * length:
        raise ModelError(
            f"patch: neurons have {len(x)} rows of {sequences * length} tokens; use a smaller max_tokens, or "
            "leave tiled_mlp out"
        )
    rows = torch.arange(length - 1, len(x), length) if rows is None else rows
    rows, which = rows.to(x.device), _within(which, x, "neurons")
    out = x.clone()
    out[rows[:, None], which] = values.to(x)
    return out


def _within(which: Tensor, x: Tensor, name: str) -> Tensor:
    if int(which.min()) < 0 or int(which.max()) >= x.shape[1]:
        raise ModelError(
            f"patch: {name}: neurons {int(which.min())} to {int(which.max())} are asked for, and the layer "
            f"has {x.shape[1]}"
        )
    return which.to(x.device)


@torch.no_grad()
def record(
    policy: Policy,
    places: Places,
    parts: Cut,
    folder: Path,
    console: Console | None = None,
    label: str = "record",
) -> list[Path]:
    """Of each pack a safetensors file in the folder, in the packs' order: "embedding", "attention.{l}" and
    "mlp.{l}" [T, D] as the modules give them, and but for a mixture of experts "neurons.{l}" [T, N]; of all
    rows, prompts and padding too, in the dtype they have. One pack's are in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    out: list[Path] = []
    with make_progress(console or Console(quiet=True)) as bar:
        task = bar.add_task(label, total=len(parts), unit="packs", info="")
        for number, part in enumerate(parts):
            batch = policy.pack(part).to(policy.device)
            kept: dict[str, Tensor] = {}
            with _recording(places, kept):
                policy.inside(partial(policy.hidden, batch))
            out.append(folder / f"{number:05d}.safetensors")
            save_file(kept, out[-1])
            bar.update(task, advance=1)
    return out


@contextmanager
def _recording(places: Places, kept: dict[str, Tensor]) -> Iterator[None]:
    def keep(name: str, x: Tensor) -> None:
        kept[name] = x.to("cpu", copy=True).contiguous()

    with hooks() as on:
        on.before(places.first, "the embedding", partial(keep, "embedding"))
        for number, layer in enumerate(places.layers):
            where = f"layer {number}: the"
            on.after(layer.attention, f"{where} attention", partial(keep, f"attention.{number}"))
            if layer.last is not None and not places.experts:
                on.before(layer.last, f"{where} neurons", partial(keep, f"neurons.{number}"))
            on.after(layer.mlp, f"{where} MLP", partial(keep, f"mlp.{number}"))
        yield


class _Record(Mapping[str, Tensor]):
    """A record's tensors, each read when it is asked for."""

    def __init__(self, file: Any) -> None:
        self._file, self._names = file, list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        found: Tensor = self._file.get_tensor(name)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def recorded(path: Path) -> Mapping[str, Tensor]:
    """A file of `record`, read a tensor at a time, when a patch needs it."""
    return _Record(safe_open(path, "pt"))


def bytes_a_token(places: Places, policy: Policy) -> int:
    """Of a record on disk, at most: activations are in the dtype of the computation, and what comes of the
    embedding or of a norm may be in that of the weights."""
    D, size = policy.head_size[1], policy.dtype.itemsize
    widest: int = max(size, policy.core.get_input_embeddings().weight.dtype.itemsize)
    total = D * widest
    for layer in places.layers:
        total += 2 * D * (size if layer.post_norm is None else widest)
        total += 0 if places.experts else neurons_of(layer) * size
    return total
