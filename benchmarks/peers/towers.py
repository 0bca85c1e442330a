"""Training with images, watched from outside: what goes through a vision tower, and what pixels cost."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from fastdpo.data.packing import Packing
from fastdpo.records import Groups, PackedGroups
from fastdpo.reference.fill import ReferenceTable
from fastdpo.reference.fingerprint import reference_fingerprint


class TowerWatch:
    """Counts the images that go through these models' towers: with gradients, and without: a reference's."""

    def __init__(self, *models):
        self.counts = {"images": 0, "reference_images": 0}
        for model in models:
            tower = next(module for name, module in model.named_modules() if name.endswith("visual"))
            tower.register_forward_pre_hook(self.see, with_kwargs=True)

    def see(self, tower, arguments, named) -> None:
        grid = named["grid_thw"] if "grid_thw" in named else arguments[1]
        self.counts["images" if torch.is_grad_enabled() else "reference_images"] += len(grid)

    def taken(self) -> dict:
        """The counts since they were asked for last."""
        found, self.counts = self.counts, dict.fromkeys(self.counts, 0)
        return found


class Waits:
    """Stands in for a stage's `microbatches`: how long each one was waited for."""

    def __init__(self, stage):
        self.made, self.seconds = stage.microbatches, 0.0
        stage.microbatches = self

    def __call__(self, groups: Groups) -> "Waited":
        return Waited(self, self.made(groups))

    def taken(self) -> float:
        """Seconds since they were asked for last."""
        found, self.seconds = self.seconds, 0.0
        return found


@dataclass(frozen=True)
class Waited:
    """Those of one step."""

    waits: Waits
    packing: Packing

    def __len__(self) -> int:
        return len(self.packing)

    def __iter__(self) -> Iterator[PackedGroups]:
        begun = time.perf_counter()
        for batch in self.packing:
            self.waits.seconds += time.perf_counter() - begun
            yield batch
            begun = time.perf_counter()


class ImageWatch:
    """fastdpo's stage, watched; made when it has its reference, which `fill` makes once more, warm."""

    def __init__(self, stage, steps: list[Groups], fill: Callable[[], ReferenceTable]):
        begun = time.perf_counter()
        batches = list(stage.microbatches(steps[0]))
        making = time.perf_counter() - begun
        self.facts = {
            "making_seconds": making,
            "reference": reference_seconds(stage.policy, fill),
            "tower": tower_memory(stage.policy, batches[0]),
        }
        self.tower, self.waits = TowerWatch(stage.policy.core), Waits(stage)

    def of_step(self, idle, seconds: float) -> dict:
        """Of a step of so many seconds, with its speed.Idle."""
        return {"idle_share": idle.share(seconds), "wait_seconds": self.waits.taken(), **self.tower.taken()}


def reference_seconds(policy, fill: Callable[[], ReferenceTable]) -> dict:
    """What its rows took, and what is done once in a run, however many these are: all weights are hashed."""
    begun = time.perf_counter()
    reference_fingerprint(policy, fresh_lora=policy.core is not policy.model)
    once = time.perf_counter() - begun
    account = fill().account
    told = {"responses": account["misses"], "tokens": account["tokens"]}
    return told | {"seconds": account["seconds"] - once, "once_seconds": once}


def tower_memory(policy, batch: PackedGroups) -> dict:
    """The tower on a microbatch's images, alone: whether a backward would need anything of it and, on a GPU,
    the most bytes that it takes and those that are left, which are what it gives."""
    pixels, grid = (batch.images[name].to(policy.device) for name in ("pixel_values", "image_grid_thw"))
    cuda = policy.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with policy.autocast():
        given = policy.core.base_model.get_image_features(pixels, image_grid_thw=grid)
    told = {"images": len(grid), "tokens": batch.input_tokens, "kept": given.pooler_output[0].requires_grad}
    if cuda:
        told["most_bytes"] = torch.cuda.max_memory_allocated() - before
        told["left_bytes"] = torch.cuda.memory_allocated() - before
    return told
