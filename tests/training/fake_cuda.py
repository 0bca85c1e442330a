"""A CUDA device without a GPU: what a program does on it, and where it makes the host wait.

The host's tensors are real. The device's are torch's FakeTensors: a device, a shape and a dtype, no values.
So every line that runs on a GPU's machine runs, down to the kernels, and whatever needs a value of the device
is seen at the moment it asks. C++ is told "meta" where it asks for a fake tensor's device (without a driver,
or in a build for CPUs, autograd's device guards would end the process); Python is told "cuda:0".

A wait is, by torch's own rules (Copy.cu, TensorIndexing, operators that count before they allocate): a value
that is read, a copy that is not both non-blocking and of pinned memory, a size that depends on values, an
index that lies on the host, and whatever synchronises by name.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import NamedTuple

import torch
import transformers.optimization  # noqa: F401  (before the device is faked: it imports what looks at torch._C)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CUDA = torch.device("cuda", 0)
FAKE = ("tests.training.fake_cuda", "tests.training.fake_driver")
aten = torch.ops.aten
READ = {aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default, aten.equal.default}
COUNTED = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.unique_consecutive.default,
    aten.bincount.default,
}
JOINED = {aten.cat.default, aten.stack.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
# what autocast computes in half precision, of the functions that models call
HALF = {"linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention"}


class Wait(NamedTuple):
    """The host waited for the device."""

    where: str  # the innermost function of ours: file.qualified_name
    what: str  # read, copy to the host, blocking copy, counted size, index on the host, synchronise


class Copy(NamedTuple):
    """The host went on while this was copied."""

    where: str
    source: Tensor


class Counted(AssertionError):
    """Nothing can go on without data after a size that is counted on the device."""


class FakeCuda(TorchDispatchMode):
    """Enter it inside `fake_driver.fake_cuda`. A value that is read is 1, one that is copied off it is 0."""

    def __init__(self):
        super().__init__()
        self.fake = _Fake(allow_non_fake_inputs=True)
        self.waits: list[Wait] = []
        self.copies: list[Copy] = []  # between host and device, that nothing waits for
        self.jobs = 0  # done for a thread of the program's own, whose waits are not among these
        self.launched: Counter[str] = Counter()  # Triton kernels, by name
        self._pinned: dict[int, torch.UntypedStorage] = {}
        self._in_job = False
        self.told: Callable[[Wait], object] = lambda wait: None  # is told of each
        self.autocast = _Autocast()

    def __enter__(self):
        self.autocast.__enter__()
        self._lifts = torch._C._only_lift_cpu_tensors()
        # so that what torch.tensor(..., device="cuda") copies is seen
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        self.autocast.__exit__(*error)

    def wait(self, what: str) -> None:
        if not self._in_job:
            self.waits.append(Wait(_place(), what))
            self.told(self.waits[-1])

    def job(self, function, *args) -> Future:
        """An executor's submit, done at once and here: torch's modes are a thread's own."""
        done, before, self._in_job = Future(), self._in_job, True
        try:
            done.set_result(function(*args))
        finally:
            self._in_job = before
        self.jobs += 1
        return done

    def tolist(self, tensor: Tensor) -> list:
        """Tensor.tolist, which copies once and not value by value."""
        self.wait("read")
        return torch.ones(tensor.shape, dtype=tensor.dtype).tolist()

    def counts(self) -> dict[tuple[str, str], int]:
        """{(where, what): how often}."""
        return dict(Counter((wait.where, wait.what) for wait in self.waits))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return torch.device("meta")
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = _on_cuda(kwargs["device"])
        fake = any(isinstance(x, FakeTensor) for x in _tensors(args, kwargs))
        if not fake and kwargs.get("device") != CUDA:
            return self._on_host(func, args, kwargs)
        if func in READ:
            self.wait("read")
            whole = args[0].dtype == torch.bool or func is aten.equal.default
            return True if whole else 1.0 if args[0].is_floating_point() else 1
        if func in (aten.copy_.default, aten._to_copy.default):
            return self._copy(func, args, kwargs)
        self._look_at_sizes(func, args, kwargs)
        if func is aten.addmm.dtype_out:  # its form for fake tensors is broken
            return kwargs["out"]
        return self._on_device(func, args, kwargs)

    def _on_host(self, func, args, kwargs):
        """Real tensors; pinned memory is a mark."""
        if func is aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func is aten._pin_memory.default:
            return self._pin(args[0].clone())
        pins = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        return self._pin(out) if pins else out

    def _pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = storage  # alive, so that no address comes twice
        return tensor

    def _is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._pinned

    def _copy(self, func, args, kwargs):
        """copy_ and _to_copy: within the device, or between it and the host."""
        in_place = func is aten.copy_.default
        to, source = args[:2] if in_place else (None, args[0])
        asked = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        to_device = isinstance(to, FakeTensor) if in_place else kwargs.get("device", CUDA) == CUDA
        from_device = isinstance(source, FakeTensor)
        if to_device and from_device:
            return self._on_device(func, args, kwargs)
        host = source if to_device else to  # None: what .to("cpu", non_blocking=True) makes, pinned
        if asked and (host is None or self._is_pinned(host)):
            self.copies.append(Copy(_place(), source))
        else:
            self.wait("copy to the host" if from_device else "blocking copy")
        if to_device:
            return self._on_device(func, args, kwargs)
        zeros = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        return to.copy_(zeros) if in_place else zeros

    def _look_at_sizes(self, func, args, kwargs) -> None:
        if func in JOINED and not all(isinstance(t, FakeTensor) for t in args[0]):
            raise AssertionError(f"{_place()}: {func} of tensors on the device and on the host")
        if func in INDEXED:
            index = [x for x in args[1] if x is not None]
            if any(not isinstance(x, FakeTensor) for x in index):
                self.wait("index on the host")
            if any(x.dtype in (torch.bool, torch.uint8) for x in index):
                self._counted(func)
        counts = func in COUNTED and kwargs.get("output_size") is None
        if func is aten.segment_reduce.default:
            counts = kwargs.get("lengths") is not None and not kwargs.get("unsafe", False)
        if counts:
            self._counted(func)

    def _counted(self, func) -> None:
        self.wait("counted size")
        raise Counted(f"{self.waits[-1].where}: {func} counts on the device and makes the host wait")

    def _on_device(self, func, args, kwargs):
        with self.fake:
            return func(*args, **kwargs)


class _Fake(FakeTensorMode):
    """Takes the host's tensors for tensors without values, of which torch says whether they may be there, and
    what C++ makes on "meta" for tensors of the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs or not all(isinstance(x, FakeTensor) for x in _tensors(args, kwargs)):
            args, kwargs = tree_map(self._taken, args), tree_map(self._taken, dict(kwargs))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _taken(self, value):
        if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
            return _on_cuda(value)
        with self:
            return torch.empty_strided(
                *(value.size(), value.stride()), dtype=value.dtype, device=_on_cuda(value.device)
            )


class _Autocast(TorchFunctionMode):
    """torch.autocast("cuda"): torch's own asks in C++ whether a tensor is on CUDA."""

    def __init__(self):
        super().__init__()
        self._engine = torch.autograd._engine_run_backward

    def backward(self, *args, **kwargs):
        """torch's engine, with this mode on: a checkpoint computes its layer again there."""
        with self:
            return self._engine(*args, **kwargs)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in HALF and torch.is_autocast_enabled("cuda"):
            args, kwargs = tree_map(_halved, args), tree_map(_halved, kwargs)
        return func(*args, **kwargs)


def _halved(value):
    if not isinstance(value, FakeTensor) or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(torch.get_autocast_dtype("cuda"))


def _tensors(args, kwargs) -> Iterator[Tensor]:
    """Of an operator's arguments (torch's own walk through them is most of a test's time)."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (v for v in value if isinstance(v, Tensor))


def _on_cuda(value):
    """What C++ was told is "meta" is CUDA."""
    return CUDA if isinstance(value, torch.device) and value.type in ("meta", "cuda") else value


def _place() -> str:
    """The innermost function that is neither torch's nor the fake device's."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.split(".")[0] in ("fastdpo", "fastdpo_kernels", "tests") and name not in FAKE:
            return f"{name.rpartition('.')[2]}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return "?"
