"""Stage `gate`: the correctness gate, then the GPU tests. No speed claim stands on a red gate.

Run again on the same day and commit, it tries only what was not green: its JSON keeps each test's outcome.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from benchmarks.process import ROOT, commit
from benchmarks.results import newest, result_of_today, stage_arguments, write_result

CHECK_SECONDS = 120  # the gate's own check takes some 20, compilation included
TEST_SECONDS = 75  # the first test of a kind compiles its kernels
WORKERS = min(12, os.cpu_count() or 1)
# An illegal memory access, or a timeout, ends a process: xdist tells the test as crashed and starts another
# one. `--dist loadfile` would give the new one the same test again, until there are no more restarts.
TOGETHER = ("-n", str(WORKERS), "--dist", "load", "--max-worker-restart", "12")
TOGETHER += ("--timeout", str(TEST_SECONDS), "--timeout-method", "thread")
NOTHING_TO_RUN = 5  # pytest's exit status
FOLDER = "BENCH_GATE_FOLDER"  # where the tests' processes read GREEN, and one of them writes OUTCOMES
GREEN, OUTCOMES = "green.json", "outcomes.jsonl"


def run_child(command: list[str], seconds: float, **environment: str) -> tuple[int, list[str]]:
    """(exit status, its lines, each printed as it comes). 124: killed after so many seconds, with all that it
    started. It is not waited for then: who hangs in a driver may outlive that."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    lines = []

    def read():
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        end_all(process.pid)
        code = 124
    reader.join(5)
    return code, lines


def own_check() -> dict:
    """run_gate's record, of a process of its own: a kernel that hangs or breaks the GPU is red and named, and
    takes the tests' time no longer than CHECK_SECONDS."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.gate.run", "--out", folder]
        code, lines = run_child(command, CHECK_SECONDS)
        record = newest("gate", folder=Path(folder))
    if record is not None and code in (0, 1):
        return {name: record[name] for name in ("passed", "failures", "seconds")}
    how = f"stopped after {CHECK_SECONDS} s" if code == 124 else f"died with code {code}"
    failure = f"the gate's own check {how}; its last line: {(lines or ['nothing'])[-1]}"
    return {"passed": False, "failures": [failure], "seconds": time.perf_counter() - began}


def gpu_tests() -> list[str]:
    """The files that have any: the others need packages that the machine may lack."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file) for file in files if "mark.gpu" in file.read_text(encoding="utf-8")]


def run_tests(dry_run: bool, seconds: float, green: list[str] = ()) -> tuple[int, list[str], dict[str, str]]:
    """(exit status, what is red and the last line, outcomes by node id) of `pytest -m gpu` without those that
    are green already. A dry run only collects. 124: ended after so many seconds."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", *gpu_tests()]
    command += ["-p", "benchmarks.gpu.gate"]  # the two hooks below
    command.append("--continue-on-collection-errors")  # red all the same, but the other files have their say
    command += ["--collect-only", "-q"] if dry_run else TOGETHER
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / GREEN).write_text(json.dumps(list(green)))
        told = Path(folder) / OUTCOMES
        told.touch()
        code, lines = run_child(command, seconds, **{FOLDER: folder})
        outcomes = dict(map(json.loads, told.read_text().splitlines()))
    red = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if code == 124:
        last = f"stopped after {seconds:.0f} s; before it: {(lines or ['nothing'])[-1]}"
        return 124, [*red, last], outcomes
    return code, [*red, *lines[-1:]], outcomes


def pytest_collection_modifyitems(config, items):
    """pytest's: leaves out what is green already, in every process the same."""
    green = set(json.loads((Path(os.environ[FOLDER]) / GREEN).read_text()))
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in green])
    items[:] = [item for item in items if item.nodeid not in green]


def pytest_runtest_logreport(report):
    """pytest's: keeps how each test ended, whoever is killed later. The process that started the others hears
    of all of theirs."""
    if "PYTEST_XDIST_WORKER" in os.environ or (report.passed and report.when != "call"):
        return
    with (Path(os.environ[FOLDER]) / OUTCOMES).open("a") as file:
        file.write(json.dumps([report.nodeid, report.outcome]) + "\n")


def end_all(pid: int) -> None:
    """Kills a process and all that it started."""
    parent = psutil.Process(pid)
    for process in [*parent.children(recursive=True), parent]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def earlier_today(args: argparse.Namespace) -> dict:
    """Today's gate of this very tree, or nothing."""
    changed = commit()["git_dirty"] or args.dry_run
    return {} if changed else result_of_today("gate", args.out) or {}


def main() -> int:
    """The verdict of both, recorded and told."""
    args = stage_arguments(__doc__)
    start = time.perf_counter()
    earlier = earlier_today(args)
    record = {"passed": True, "failures": []} if earlier.get("failures") == [] else own_check()
    told = "\n".join(record["failures"])
    print(told or "the gate's own check: green", flush=True)
    outcomes = earlier.get("outcomes", {})
    green = [node for node, outcome in outcomes.items() if outcome == "passed"]
    # what is known stays, should this process be ended; without its tests no gate is green
    not_run = {"passed": False, "tests_exit": None, "tests": ["not run"], "outcomes": outcomes}
    write_result("gate", record | not_run, args.out)
    left = max(1.0, 60 * args.minutes - (time.perf_counter() - start))
    code, lines, new = run_tests(args.dry_run, left, green)
    if green:
        lines.append(f"{len(green)} tests were green before, and not run again")
    print("\n".join([*lines, told]))
    real = torch.cuda.is_available() or args.dry_run  # tests that were all skipped are no pass
    passed = code == 0 or (code == NOTHING_TO_RUN and bool(green))
    record |= {"passed": record["passed"] and passed and real, "tests_exit": code, "tests": lines}
    record |= {"outcomes": outcomes | new, "seconds": time.perf_counter() - start}
    write_result("gate", record, args.out)
    return 0 if record["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
