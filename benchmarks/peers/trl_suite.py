"""TRL's own DPO tests, stock and patched: does the same pass, and is the same computed?

    git clone --depth 1 https://github.com/huggingface/trl ../trl
    python -m benchmarks.peers.trl_suite ../trl [-k EXPRESSION]

Runs tests/test_dpo_trainer.py of the checkout against the installed TRL four times: as its tests are
written (bf16) and with float32, stock and under `fastdpo.integrations.trl.patch()`. The models and data
that they name are made in a temporary folder (trl_suite_models.py); nothing is fetched. Most of TRL's tests
ask only that the weights move, so what each trainer computes up to its first step is compared too
(peers/trl_recorder.py). Exits 1 where a test that passes stock does not pass patched, or any number
differs by more than LIMITS. Takes 6 minutes on two cores.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.peers.trl_suite_models import build
from benchmarks.process import python_path

MODULE = "tests/test_dpo_trainer.py"
PLUGIN = "benchmarks.peers.trl_recorder"
SECONDS = 1200  # for one run
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CI": "1", "OMP_NUM_THREADS": "1"}
# What is compared, and the largest relative difference allowed: (float32, bf16 or fp16)
LIMITS = {
    "logps": (1e-5, 1e-3),  # a batch's log-probs, summed
    "tokens": (1e-5, 5e-2),  # a token's log-prob, entropy, mean logit, of at least 1 nat
    "metrics": (1e-5, 1e-3),  # those that TRL logs, of at least 1
    "gradient": (1e-5, 1e-2),  # norm of the first gradient
    "weights": (1e-4, 1e-1),  # a weight's part of it, of at least a hundredth of the whole
}


@dataclass
class Compared:
    """One test."""

    test: str
    stock: str
    patched: str
    forwards: int
    modes: list[str]
    largest: dict[str, float] = field(default_factory=dict)  # difference, by the names of LIMITS
    faults: list[str] = field(default_factory=list)


def compare(stock: dict[str, dict], patched: dict[str, dict]) -> list[Compared]:
    """Two runs of the recorder, test by test."""
    return [_compare_test(test, record, patched.get(test)) for test, record in stock.items()]


def _compare_test(test: str, a: dict, b: dict | None) -> Compared:
    if b is None:
        return Compared(test, a["outcome"], "not run", 0, [], faults=["it was not run patched"])
    out = Compared(test, a["outcome"], b["outcome"], len(b["forwards"]), b["modes"])
    if a["outcome"] != "passed":
        return out
    if b["outcome"] != "passed":
        out.faults.append(f"{b['outcome']} patched: {b['why']}")
        return out
    if any(a["logged"]) and not a["forwards"]:
        out.faults.append("it trained, and no forward was recorded")
    if b["forwards"] and not b["modes"]:
        out.faults.append("the patched forward never ran")
    shapes = {name: _shape(a[name]) == _shape(b[name]) for name in ("forwards", "gradients", "metrics")}
    shapes["logged"] = a["logged"] == b["logged"]
    out.faults += [f"not as many {name}, or other names" for name, same in shapes.items() if not same]
    if not out.faults:
        out.largest = {name: max(found, default=0.0) for name, found in _differences(a, b).items()}
        limits = {name: limit[a["half"] or b["half"]] for name, limit in LIMITS.items()}
        beyond = {name: d for name, d in out.largest.items() if not d <= limits[name]}
        out.faults += [f"{name} differ by {d:.1e}, allowed is {limits[name]:g}" for name, d in beyond.items()]
    return out


def _shape(dicts: list[dict]) -> list[dict]:
    """The names of each dict, with the length of what is a list."""
    return [{k: len(v) if isinstance(v, list) else None for k, v in each.items()} for each in dicts]


def _differences(a: dict, b: dict) -> dict[str, list[float]]:
    """All of them, by the names of LIMITS."""
    out = {name: [] for name in LIMITS}
    for x, y in zip(a["forwards"], b["forwards"]):
        if x["log_probs"]:
            out["logps"].append(relative(sum(x["log_probs"]), sum(y["log_probs"])))
        out["tokens"] += [relative(u, v, 1.0) for name in x for u, v in zip(x[name], y[name])]
    for x, y in zip(a["gradients"], b["gradients"]):
        whole, patched = (math.hypot(*norms.values()) for norms in (x, y))
        out["gradient"].append(relative(whole, patched))
        out["weights"] += [relative(x[name], y[name], 0.01 * whole) for name in x]
    for x, y in zip(a["metrics"], b["metrics"]):
        tied = abs(x["rewards/margins"]) < 1e-3  # as in a first step: who is ahead is rounding
        kept = [name for name in x if not (tied and name == "rewards/accuracies")]
        out["metrics"] += [relative(x[name], y[name], 1.0) for name in kept]
    return out


def relative(a: float, b: float, least: float = 0.0) -> float:
    """|a - b| over |a|, or over `least` where |a| is less. Infinite where either is NaN."""
    scale = max(abs(a), least)
    difference = abs(a - b) / scale if scale else abs(a - b) and math.inf
    return math.inf if math.isnan(difference) else difference


def run_tests(work: Path, module: str, runs: dict[str, list[str]], more: list[str]) -> dict[str, dict]:
    """{run: what the recorder wrote} of pytest with each run's options, side by side, in the folder `work`.
    RuntimeError where one wrote nothing."""
    processes = {}
    for name, options in runs.items():
        # caches of their own: a stored reference of stock TRL would be found by the patched one
        environment = os.environ | OFFLINE | python_path() | {"HF_HOME": str(work / f"home_{name}")}
        command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", "-q", "--tb=line"]
        command += ["--basetemp", str(work / f"tmp_{name}"), "--record", f"{name}.json", *options, *more]
        with (work / f"{name}.log").open("w") as log:
            processes[name] = subprocess.Popen(
                [*command, module], cwd=work, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
    found = {}
    try:
        for name, process in processes.items():
            process.wait(SECONDS)
            if not (work / f"{name}.json").exists():
                said = (work / f"{name}.log").read_text()[-2000:]
                raise RuntimeError(f"the run {name!r} ended with {process.returncode}:\n{said}")
            found[name] = json.loads((work / f"{name}.json").read_text())
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    return found


def show(title: str, compared: list[Compared], console: Console) -> None:
    """A line a test function."""
    table = Table("test", "passed stock", "patched", "forwards", "run", *LIMITS, title=title)
    functions: dict[str, list[Compared]] = {}
    for each in compared:
        if each.stock == "passed":
            functions.setdefault(each.test.split("::")[-1].split("[")[0], []).append(each)
    for name, tests in functions.items():
        passed = [str(sum(getattr(t, way) == "passed" for t in tests)) for way in ("stock", "patched")]
        largest = [max(t.largest.get(what, 0.0) for t in tests) for what in LIMITS]
        modes = ", ".join(sorted({mode for t in tests for mode in t.modes}))
        forwards = str(sum(t.forwards for t in tests))
        table.add_row(name, *passed, forwards, modes, *(f"{d:.0e}" if d else "" for d in largest))
    console.print(table)
    for each in compared:
        for fault in each.faults:
            console.print(f"  {each.test}: {fault}", style="red", highlight=False, markup=False)


def summary(stock: dict[str, dict], compared: list[Compared]) -> str:
    """Counts, the largest differences, and why tests do not pass stock."""
    count = lambda way: sum(getattr(each, way) == "passed" for each in compared)
    largest = {what: max((e.largest.get(what, 0.0) for e in compared), default=0.0) for what in LIMITS}
    said = [f"{count('stock')} passed stock, {count('patched')} passed patched, of {len(compared)}; "]
    said += ["largest differences: ", ", ".join(f"{what} {d:.1e}" for what, d in largest.items())]
    whys = Counter((r["outcome"], r["why"]) for r in stock.values() if r["outcome"] != "passed")
    lines = [f"  {n} {outcome} stock: {why[:140]}" for (outcome, why), n in whys.most_common()]
    return "\n".join(["".join(said), *lines])


def main() -> int:
    """0 where all that passes stock passes patched, with the same numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a working tree of huggingface/trl")
    parser.add_argument("-k", metavar="EXPRESSION", help="only these tests, as pytest -k takes them")
    args = parser.parse_args()
    if not (args.checkout / MODULE).exists():
        parser.error(f"{args.checkout} has no {MODULE}: clone https://github.com/huggingface/trl there")
    console = Console(width=150)
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        build(work, args.checkout)
        shutil.copytree(args.checkout / "tests", work / "tests")
        for title, options in {"as TRL's tests are written": [], "in float32": ["--float32"]}.items():
            runs = {"stock": options, "patched": [*options, "--patch"]}
            found = run_tests(work, MODULE, runs, ["-k", args.k] if args.k else [])
            compared = compare(found["stock"], found["patched"])
            show(f"TRL's DPO tests {title}: the largest relative differences", compared, console)
            console.print(summary(found["stock"], compared), highlight=False, markup=False)
            faults += sum(len(each.faults) for each in compared)
            faults += not any(each.stock == "passed" for each in compared)
            for name in runs:
                (work / f"{name}.json").unlink()
    console.print("the same" if not faults else f"{faults} faults", style="red" if faults else "green")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
