"""The head on a CUDA device without a GPU (../fake_cuda.py): in every plan, backend, dtype and option nothing
waits for the device, nothing is copied and no tensor lies elsewhere, forward and backward."""

import pytest

pytest.importorskip("triton")
import torch
from fastdpo_kernels import LinearCrossEntropy, backend, linear_dpo, linear_logp, plan

from tests.kernels.cases import STATS
from tests.training.fake_cuda import CUDA
from tests.training.fake_driver import fake_cuda

M, V, D, RANK = 64, 160, 16, 4
CU, PAIRS = [0, 15, 24, 44, 64], [(0, 1), (2, 3)]
# (capability, dtype): what runs the head there
MACHINES = {
    "triton": ((9, 0), torch.bfloat16),
    "fp16": ((9, 0), torch.float16),
    "fp32": ((9, 0), torch.float32),
    "fp64": ((9, 0), torch.float64),
    "ampere": ((8, 6), torch.bfloat16),
    "orin": ((8, 7), torch.bfloat16),  # no tile was compiled for it
    "turing": ((7, 5), torch.float16),
}
BACKENDS = dict(triton="triton", ampere="triton", fp16="cublas", fp32="cublas", orin="cublas")
BACKENDS |= dict(fp64="torch", turing="torch")
TRAINED = {  # what has a gradient, by the plan that this makes
    "forward": (),
    "frozen": ("hidden",),
    "keep": ("hidden", "weight"),
    "recompute": ("hidden", "weight"),
}
HEADS = {
    "plain": {},
    "bias, scale": dict(bias=True, scale=0.5),
    "softcap": dict(softcap=30.0),
    "lora": dict(lora=True),
    "strided": dict(strided=True),
    "all": dict(bias=True, scale=0.5, softcap=30.0, lora=True),
}


def on_device(values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype).pin_memory().to(CUDA, non_blocking=True)


class Head:
    """Tensors of a call on the device, those named `trained` (or all of the head) with gradients."""

    def __init__(self, dtype, trained, *, bias=False, scale=1.0, softcap=None, lora=False, strided=False):
        new = lambda *shape, name: torch.empty(*shape, dtype=dtype, device=CUDA).requires_grad_(
            name in trained
        )
        self.hidden = new(M, D, name="hidden")
        self.weight = new(*((D, V) if strided else (V, D)), name="weight")
        self.bias = new(V, name="weight") if bias else None
        self.lora = (new(RANK, D, name="weight"), new(V, RANK, name="weight"), 2.0) if lora else None
        self.strided, self.scale, self.softcap = strided, scale, softcap
        self.target = on_device(list(range(M)))

    def arguments(self) -> tuple[tuple, dict]:
        weight = self.weight.t() if self.strided else self.weight
        keys = dict(bias=self.bias, lora=self.lora, scale=self.scale, softcap=self.softcap)
        return (self.hidden, weight, self.target), keys

    def leaves(self) -> list:
        some = [self.hidden, self.weight, self.bias, *(self.lora or ())[:2]]
        return [t for t in some if t is not None and t.requires_grad]

    def check(self, outputs, wide) -> None:
        """Whole results of the right kind, and a gradient for each leaf of its own kind."""
        for out in outputs:
            assert (out.device, out.dtype) == (CUDA, wide)
        for leaf in self.leaves():
            grad = leaf.grad
            assert (grad.device, grad.dtype, grad.shape) == (CUDA, leaf.dtype, leaf.shape)


def nothing_waited(device) -> None:
    assert not device.waits
    assert all(copy.where == "test_fake_cuda.on_device" for copy in device.copies)


def budget(way, dtype) -> int:
    """Bytes that put a trained head on this plan, in a few chunks."""
    kept = V * M * dtype.itemsize
    return kept - 1 if way == "recompute" else 100 * kept


def logp_cases() -> list[tuple]:
    """(machine, plan, head, stats): all heads where Triton or cuBLAS runs them, two elsewhere."""
    every = [(head, ()) for head in HEADS] + [("plain", STATS), ("all", STATS)]
    return [
        (machine, way, head, stats)
        for machine in MACHINES
        for way in TRAINED
        for head, stats in (every if machine in ("triton", "fp16") else [("plain", ()), ("all", STATS)])
    ]


@pytest.mark.parametrize("machine, way, head, stats", logp_cases())
def test_linear_logp(machine, way, head, stats):
    (capability, dtype), trained = MACHINES[machine], TRAINED[way]
    with fake_cuda(capability) as device, device:
        assert backend(CUDA, dtype) == BACKENDS[machine]
        one = Head(dtype, trained, **HEADS[head])
        sizes = dict(dtype=dtype, train_weight="weight" in trained, memory_budget=budget(way, dtype))
        assert plan(M, V, D, need_grad=bool(trained), **sizes).name == way
        arguments, keys = one.arguments()
        out = linear_logp(*arguments, **keys, stats=stats, memory_budget=budget(way, dtype))
        logp, values = out if stats else (out, {})
        if trained:  # a gradient through entropy computes the logits again
            (logp.sum() + sum(v.sum() for name, v in values.items() if name == "entropy")).backward()
        one.check((logp, *values.values()), torch.promote_types(dtype, torch.float32))
    nothing_waited(device)
    by_triton = BACKENDS[machine] == "triton" and head not in ("lora", "all", "strided")
    assert bool(device.launched["head_tiles"]) == by_triton
    by_rows = not by_triton and BACKENDS[machine] != "torch"
    assert bool(device.launched["chunk_sums"]) == by_rows


LOSSES = {
    "sigmoid": dict(label_smoothing=0.1),
    "hinge": dict(loss="hinge"),
    "ipo": dict(loss="ipo"),
    "a function": dict(loss=lambda margin: margin.square()),
}


DPO_CASES = [
    ("plain", "sigmoid", None),
    ("softcap", "hinge", (24, 40)),
    ("all", "ipo", None),
    ("all", "a function", (24, 40)),
]


@pytest.mark.parametrize("head, loss, groups", DPO_CASES)
@pytest.mark.parametrize("way", TRAINED)
@pytest.mark.parametrize("machine", ["triton", "fp16", "turing"])
def test_linear_dpo(machine, way, head, loss, groups):
    (capability, dtype), trained = MACHINES[machine], TRAINED[way]
    with fake_cuda(capability) as device, device:
        one = Head(dtype, trained, **HEADS[head])
        arguments, keys = one.arguments()
        by_pair = lambda: on_device([0.5] * len(PAIRS), torch.float32)
        by_row = lambda: on_device([0.5] * M, torch.float32)
        total, stats = linear_dpo(
            *(*arguments, on_device(CU), on_device(PAIRS), by_row()),
            **keys,
            **LOSSES[loss],
            offset=by_pair(),
            pair_weight=by_pair(),
            token_weight=by_row(),
            groups=groups,
            memory_budget=budget(way, dtype),
        )
        if trained:
            (total / len(PAIRS)).backward()
        one.check((total, *stats), torch.float32)
    nothing_waited(device)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_module_divides_by_the_rows_that_count_without_asking(reduction):
    with fake_cuda() as device, device:
        one = Head(torch.bfloat16, ("hidden", "weight"))
        LinearCrossEntropy(reduction=reduction)(one.hidden, one.weight, one.target).sum().backward()
        one.check((), torch.float32)
    nothing_waited(device)


@pytest.mark.parametrize("run", [linear_logp, linear_dpo])
def test_a_target_on_the_host_is_refused(run):
    with fake_cuda() as device, device:
        one = Head(torch.bfloat16, ("hidden",))
        arguments = (one.hidden, one.weight, torch.arange(M))
        rest = (on_device(CU), on_device(PAIRS)) if run is linear_dpo else ()
        with pytest.raises(ValueError, match=r"target int64 .* on cuda:0"):
            run(*arguments, *rest)
