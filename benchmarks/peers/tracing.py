"""What one training step spends its time on: a summary of torch.profiler's trace."""

import re
from collections.abc import Sequence

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# What a step cannot do without, by its kernels' names.
KINDS = {
    "GEMM": re.compile(
        r"gemm|cutlass|cublas|nvjet|xmma|splitk|wgmma|addmm|::mm\b|::bmm|matmul|scaled_exp|head_tiles",
        re.IGNORECASE,
    ),
    "attention": re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE),
    "optimizer": re.compile(r"adam|multi_tensor", re.IGNORECASE),
}
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "aten::_local_scalar_dense",
)
TOP = 20
LARGE = 0.05  # of the time: a kernel of no kind above it is worth a line


class Trace:
    """start() and stop() around a step, then summary()."""

    def __init__(self):
        activities = [ProfilerActivity.CPU]
        self.gpu = torch.cuda.is_initialized()
        self.profiler = profile(activities=activities + [ProfilerActivity.CUDA] * self.gpu)

    def start(self) -> None:
        self.profiler.start()

    def stop(self) -> None:
        self.profiler.stop()

    def summary(self) -> dict:
        """Kernels (a CPU's operators, by their own time) by their share of all kernels' time, the share of
        each kind, those of no kind above LARGE, and how often the host waited or copied from the device.

        Waits are counted over the whole step: those inside its microbatches are the ones beyond the two
        of the end (the check of the loss, and stopping the profiler).
        """
        events = [e for e in self.profiler.key_averages() if not e.key.startswith("ProfilerStep")]
        if self.gpu:
            kernels = [e for e in events if e.device_type == DeviceType.CUDA]
        else:
            kernels = [e for e in events if e.key.startswith(("aten::", "fastdpo"))]
        spent = lambda e: e.self_device_time_total if self.gpu else e.self_cpu_time_total
        total = sum(map(spent, kernels)) or 1.0
        ranked = [
            {"name": e.key[:120], "kind": kind_of(e.key), "share": spent(e) / total, "calls": e.count}
            for e in sorted(kernels, key=spent, reverse=True)
        ]
        shares = {kind: 0.0 for kind in (*KINDS, "other")}
        for kernel in ranked:
            shares[kernel["kind"]] += kernel["share"]
        return {
            "device": "cuda" if self.gpu else "cpu",
            "kernel_seconds": total / 1e6,
            "shares": shares,
            "large_others": [k for k in ranked if k["kind"] == "other" and k["share"] > LARGE],
            "top": ranked[:TOP],
            "waits": {e.key: e.count for e in events if e.key in WAITS},
            "host_copies": self.host_copies(),
            "copies_from_device": sum(e.count for e in events if e.key.startswith("Memcpy DtoH")),
        }

    def host_copies(self) -> dict | None:
        """{"seconds" of a GPU's copies to and from the host, "hidden": the share of them in which it
        computes}; None without any."""
        spans = {True: [], False: []}
        for event in self.profiler.events() if self.gpu else ():
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
                is_copy = event.name.startswith(("Memcpy DtoH", "Memcpy HtoD"))
                spans[is_copy].append((event.time_range.start, event.time_range.end))
        seconds = sum(end - start for start, end in spans[True]) / 1e6
        return {"seconds": seconds, "hidden": covered(spans[True], spans[False])} if seconds else None


def covered(copies: Sequence[tuple[float, float]], work: Sequence[tuple[float, float]]) -> float:
    """The share of the (start, end) of copies in which at least one span of work runs."""
    edges = sorted(
        (
            *((s, 1, 0) for s, _ in copies),
            *((e, -1, 0) for _, e in copies),
            *((s, 0, 1) for s, _ in work),
            *((e, 0, -1) for _, e in work),
        )
    )
    copying = working = 0
    before, both, total = 0.0, 0.0, 0.0
    for at, copy, computes in edges:
        total += copying * (at - before)
        both += copying * (at - before) if working else 0.0
        copying, working, before = copying + copy, working + computes, at
    return both / total


def kind_of(name: str) -> str:
    """ "GEMM", "attention", "optimizer" or "other"."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")
