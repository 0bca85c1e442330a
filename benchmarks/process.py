"""What a benchmark says of its own process and machine."""

import importlib.metadata
import platform
import re
import resource
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "trl", "peft", "datasets", "numpy", "fastdpo")


def resident(key: str) -> int:
    """This process's VmHWM (peak) or VmRSS (now), in bytes."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024


def restart_peak() -> int:
    """Lets VmHWM start again from VmRSS; returns the latter."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_bytes() -> dict:
    """The peaks since restart_peak, and since the process began."""
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": resident("VmHWM"), "ru_maxrss_bytes": whole}


def versions() -> dict:
    """Installed versions of what matters to a number; None where a package is absent."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def provenance() -> dict:
    """Versions, git commit, processor and GPU: what a result must carry to mean anything."""
    git = lambda *args: subprocess.run(["git", *args], capture_output=True, text=True).stdout.strip()
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {
        "git": git("rev-parse", "HEAD"),
        "git_dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "versions": versions(),
        "python": platform.python_version(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
