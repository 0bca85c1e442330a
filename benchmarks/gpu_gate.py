"""Stage `gate`: the correctness gate, then the GPU tests. No speed claim stands on a red gate."""

import subprocess
import sys
import time

import torch

from benchmarks.gate import run_gate
from benchmarks.process import ROOT
from benchmarks.results import stage_arguments, write_result


def gpu_tests() -> list[str]:
    """The files that have any: the others need packages that the machine may lack."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def run_tests(dry_run: bool, seconds: float) -> tuple[int, list[str]]:
    """(exit status, last lines) of `pytest -m gpu`, which a dry run only collects."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", *gpu_tests()]
    command.append("--continue-on-collection-errors")  # red all the same, but the other files have their say
    command += ["--collect-only"] if dry_run else []
    try:
        done = subprocess.run(
            command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds
        )
    except subprocess.TimeoutExpired as error:
        lines = (error.stdout or b"").decode(errors="replace").splitlines()
        return 124, [*lines, f"stopped after {seconds:.0f} s"][-60:]
    return done.returncode, done.stdout.splitlines()[-60:]


def main() -> int:
    """The verdict of both, recorded and told."""
    args = stage_arguments(__doc__)
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = run_gate(device)
    left = 60 * args.minutes - (time.perf_counter() - start)
    code, lines = run_tests(args.dry_run, left)
    print("\n".join([*lines, *record["failures"]]))
    real = device == "cuda" or args.dry_run  # tests that were all skipped are no pass
    record |= {"passed": record["passed"] and code == 0 and real, "tests_exit": code, "tests": lines}
    write_result("gate", record | {"seconds": time.perf_counter() - start}, args.out)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
