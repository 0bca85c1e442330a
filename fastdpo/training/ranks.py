"""A run on several GPUs: what does not work there, whether the ranks see the same, and how the model lies."""

import math
import platform
from collections.abc import Callable

import torch
from rich.console import Console
from rich.markup import escape

from fastdpo.console.formatting import gigabytes
from fastdpo.distributed.world import World
from fastdpo.errors import ConfigError, DataError
from fastdpo.files.installed import versions
from fastdpo.model.policy import Policy
from fastdpo.records import Groups
from fastdpo.training.checkpoint import Checkpoint
from fastdpo.training.job import Job, check_ranks
from fastdpo.training.resume import rows_digest

_PACKAGES = ("fastdpo", "torch", "transformers", "peft", "safetensors")


def quiet() -> Console:
    """Of the ranks that do not speak; their libraries say errors alone."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    return Console(quiet=True)


def check_alike(world: World) -> None:
    """Raises ConfigError where ranks run other versions."""
    if world.size == 1:
        return
    mine = {"python": platform.python_version(), **versions(*_PACKAGES)}
    for rank, other in enumerate(world.gather(mine)):
        if differ := sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name)):
            name = differ[0]
            raise ConfigError(
                f"rank {rank} has {name} {other.get(name)}, rank {world.rank} {mine.get(name)}: all nodes "
                "need the same versions"
            )


def check_same_rows(world: World, *sets: Groups) -> None:
    """Raises DataError where ranks have other rows."""
    if world.size == 1:
        return
    digest = rows_digest(*sets)
    for rank, (other, node) in enumerate(world.gather((digest, platform.node()))):
        if other != digest:
            raise DataError(
                f"data: rank {rank} on {node} reads other rows than rank {world.rank} on {platform.node()}; "
                "give all nodes the same files"
            )


def agree(policy: Policy) -> None:
    """Makes what a step is cut by the same on all ranks, whatever each one's own kernels would allow."""
    world = policy.world
    if world.size > 1:
        all_share = world.min(policy.share) == 1
        if policy.share and not all_share:
            policy.set_sharing(False)
        most = world.min(policy.max_scored or math.inf)
        policy.max_scored = None if math.isinf(most) else int(most)


def placed(world: World, job: Job, fits: Callable[[], bool | str], console: Console) -> World:
    """The world as the model will lie in it: by the key `shard`, or where that is auto, in parts where all
    weights train and one GPU could not hold them (where fits() says why nobody knows, that is told). Raises
    ConfigError for what parts do not allow."""
    way = job.config.shard
    if world.size == 1 or way is False:
        return world
    if way == "auto":
        is_lora = job.model.lora_rank is not None or job.model.adapter is not None
        found = is_lora or world.told(fits)
        if isinstance(found, str):
            text = f"[yellow]shard: auto keeps all weights on each GPU: {escape(found)}"
            console.print(text, highlight=False, soft_wrap=True)
        if found:
            return world
    check_ranks(job.config, world, sharded=True)
    return world.with_shards(hybrid=way == "hybrid")


def tell_ranks(found: Checkpoint | None, world: World, console: Console) -> None:
    """Says what is different from one GPU, or from the run that goes on."""
    gpus = torch.cuda.device_count()
    if world.size == 1 and gpus > 1:
        console.print(f"one of {gpus} GPUs is used; --gpus {gpus} trains the same steps on all of them")
    ranks = found.state.get("ranks", 1) if found else world.size
    if ranks != world.size:
        console.print(
            f"[yellow]the run had {ranks} processes, now {world.size}: the same steps on the same rows, "
            "equal but for rounding",
            highlight=False,
        )
    mine = (0, "no GPU")
    if gpus:
        memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        mine = (memory, torch.cuda.get_device_name())
    if world.size > 1:
        every = world.gather(mine)
        if len({(name, round(memory / 1e9)) for memory, name in every}) > 1:
            least, name = min(every)
            console.print(
                f"[yellow]the GPUs are not all alike: the smallest, {name} with {gigabytes(least)}, has to "
                "hold a microbatch of max_tokens, and the slowest sets the pace"
            )
