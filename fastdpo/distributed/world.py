"""The processes that train one model, a GPU each (a rank), and what they tell one another; alone, itself."""

import contextlib
import ctypes
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastdpo.distributed.ending import Ending
from fastdpo.errors import ConfigError

T = TypeVar("T")
FOREVER = timedelta(days=7)  # whoever waits is told when the others end; a tokenised data set may take hours
MEETING = timedelta(minutes=5)  # that all processes may take to start
BUCKET = 1 << 26  # elements of gradients that are summed at once: 256 MB


@dataclass(frozen=True)
class World:
    """One rank's view. Of size 1 every method is the identity, and torch.distributed is not touched.

    What is on the host (numbers, objects) goes through gloo, tensors of a GPU through nccl. All methods but
    the properties are collective: every rank has to call them, in the same order.
    """

    rank: int = 0
    size: int = 1
    local: int = 0  # this rank's number on its node
    nodes: int = 1
    sharded: bool = False  # each rank holds a part of every weight; else all of them
    mesh: DeviceMesh | None = None  # of shards
    group: Any = None  # of the host's tensors
    ending: Ending = field(default_factory=Ending)

    @property
    def first(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def with_shards(self, hybrid: bool) -> "World":
        """This world, whose ranks shard their model: over all of them, or over those of each node, which the
        nodes then replicate (HSDP)."""
        shape: tuple[int, ...] = (self.nodes, self.size // self.nodes) if hybrid else (self.size,)
        names = ("replicate", "shard")[-len(shape) :]
        kind = "cuda" if torch.cuda.is_available() else "cpu"
        return replace(self, sharded=True, mesh=init_device_mesh(kind, shape, mesh_dim_names=names))

    def gather(self, value: T) -> list[T]:
        """Each rank's value, in the order of the ranks; its tensors have to be the host's."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def told(self, make: Callable[[], T]) -> T:
        """What it returns on rank 0, where alone it is called."""
        if self.size == 1:
            return make()
        box = [make() if self.first else None]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]  # type: ignore[return-value]

    def max(self, number: float) -> float:
        """The largest of the ranks' numbers."""
        return self._reduced([number], dist.ReduceOp.MAX)[0]

    def min(self, number: float) -> float:
        return -self.max(-number)

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The sums over ranks, in fp64."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def _reduced(self, numbers: Sequence[float], op) -> list[float]:
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(tensor, op=op, group=self.group)
        return tensor.tolist()

    def sum_of(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on their device."""
        return self._reduced_tensor(tensor, dist.ReduceOp.SUM)

    def max_of(self, tensor: Tensor) -> Tensor:
        return self._reduced_tensor(tensor, dist.ReduceOp.MAX)

    def _reduced_tensor(self, tensor: Tensor, op) -> Tensor:
        if self.size > 1:
            tensor = tensor.detach().clone()
            dist.all_reduce(tensor, op=op)
        return tensor

    @contextlib.contextmanager
    def first_then_others(self) -> Iterator[None]:
        """Inside, the first rank of each node works alone, and then the others, who find what it has left."""
        if self.local:
            self.wait()
        yield
        if not self.local:
            self.wait()

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """Inside, the ranks of a node work one after the other: what takes the host's memory does so once."""
        for _ in range(self.local):
            self.wait()
        yield
        for _ in range(self.size // self.nodes - self.local):
            self.wait()

    def wait(self) -> None:
        """For all ranks to be here."""
        if self.size > 1:
            dist.barrier(group=self.group)

    @torch.no_grad()
    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Adds up the gradients of replicas, in fp32 (fp64 of fp64): one all-reduce of each bucket. Shards
        have theirs from the backward. A weight that no rank has a gradient of keeps none."""
        if self.size == 1 or self.sharded:
            return
        has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.uint8)
        dist.all_reduce(has, op=dist.ReduceOp.MAX, group=self.group)
        some = [p for p, wanted in zip(parameters, has.tolist()) if wanted]
        for p in some:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in buckets(some):
            gradients = [p.grad for p in bucket if p.grad is not None]
            dtype = torch.promote_types(gradients[0].dtype, torch.float32)
            if len(gradients) == 1 and gradients[0].dtype == dtype and gradients[0].is_contiguous():
                dist.all_reduce(gradients[0])
                continue
            flat = torch.cat([g.reshape(-1).to(dtype) for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients])):
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def make_equal(self, parameters: Sequence[Tensor]) -> None:
        """Gives all ranks the first one's values of replicas."""
        for p in parameters if self.size > 1 and not self.sharded else ():
            dist.broadcast(p.detach(), src=0)


ALONE = World()
_joined: list[World] = []  # the one that this process is in
_runs = itertools.count()
_PR_SET_PDEATHSIG = 1


def buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbours of one dtype with at most BUCKET elements together, or one larger alone."""
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for p in parameters:
        if bucket and (size + p.numel() > BUCKET or p.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


@contextlib.contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun has started this process in; without it, this process alone. An error on one
    rank ends all, and is raised on one: on the others it is SystemExit, as there is nothing more to say."""
    size = int(os.environ.get("WORLD_SIZE") or 1)
    if size == 1 or _joined:
        yield _joined[0] if _joined else ALONE
        return
    if dist.is_initialized():
        raise ConfigError(
            "torch.distributed is initialised already: leave init_process_group to fastdpo.train, which "
            "needs gloo beside nccl"
        )
    _joined.append(world := _start(size))
    try:
        yield world
    except BaseException as error:
        cause = world.ending.cause(error)
        world.ending.leave(cause)
        _joined.clear()
        raise cause from (error.__cause__ if cause is error else None)
    _joined.clear()
    dist.destroy_process_group()


def _start(size: int) -> World:
    if "RANK" not in os.environ:
        raise ConfigError(
            f"WORLD_SIZE is {size}, and RANK is not set: start by torchrun, or unset WORLD_SIZE"
        )
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", 0))
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    on_gpu = torch.cuda.is_available()
    if on_gpu and local >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {rank} is the process number {local + 1} of its node, where it sees "
            f"{torch.cuda.device_count()} GPUs: start one process a GPU, and let each see all of them"
        )
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # this one ends where torchrun is killed
    if on_gpu:
        torch.cuda.set_device(local)
    try:
        store, _, _ = next(dist.rendezvous("env://", rank=rank, world_size=size, timeout=MEETING))
    except (RuntimeError, ValueError) as error:  # torch's, and for what the environment does not say
        where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
        raise ConfigError(
            f"rank {rank} finds no meeting point at {where} (MASTER_ADDR:MASTER_PORT): take a free port, and "
            f"start all {size} processes ({str(error).splitlines()[0]})"
        ) from None
    number = next(_runs)  # a second run of a process must not find the first one's keys
    ours, theirs = (dist.PrefixStore(f"{name}/{number}", store) for name in ("fastdpo", "torch"))
    options: dict[str, Any] = {"device_id": torch.device("cuda", local)} if on_gpu else {}
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    dist.init_process_group(backend, store=theirs, rank=rank, world_size=size, timeout=FOREVER, **options)
    group = dist.new_group(backend="gloo", timeout=FOREVER)
    return World(rank, size, local, size // per_node, group=group, ending=Ending(ours, rank, size))
