"""Checkpoints: `checkpoints/step-N/`, each whole or not there, each checked before it is used.

    weights.safetensors     the trained parameters, by name, in their training dtype
    optimizer.safetensors   the optimizer's state, by parameter number and name: "0.exp_avg", ...
    state.json              where the run stands, digests of the two, and its own digest

No pickle anywhere. A learning-rate schedule is a function of the step, so it needs no state. Of several ranks
the first one writes. Where shards come to more than SPLIT_FROM bytes, each rank writes its own as
weights-00001-of-00004.safetensors, ...; any number of ranks reads them.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastdpo.distributed.shards import cut_of, like, part, whole
from fastdpo.errors import ConfigError, TrainingError
from fastdpo.files import durable
from fastdpo.optim.stepping import WeightOptimizer

FORMAT = 1
SPLIT_FROM = 8e9  # bytes


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and found whole; its tensors are still on the disk."""

    folder: Path
    state: dict

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def step(self) -> int:
        """Optimizer steps of the whole run."""
        return self.state["first"] + self.steps

    @property
    def steps(self) -> int:
        """Optimizer steps of its stage."""
        return self.state["progress"]["steps"]

    def load_weights(self, policy) -> None:
        """Copies the saved parameters into the policy's. Raises TrainingError where they do not fit."""
        with self.tensors("weights") as saved:
            wanted = _trained(policy)
            shapes = {(name, tuple(t.shape)) for name, t in wanted.items()}
            if odd := {(name, saved.shape(name)) for name in saved.names} ^ shapes:
                name, shape = min(odd)
                raise TrainingError(f"{self.folder} holds other weights than this run trains: {name} {shape}")
            with torch.no_grad():
                for name, parameter in wanted.items():
                    part(parameter).copy_(part(like(parameter, partial(saved.read, name))))

    def load_optimizer(self, optimizer: WeightOptimizer) -> None:
        with self.tensors("optimizer") as saved:
            found = {}
            for name in saved.names:
                weight = optimizer.weights[int(name.split(".")[0])]
                as_weight = saved.shape(name) == tuple(weight.shape)
                found[name] = like(weight, partial(saved.read, name)) if as_weight else saved.read(name)
            optimizer.load(found, self.steps)

    @contextlib.contextmanager
    def tensors(self, kind: str) -> Iterator["Tensors"]:
        """Those of the weights or of the optimizer's states, read when they are asked for. Raises
        TrainingError where another rank's node does not have the files."""
        names = sorted(name for name in self.state["digests"] if name.startswith(kind))
        with contextlib.ExitStack() as stack:
            try:
                files = [stack.enter_context(safe_open(self.folder / n, framework="pt")) for n in names]
            except FileNotFoundError:
                raise TrainingError(
                    f"{self.folder} is not on this node: to go on with a run on several nodes, output_dir "
                    "has to be on a file system that all of them see"
                ) from None
            yield Tensors(files)


class Tensors:
    """The tensors in safetensors files, in which each may lie in parts along its first dimension."""

    def __init__(self, files: list):
        self.files: dict[str, list] = {}  # of each tensor, the files with its parts
        for file in files:
            for name in file.keys():
                self.files.setdefault(name, []).append(file)
        self.names = list(self.files)

    def shape(self, name: str) -> tuple[int, ...]:
        shapes = [file.get_slice(name).get_shape() for file in self.files[name]]
        rows = [sum(shape[0] for shape in shapes)] if shapes[0] else []
        return (*rows, *shapes[0][1:])

    def read(self, name: str, first: int | None = None, last: int | None = None) -> Tensor:
        """All of it, or these rows."""
        files = self.files[name]
        if first is None or last is None:
            parts = [file.get_tensor(name) for file in files]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        parts = []
        for piece in (file.get_slice(name) for file in files):
            rows = piece.get_shape()[0]
            parts.append(piece[min(max(first, 0), rows) : min(max(last, 0), rows)])
            first, last = first - rows, last - rows
        return torch.cat(parts)


def save(folder: Path, policy, optimizer, state: dict) -> int:
    """Writes a checkpoint, in place of one of the same name; returns its size in bytes, on the first rank.
    All ranks of a world have to call it, and none returns before it is there."""
    world = policy.world
    kinds = {"weights": {name: p.detach() for name, p in _trained(policy).items()}}
    kinds["optimizer"] = optimizer.tensors()
    size = sum(t.numel() * t.element_size() for tensors in kinds.values() for t in tensors.values())
    split = world.sharded and size > SPLIT_FROM
    with durable.new_folder(folder) if world.first else _others(folder) as place:
        world.wait()  # for the folder
        for kind, tensors in kinds.items():
            if split:
                _save_part(place, kind, tensors, world.rank)
            else:
                _save_whole(place / f"{kind}.safetensors", tensors, world.first)
        world.wait()  # for the files
        if world.first:
            size = _seal(place, state)
    world.wait()  # until it has its name: a rank that ends here has to know of it
    return size


def _others(folder: Path) -> contextlib.AbstractContextManager[Path]:
    """The folder that the first rank makes."""
    return contextlib.nullcontext(durable.part_of(folder))


def _seal(folder: Path, state: dict) -> int:
    """Writes the state with the digests of what lies beside it; returns the bytes of all."""
    digests = {path.name: durable.file_digest(path) for path in sorted(folder.iterdir())}
    state = {"format": FORMAT, **state, "digests": digests}
    text = json.dumps({"digest": durable.json_digest(state), "state": state}, indent=1)
    (folder / "state.json").write_text(text, encoding="utf-8")
    return sum(path.stat().st_size for path in folder.iterdir())


def _save_whole(path: Path, tensors: dict[str, Tensor], writes: bool) -> None:
    """Gathers one tensor after the other into the host's memory of the rank that writes."""
    gathered = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if writes:
            gathered[name] = full.cpu() if full is not tensor else full
    if writes:
        save_file(_apart(gathered), path)


def _save_part(folder: Path, kind: str, tensors: dict[str, Tensor], rank: int) -> None:
    """Writes what this rank holds of shards, where it is the first to hold that (HSDP); the first rank also
    what all of them hold."""
    number, of = max(map(cut_of, tensors.values()), key=lambda cut: cut[1], default=(0, 1))
    mine = {name: part(t) for name, t in tensors.items() if cut_of(t)[1] > 1 or rank == 0}
    if number == rank:
        held = {name: tensor for name, tensor in mine.items() if tensor.numel()}
        save_file(_apart(held), folder / f"{kind}-{number + 1:05}-of-{of:05}.safetensors")


def load(folder: Path) -> Checkpoint:
    """Raises ValueError, saying what is wrong, for a checkpoint that is not as it was written, and
    ConfigError for one of a newer format."""
    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        state = content["state"]
        if content["digest"] != durable.json_digest(state):
            raise ValueError("state.json was changed after it was written")
        if state["format"] > FORMAT:
            raise ConfigError(
                f"resume: {folder} has format {state['format']}, of a newer fastdpo; this one knows {FORMAT}"
            )
        for name, digest in state["digests"].items():
            if durable.file_digest(folder / name) != digest:
                raise ValueError(f"{name} was changed after it was written")
    except (FileNotFoundError, KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return Checkpoint(folder, state)


def attempt(folder: Path) -> tuple[Checkpoint | None, str]:
    """(the checkpoint, or None where it is not as it was written; what is wrong then)."""
    try:
        return load(folder), ""
    except ValueError as error:
        return None, str(error)


def newest(folder: Path) -> tuple[Checkpoint | None, dict[str, str]]:
    """(the newest whole checkpoint, the newer ones that were passed over and why). Inside a later stage it
    needs the weights that the stage started from, so the checkpoint with those must be whole too."""
    passed: dict[str, str] = {}
    for path in reversed(found(folder)):
        why = ""
        try:
            checkpoint = load(path)
            if start := checkpoint.state["start"]:
                why = f"{start}, which it needs, cannot be used: "
                load(folder / start)
            return checkpoint, passed
        except ValueError as error:
            passed[path.name] = f"{why}{error}"
    return None, passed


def found(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    numbered = (path for path in folder.glob("step-*") if path.name[5:].isdigit())
    return sorted(numbered, key=lambda path: int(path.name[5:]))


def set_aside(folder: Path, names: Iterable[str]) -> None:
    """Renames checkpoints that cannot be used to damaged-NAME, in place of earlier ones of that name."""
    for name in names:
        aside = folder / f"damaged-{name}"
        shutil.rmtree(aside, ignore_errors=True)
        (folder / name).rename(aside)


def prune(folder: Path, limit: int, keep: set[str | None]) -> None:
    """Deletes all but the newest `limit` checkpoints, those in `keep`, and those whose weights the stages
    of any of these started from."""
    paths = found(folder)
    kept = {path.name for path in paths[-limit:]} | keep
    kept |= {_start_of(path) for path in paths if path.name in kept}
    for path in paths:
        if path.name not in kept:
            shutil.rmtree(path)


def _start_of(path: Path) -> str | None:
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))["state"]["start"]
    except (ValueError, KeyError, TypeError):
        return None  # damaged: `newest` will say so, should it come to that


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """safetensors writes no memory twice, and bitsandbytes has one table for all weights."""
    seen, out = set(), {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        out[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return out


def _trained(policy) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
