"""What only a driver could answer, answered for the device of fake_cuda.py."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from unittest import mock

import torch
from fastdpo_kernels import launch, tiles
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.attention import varlen
from transformers.utils import import_utils

from fastdpo.optim import offload as optim_offload
from fastdpo.optim import pieces as optim_pieces
from tests.training.fake_cuda import CUDA, FakeCuda


@contextlib.contextmanager
def fake_cuda(capability: tuple[int, int] = (9, 0)) -> Iterator[FakeCuda]:
    """A device of this capability, for the code that asks torch for one. It is to be entered (`with device:`)
    for what shall run on it."""
    device = FakeCuda()
    with contextlib.ExitStack() as stack:
        for where, names in _replaced(device, capability):
            for name, value in names.items():
                stack.enter_context(mock.patch.object(where, name, value))
        for known in (tiles.tile, tiles.row_kernels, *_known_to_torch()):
            known.cache_clear()
            stack.callback(known.cache_clear)
        yield device


def _known_to_torch() -> list:
    """What varlen attention keeps of a device: which of its kernels run there."""
    return [function for function in vars(varlen).values() if hasattr(function, "cache_clear")]


def _replaced(device: FakeCuda, capability) -> list[tuple]:
    """(where, {name: stand-in}) of what only a driver could answer."""
    ask = FakeTensor.__torch_dispatch__.__func__

    def told(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return torch.device("meta")
        return ask(cls, func, types, args, kwargs or {})

    handlers = fake_tensor._DISPATCH_META_HANDLERS | {
        torch.ops.prim.device.default: lambda args: torch.device("meta")
    }
    cuda = dict(
        is_available=lambda: True,
        is_bf16_supported=lambda *args, **keys: True,
        get_device_capability=lambda *args: capability,
        current_stream=lambda *args: _Stream(device),
        Stream=lambda *args: _Stream(device),
        Event=lambda **keys: None,
        stream=lambda stream: contextlib.nullcontext(),
        synchronize=lambda *args: device.wait("synchronise"),
        is_current_stream_capturing=lambda: False,
        max_memory_allocated=lambda *args: 0,
        _lazy_init=lambda: None,
    )
    inside = dict(
        _DISPATCH_META_HANDLERS=handlers,
        init_gpu_context=lambda device: None,
    )
    executor = SimpleNamespace(submit=device.job, shutdown=lambda **keys: None)
    tensor = dict(
        is_cuda=property(lambda self: self.fake_device.type == "cuda"),
        tolist=lambda self: device.tolist(self),
        __torch_dispatch__=classmethod(told),
    )
    return [
        (torch.cuda, cuda),
        (torch.accelerator, dict(current_stream=cuda["current_stream"])),  # Adam asks it of a CUDA build
        (torch.autograd, dict(_engine_run_backward=device.autocast.backward)),
        (optim_pieces.Pieces, dict(generator=lambda self, seed: None)),  # it would be the device's
        (torch.version, dict(cuda="13.0")),
        (torch.backends.cudnn, dict(version=lambda: 92400)),  # varlen attention asks, from torch 2.15 on
        (fake_tensor, inside),
        (import_utils, dict(is_fake_tensor=lambda value: False)),  # or transformers would take another way
        (FakeTensor, tensor),
        (launch, dict(processors=lambda device: 132)),
        (launch.Launch, dict(run=lambda self: _launched(device, self))),
        (optim_offload, dict(ThreadPoolExecutor=lambda *args, **keys: executor)),
    ]


def _launched(device: FakeCuda, one: launch.Launch) -> None:
    """A Triton kernel only writes to what it is given."""
    for name, value in one.arguments.items():
        on_device = not isinstance(value, Tensor) or value.device == CUDA
        assert on_device, f"{one.kernel.__name__}: {name} is on {value.device}"
    device.launched[one.kernel.__name__] += 1


class _Stream(SimpleNamespace):
    """A stream, or an event on one."""

    def __init__(self, device: FakeCuda):
        super().__init__(device=device)

    def wait_stream(self, other) -> None:
        pass

    wait_event = wait_stream

    def is_capturing(self) -> bool:
        return False

    def record_event(self, event=None) -> "_Stream":
        return _Stream(self.device)

    def query(self) -> bool:
        return True

    def elapsed_time(self, later) -> float:
        return 0.0

    def synchronize(self) -> None:
        self.device.wait("synchronise")
