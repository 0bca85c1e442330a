"""What a benchmark says of its own process and machine."""

import os
import platform
import re
import resource
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "transformers", "trl", "accelerate", "peft", "datasets", "numpy", "fastdpo")
PACKAGES += ("liger-kernel", "flash-attn", "cut-cross-entropy", "quack-kernels")
ROOT = Path(__file__).resolve().parents[1]


def python_path(*folders: Path) -> dict[str, str]:
    """{"PYTHONPATH": ...} for a child process: these folders and this tree, before what this process was
    given, which may be packages that are carried beside the installed ones (fetch_peers.sh)."""
    given = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), str(ROOT), str(ROOT / "kernels"), *given])}


def resident(key: str) -> int:
    """This process's VmHWM (peak) or VmRSS (now), in bytes. Kernels without a VmHWM have the peak since
    the process began."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None and key == "VmHWM":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(found[1]) * 1024


def restart_peak() -> int:
    """Lets VmHWM start again from VmRSS; returns the latter."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak_bytes() -> dict:
    """The peaks since restart_peak, and since the process began."""
    whole = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_bytes": resident("VmHWM"), "ru_maxrss_bytes": whole}


def gpu_unusable() -> bool:
    """Whether CUDA takes nothing more from this process, as after an illegal memory access."""
    if not torch.cuda.is_available():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def commit() -> dict:
    """The commit this tree is of, and whether files differ from it. A copy without .git is told by
    BENCH_COMMIT, else unknown: None."""
    if told := os.environ.get("BENCH_COMMIT"):
        return {"git": told, "git_dirty": None}
    try:
        return {"git": _git("rev-parse", "HEAD"), "git_dirty": bool(_git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"git": None, "git_dirty": None}


def _git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def provenance() -> dict:
    """Versions, git commit, processor and GPU: what a result must carry to mean anything."""
    from fastdpo.doctor import machine  # here: every peer's process imports this file

    return commit() | {
        "versions": machine.versions(PACKAGES),
        "python": platform.python_version(),
        "cpu": machine.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
