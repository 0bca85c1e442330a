"""What the backward needs of the backbone waits for it in the host's memory.

A pair of saved-tensor hooks around the backbone's forward. With checkpointed layers these see each layer's
input and nothing that is recomputed; without, everything. On CUDA the copies run on a stream of their own,
beside the computation, into pinned memory, and come back before the backward asks for them.

Prior art, with thanks: torchtune's OffloadActivations, which TRL carries on, and torch's save_on_cpu (on the
computing stream). Unlike them this moves storages, not tensors: views of one storage, such as what q, k and v
save of their common input, go once and come back as views of one storage; and the low-precision copies that
autocast makes of weights do not go at all, they are made again.
"""

import contextlib
import weakref
from collections import deque
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MIN_BYTES = 1 << 20  # of a storage; what takes less time to copy than to ask for a copy stays
AHEAD = 2  # storages that may be on their way at once, in the forward and in the backward
HOST = "cpu"  # the device of the copies


class Offloading:
    """Hooks on a module: what its forward saves for the backward is moved to the host's memory."""

    def __init__(self, module: torch.nn.Module):
        self._entered: list[contextlib.ExitStack] = []
        self._handles = (
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, module, args) -> None:
        self._entered.append(contextlib.ExitStack())
        if torch.is_grad_enabled():
            one = Moves(module)
            hooks = torch.autograd.graph.saved_tensors_hooks(one.pack, one.unpack)
            self._entered[-1].enter_context(hooks)

    def _leave(self, module, args, out) -> None:
        self._entered.pop().close()

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


class _Moved:
    """A storage as a flat tensor: on the device, in the host's memory, or both while it is copied."""

    def __init__(self, number: int, device: Tensor):
        self.number = number
        self.device: Any = device
        self.host: Any = None
        self.event: Any = None  # of a copy to the device that nobody has waited for

    def arrive(self) -> None:
        """The computing stream waits for the copy to the device."""
        if self.event is not None:
            torch.cuda.current_stream(self.device.device).wait_event(self.event)
            self.event = None

    def __del__(self):
        self.arrive()  # or the device's memory would be given away while it is being written


class _Cast(NamedTuple):
    """What autocast made of a parameter."""

    parameter: Tensor
    dtype: torch.dtype


class _View(NamedTuple):
    """What the graph keeps in a tensor's place."""

    of: _Moved | _Cast
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


class Moves:
    """What one forward has moved. The hooks keep it alive for as long as the graph needs it."""

    def __init__(self, module: torch.nn.Module):
        self.parameters = {id(p): p for p in module.parameters()}
        self.device = next(module.parameters()).device
        self.resident = {_storage_key(t) for t in (*module.parameters(), *module.buffers())}
        self.stream = _side_stream(self.device) if self.device.type == "cuda" else None
        # (storage, dtype, version) -> _Moved
        self.known: weakref.WeakValueDictionary[tuple, _Moved] = weakref.WeakValueDictionary()
        self.order: list[weakref.ref] = []
        self.leaving: deque = deque()  # (event, the device's tensor, its version, weakref of its _Moved)

    def pack(self, tensor: Tensor):
        of = self._cast(tensor)
        tensor = tensor.detach()  # an output that kept its own graph would never be freed
        if of is None and not self._is_worth_it(tensor):
            return tensor
        return _View(of or self._moved(tensor), tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(self, packed) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        if isinstance(packed.of, _Cast):
            source = packed.of.parameter.detach().to(packed.of.dtype)
        else:
            source = self._returned(packed.of)
        return source.as_strided(packed.size, packed.stride, packed.offset)

    def _returned(self, wanted: _Moved) -> Tensor:
        """A moved storage, on the device again; the ones that are asked for next are on their way."""
        while self.leaving:  # what the forward saved last has not left, and stays
            self._let_go(stays=True)
        self._bring(wanted)
        wanted.arrive()
        earlier = (self.order[i]() for i in range(wanted.number - 1, -1, -1))
        alive = (moved for moved in earlier if moved is not None)
        for moved, _ in zip(alive, range(AHEAD)):
            self._bring(moved)
        return wanted.device

    def _cast(self, tensor: Tensor) -> _Cast | None:
        """How to make a weight's copy in the autocast dtype again, where the tensor is (a view of) one."""
        source: Any = tensor._base if tensor._is_view() else tensor
        made_by = source.grad_fn
        if made_by is None or made_by.name() != "ToCopyBackward0":
            return None
        parameter: Any = getattr(made_by.next_functions[0][0], "variable", None)
        if id(parameter) not in self.parameters:
            return None
        return _Cast(parameter, tensor.dtype)

    def _is_worth_it(self, tensor: Tensor) -> bool:
        if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
            return False
        if tensor.device != self.device or tensor.untyped_storage().nbytes() < MIN_BYTES:
            return False
        return _storage_key(tensor) not in self.resident

    def _moved(self, tensor: Tensor) -> _Moved:
        # The weak reference keeps the address from being used again, so that a key means one storage.
        key = (StorageWeakRef(tensor.untyped_storage()), tensor.dtype, tensor._version)
        moved = self.known.get(key)
        if moved is None:
            moved = self.known[key] = self._send(tensor)
        return moved

    def _send(self, tensor: Tensor) -> _Moved:
        flat = tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.itemsize,), (1,), 0)
        moved = _Moved(len(self.order), flat)
        self.order.append(weakref.ref(moved))
        moved.host = flat.new_empty(flat.shape, device=HOST, pin_memory=self.stream is not None)
        event = self._copy(moved.host, flat)
        self.leaving.append((event, flat, flat._version, weakref.ref(moved)))
        if len(self.leaving) > AHEAD:
            self._let_go()
        return moved

    def _bring(self, moved: _Moved) -> None:
        """Starts the copy to the device, unless it is there."""
        if moved.device is None:
            # From the computing stream's pool, where it is freed too.
            moved.device = moved.host.new_empty(moved.host.shape, device=self.device)
            moved.event = self._copy(moved.device, moved.host)
            moved.host = None

    def _copy(self, to: Tensor, source: Tensor):
        """Copies once what was asked for until now is computed; returns an event on CUDA."""
        if self.stream is None:
            to.copy_(source)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def _let_go(self, stays: bool = False) -> None:
        """The oldest that is leaving has left: its memory on the device is free, unless it stays. What was
        changed in place since it was saved cannot stay."""
        event, flat, version, ref = self.leaving.popleft()
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)
        moved = ref()
        if moved is not None and stays and flat._version == version:
            moved.host = None
        elif moved is not None:
            moved.device = None

    def __del__(self):
        while self.leaving:
            self._let_go()


def _storage_key(tensor: Tensor) -> int | None:
    """A number of a living storage; None where a tensor subclass has none of its own."""
    return None if is_traceable_wrapper_subclass(tensor) else tensor.untyped_storage()._cdata


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
