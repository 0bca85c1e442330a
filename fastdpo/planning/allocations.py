"""Every allocation of a step: how large, whose, when it came and went.

torch.distributed._tools.mem_tracker.MemTracker tells parameters, gradients, activations and temporaries
apart as they are made. Whether a tensor of the forward is kept for the backward is known only at the
forward's end, so this one keeps a log, and reads owners and peaks off it afterwards.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WEIGHTS = "weights"
ADAPTERS = "adapters"
COPIES = "weight copies"  # in the compute dtype, or dequantised
GRADIENTS = "gradients"
STATES = "optimizer states"
SAVED = "saved activations"
LAYER = "layer workspace"
ATTENTION = "attention workspace"
HEAD = "head buffers"
BATCH = "microbatch"
CACHE = "generation's cache"
LOGITS = "logits of a token"
REWARD = "reward model"
_OF_ROUNDS = (CACHE, LOGITS, REWARD)
OWNERS = (WEIGHTS, ADAPTERS, COPIES, GRADIENTS, STATES, SAVED, LAYER, ATTENTION, HEAD, BATCH, *_OF_ROUNDS)

CUDA_BLOCK = 512  # bytes: CUDACachingAllocator's kMinBlockSize, to whose multiples it rounds a request
CPU_BLOCK = 64  # bytes: c10's alignment on CPUs
HOST = "meta"  # the device of fake tensors that stand for the host's memory


@dataclass(slots=True)
class Block:
    """One allocation."""

    size: int
    owner: str | None  # None until the step is over: saved or workspace


@dataclass(frozen=True)
class Peak:
    """The most that was allocated at once while the step was at one place."""

    where: str
    bytes: dict[str, int]  # by owner

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


class Tracker(TorchDispatchMode):
    """Enter it inside a FakeTensorMode (or around real tensors: it counts both)."""

    def __init__(self, block: int = CUDA_BLOCK):
        super().__init__()
        self.block, self.where = block, ""
        self._log: list[tuple[Block, int, str]] = []  # (whose, bytes that came or went, where)
        self._live: dict[int, tuple[Block, weakref.ref]] = {}  # by storage
        self._owner: str | None = None  # of what is made now
        # operator -> (a function of its arguments: bytes it takes while it runs, whose these are)
        self.inside: dict = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.inside:
            size, owner = self.inside[func]
            self._goes(self._comes(size(*args, **(kwargs or {})), owner))
        copies = func is torch.ops.aten._to_copy.default and self._owner_of(args[0]) in (WEIGHTS, ADAPTERS)
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor, COPIES if copies else self._owner)
        return out

    def add(self, tensor: torch.Tensor, owner: str | None = None) -> None:
        """Counts a tensor's storage from now until it is freed, unless it is counted already."""
        if tensor.device.type == HOST:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live and storage.nbytes():
            gone = weakref.ref(storage, lambda _: self._goes(self._live.pop(key)[0]))
            self._live[key] = self._comes(storage.nbytes(), owner), gone

    def _comes(self, size: int, owner: str | None) -> Block:
        block = Block(-(-size // self.block) * self.block, owner)
        self._log.append((block, block.size, self.where))
        return block

    def _goes(self, block: Block) -> None:
        self._log.append((block, -block.size, self.where))

    def _owner_of(self, tensor) -> str | None:
        found = self._live.get(tensor.untyped_storage()._cdata)
        return found and found[0].owner

    def own(self, tensor: torch.Tensor, owner: str) -> None:
        """Says whose a counted tensor turned out to be."""
        self._live[tensor.untyped_storage()._cdata][0].owner = owner

    @contextmanager
    def owned_by(self, owner: str | None) -> Iterator[None]:
        """Inside, whatever is made is this owner's; None: what the log will tell."""
        before, self._owner = self._owner, owner
        try:
            yield
        finally:
            self._owner = before

    def settle(self, owner: str) -> None:
        """What is alive and nobody's becomes this owner's; what was nobody's and is gone stays so."""
        for block, _ in self._live.values():
            block.owner = block.owner or owner

    def mark(self) -> int:
        """Where the log stands."""
        return len(self._log)

    def since(self, mark: int, out: torch.Tensor) -> list[tuple[Block | None, int]] | None:
        """What has come since then, and what of it has gone, in order; None in the place of `out`, and alone
        where more than that has stayed."""
        log = self._log[mark:]
        came = {id(block) for block, change, _ in log if change > 0}
        left = came - {id(block) for block, change, _ in log if change < 0}
        stays, _ = self._live.get(out.untyped_storage()._cdata, (None, None))
        if left != {id(stays)}:
            return None
        return [(None if one is stays else one, change) for one, change, _ in log if id(one) in came]

    def again(self, log: list[tuple[Block | None, int]], make: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The same once more; make() is what is like the `out` of then, which is returned."""
        blocks: dict[int, Block] = {}
        for one, change in log:
            if one is None:
                made = make()
            elif change > 0:
                blocks[id(one)] = self._comes(one.size, one.owner)
            else:
                self._goes(blocks.pop(id(one)))
        return made

    def peaks(self) -> list[Peak]:
        """The peak at each place of the step, in the order of the peaks. Nobody's is workspace."""
        now, total = dict.fromkeys(OWNERS, 0), 0
        highest: dict[str, tuple[int, Peak]] = {}
        for block, change, where in self._log:
            now[block.owner or LAYER] += change
            total += change
            if where not in highest or total > highest[where][0]:
                highest.pop(where, None)
                highest[where] = total, Peak(where, dict(now))
        return [peak for _, peak in highest.values()]
