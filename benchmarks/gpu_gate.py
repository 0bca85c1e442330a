"""Stage `gate`: the correctness gate, then the GPU tests. No speed claim stands on a red gate."""

import contextlib
import subprocess
import sys
import threading
import time

import psutil
import torch

from benchmarks.gate import run_gate
from benchmarks.process import ROOT
from benchmarks.results import stage_arguments, write_result

TEST_SECONDS = 120  # the first test of a kind compiles its kernels
# An illegal memory access, or a timeout, ends a process: xdist tells the test as crashed and starts another
# one. `--dist loadfile` would give the new one the same test again, until there are no more restarts.
TOGETHER = ("-n", "6", "--dist", "load", "--max-worker-restart", "12")
TOGETHER += ("--timeout", str(TEST_SECONDS), "--timeout-method", "thread")


def gpu_tests() -> list[str]:
    """The files that have any: the others need packages that the machine may lack."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def run_tests(dry_run: bool, seconds: float) -> tuple[int, list[str]]:
    """(exit status, what is red and the last line) of `pytest -m gpu`, which a dry run only collects. All
    that it says is printed as it comes. 124: ended after so many seconds."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *gpu_tests()]
    command.append("--continue-on-collection-errors")  # red all the same, but the other files have their say
    command += ["--collect-only", "-q"] if dry_run else TOGETHER
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    late = threading.Event()
    timer = threading.Timer(seconds, lambda: (late.set(), end_all(process.pid)))
    timer.start()
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    code = process.wait()
    timer.cancel()
    told = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if late.is_set():
        return 124, [*told, f"stopped after {seconds:.0f} s; before it: {(lines or ['nothing'])[-1]}"]
    return code, [*told, *lines[-1:]]


def end_all(pid: int) -> None:
    """Kills a process and all that it started."""
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def main() -> int:
    """The verdict of both, recorded and told."""
    args = stage_arguments(__doc__)
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    record = run_gate(device)
    told = "\n".join(record["failures"])
    print(told or "the gate's own check: green", flush=True)
    # what is known stays, should this process be ended; without its tests no gate is green
    write_result("gate", record | {"passed": False, "tests_exit": None, "tests": ["not run"]}, args.out)
    left = max(1.0, 60 * args.minutes - (time.perf_counter() - start))
    code, lines = run_tests(args.dry_run, left)
    print("\n".join([*lines, told]))
    real = device == "cuda" or args.dry_run  # tests that were all skipped are no pass
    record |= {"passed": record["passed"] and code == 0 and real, "tests_exit": code, "tests": lines}
    write_result("gate", record | {"seconds": time.perf_counter() - start}, args.out)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
