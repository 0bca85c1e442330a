"""How fast one head and one attention run, beside the chip's own GEMM in the same minute. In bf16, on CUDA.

Letters: M scored rows, D hidden, V vocab.
"""

import itertools
import statistics
import time
from collections.abc import Callable

import torch
from fastdpo_kernels import backend, linear_logp, plan

from fastdpo.doctor.attention_checks import Case, inputs, layout_of
from fastdpo.doctor.ladder import leave_out
from fastdpo.model import attention

M, D, V = 4096, 2048, 32768  # about 1 GB with all gradients: small cards have it
SHAPES = ((1024, (256, 256, 256, 256)),) * 4  # prompts and responses, 8176 tokens
CASE = Case(16, 4, 128)
TURNS = 9
CALLS = 8  # in a row on a GPU, so that the time to launch one is hidden


def seconds_of(call: Callable[[], object], device: torch.device) -> list[float]:
    """Seconds of each of TURNS calls after one that warms up, by the device's own clock."""
    call()
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(TURNS):
            call()
            times.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(times)]
    out = []
    for _ in range(TURNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(CALLS):
            call()
        end.record()
        end.synchronize()
        out.append(start.elapsed_time(end) / 1e3 / CALLS)
    return out


def measure(device: str, left_out: list[str]) -> dict[str, dict]:
    """{"GEMM", "lm_head", "attention"}: each {"how", "milliseconds", "tflops"}, forward and backward but for
    the GEMM. left_out: rungs that are not taken."""
    where, dtype = torch.device(device), torch.bfloat16
    leave_out(left_out)
    torch.manual_seed(0)
    new = lambda *shape: torch.randn(*shape, device=where, dtype=dtype)
    x, weight, target = new(M, D), new(V, D) / D**0.5, torch.randint(0, V, (M,), device=where)
    out = torch.empty(M, V, device=where, dtype=dtype)
    gemm = lambda: torch.mm(x, weight.t(), out=out)
    before = _timed("cuBLAS", gemm, 2 * M * D * V, where)
    found = {"lm_head": _head(x, weight, target, where), "attention": _attention(where, dtype)}
    after = _timed("cuBLAS", gemm, 2 * M * D * V, where)
    return {"GEMM": max(before, after, key=lambda run: run["tflops"]), **found}


def _timed(how: str, call: Callable[[], object], flops: float, where: torch.device) -> dict:
    seconds = statistics.median(seconds_of(call, where))
    return {"how": how, "milliseconds": 1e3 * seconds, "tflops": flops / seconds / 1e12}


def _head(x, weight, target, where) -> dict:
    """A trained head by the default plan."""
    leaves = [t.detach().requires_grad_() for t in (x, weight)]
    by = backend(where, x.dtype)
    how = plan(*(len(x), *weight.shape), dtype=x.dtype, train_weight=True, backend=by)
    run = lambda: torch.autograd.grad(linear_logp(leaves[0], leaves[1], target).sum(), leaves)
    return _timed(f"{how.name} by {by}", run, how.flops, where)


def _attention(where, dtype) -> dict:
    layout = layout_of(SHAPES).to(where)
    leaves = inputs(CASE, len(layout.seen_until), where, dtype)
    q, k, v = leaves
    by = attention.pick_backend(q, v)
    grad = torch.randn_like(q)
    run = lambda: torch.autograd.grad(attention.attend(q, k, v, layout), leaves, grad)
    return _timed(by, run, 3 * 4 * CASE.heads * CASE.size * attended(layout), where)


def attended(layout) -> int:
    """(query, key) pairs that bottom-right-causal segments see. A pair is 4 d FLOPs a head forward, and twice
    that backward."""
    sizes = ((q1 - q0, k1 - k0) for q0, q1, k0, k1 in layout.segments)
    return sum(q * (k - q) + q * (q + 1) // 2 for q, k in sizes)
