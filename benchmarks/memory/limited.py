"""A worker of benchmarks/peers with a smaller device: `python -m benchmarks.memory.limited`.

BENCH_PEER names its module, BENCH_BYTES what it may allocate of BENCH_DEVICE: of a GPU, or beyond its
imports of a CPU's memory. A GPU's limit is the allocator's; the CUDA context, about half a GB, is on top, and
so is managed memory, which paged optimizer states live in.
"""

import importlib
import os
import re
import resource
from pathlib import Path

import torch


def limit(n_bytes: int, device: str) -> None:
    """Beyond this, allocations of this process fail."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, n_bytes / total))
        return
    data = re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())
    most = int(data[1]) * 1024 + n_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def main() -> None:
    """The peer's imports, the limit, and then its orders."""
    from benchmarks.peers.session import serve

    peer = importlib.import_module(os.environ["BENCH_PEER"])
    limit(int(os.environ["BENCH_BYTES"]), os.environ["BENCH_DEVICE"])
    serve(peer.train)


if __name__ == "__main__":
    main()
