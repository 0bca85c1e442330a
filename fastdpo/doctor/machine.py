"""What is installed here, and on what it runs. Imports torch and nothing else that is large."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from contextlib import suppress
from pathlib import Path

import fastdpo_kernels
import torch

PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "flash-attn", "liger-kernel", "trl")
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_DOCTOR = Path(__file__).parent
_SOURCES = (Path(fastdpo_kernels.__file__).parent, _DOCTOR, _DOCTOR.parent / "model" / "attention.py")


def versions(packages: tuple[str, ...]) -> dict[str, str | None]:
    """Installed versions; None where a package is absent."""
    found = dict.fromkeys(packages)
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def processor() -> str:
    """The CPU by name."""
    with suppress(OSError, TypeError):
        return re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[1]  # type: ignore[index]
    return platform.processor() or platform.machine()


@functools.cache
def driver() -> str:
    """The NVIDIA driver's version, or "unknown"."""
    with suppress(OSError, TypeError):
        return re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER_FILE.read_text())[0]  # type: ignore[index]
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
        return done.stdout.split("\n")[0].strip() or "unknown"
    return "unknown"


def gpu(device: str) -> dict[str, str]:
    """Name, capability, memory and processors of a CUDA device."""
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory": f"{found.total_memory / 1e9:.1f} GB",
        "SMs": str(found.multi_processor_count),
    }


def no_gpu() -> str:
    """Why torch has no GPU here."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built for CPUs only"
    if driver() == "unknown":
        return f"torch is built for CUDA {torch.version.cuda}, and no NVIDIA driver was found"
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return "CUDA_VISIBLE_DEVICES is empty"
    return f"torch is built for CUDA {torch.version.cuda}, and finds no device with driver {driver()}"


def has_bf16(device: str) -> bool:
    """Whether bf16 is more than emulated; CPUs compute it, if slowly."""
    if torch.device(device).type == "cpu":
        return True
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def key(device: str) -> dict[str, str | None]:
    """All that a kernel's being right depends on: the chip, the versions, the sources."""
    chip = gpu(device)
    return {
        "gpu": chip["name"],
        "capability": chip["capability"],
        "driver": driver(),
        "cuda": torch.version.cuda or torch.version.hip,
        **versions(("torch", "triton", "transformers", "flash-attn")),
        "sources": sources_digest(),
    }


def sources_digest() -> str:
    """Of the kernels, the attention and the checks, by name and content."""
    digest = hashlib.blake2b(digest_size=16)
    for place in _SOURCES:
        for path in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            text = path.read_bytes()
            digest.update(f"{path.name} {len(text)}\n".encode() + text)
    return digest.hexdigest()


def facts() -> dict[str, str]:
    """What a bug report must say of a machine, by name."""
    here = {
        "fastdpo": versions(("fastdpo",))["fastdpo"] or "not installed: run from its sources",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "CPU": f"{processor()}, {os.cpu_count()} cores",
    }
    here |= {name: version or "not installed" for name, version in versions(PACKAGES).items()}
    cuda, rocm = torch.version.cuda, torch.version.hip
    built_for = f"CUDA {cuda}" if cuda else f"ROCm {rocm}" if rocm else "CPUs"
    here["torch"] = f"{torch.__version__}, built for {built_for}"
    if not torch.cuda.is_available():
        return here | {"GPU": f"none: {no_gpu()}"}
    here["driver"] = driver()
    for number in range(torch.cuda.device_count()):
        chip = gpu(f"cuda:{number}")
        text = f"{chip['name']}, compute capability {chip['capability']}, {chip['memory']}, {chip['SMs']} SMs"
        here[f"GPU {number}" if torch.cuda.device_count() > 1 else "GPU"] = text
    return here
