"""Checkpoints: `checkpoints/step-N/`, each whole or not there, each checked before it is used.

    weights.safetensors     the trained parameters, by name, in their training dtype
    optimizer.safetensors   the optimizer's state, by parameter number and name: "0.exp_avg", ...
    state.json              where the run stands, digests of the two, and its own digest

No pickle anywhere. A learning-rate schedule is a function of the step, so it needs no state.
"""

import json
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastdpo.errors import ConfigError, TrainingError
from fastdpo.files import durable
from fastdpo.optim.stepping import WeightOptimizer

FORMAT = 1
TENSOR_FILES = ("weights.safetensors", "optimizer.safetensors")


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
        saved = load_file(self.folder / "weights.safetensors")
        wanted = _trained(policy)
        shapes = lambda tensors: {(name, tuple(t.shape)) for name, t in tensors.items()}
        if odd := shapes(saved) ^ shapes(wanted):
            name, shape = min(odd)
            raise TrainingError(f"{self.folder} holds other weights than this run trains: {name} {shape}")
        with torch.no_grad():
            for name, parameter in wanted.items():
                parameter.copy_(saved[name])

    def load_optimizer(self, optimizer: WeightOptimizer) -> None:
        optimizer.load(load_file(self.folder / "optimizer.safetensors"), self.steps)


def save(folder: Path, policy, optimizer, state: dict) -> int:
    """Writes a checkpoint, in place of one of the same name; returns its size in bytes."""
    weights = {name: p.detach().contiguous() for name, p in _trained(policy).items()}
    with durable.new_folder(folder) as part:
        for name, tensors in zip(TENSOR_FILES, (weights, _apart(optimizer.tensors()))):
            save_file(tensors, part / name)
        digests = {name: durable.file_digest(part / name) for name in TENSOR_FILES}
        state = {"format": FORMAT, **state, "digests": digests}
        text = json.dumps({"digest": durable.json_digest(state), "state": state}, indent=1)
        (part / "state.json").write_text(text, encoding="utf-8")
        return sum(path.stat().st_size for path in part.iterdir())


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
