"""The results that are kept: `results/<what>_<machine>_<date>.json`, each with what it was measured on."""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import torch

from benchmarks.process import commit, provenance

RESULTS = Path(__file__).resolve().parent / "results"
_NAME = re.compile(r"(?P<what>[a-z][a-z0-9_]*)_(?P<machine>[a-z0-9-]+)_(?P<date>\d{4}-\d\d-\d\d)")


def machine() -> str:
    """The GPU's short name ("h200", "h100", "a100-sxm4-80gb"), or "cpu"."""
    return short_name(torch.cuda.get_device_name()) if torch.cuda.is_available() else "cpu"


def short_name(gpu: str) -> str:
    """A GPU's name for a file name, without underscores."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-").removeprefix("nvidia-")
    known = re.match(r"(?:h100|h200|b200|gh200)\b", slug)
    return known[0] if known else slug


def today() -> str:
    """The date results are written under, YYYY-MM-DD: BENCH_DATE's where given, so that a visit over midnight
    goes on with what it has. ValueError for anything else."""
    told = os.environ.get("BENCH_DATE")
    if not told:
        return time.strftime("%Y-%m-%d")
    try:
        day = time.strftime("%Y-%m-%d", time.strptime(told, "%Y-%m-%d"))
    except ValueError:
        day = None
    if day != told:
        raise ValueError(f"BENCH_DATE={told} is no date: give it as YYYY-MM-DD, or not at all")
    return day


def result_path(what: str, folder: Path = RESULTS) -> Path:
    """Where today's result of `what` on this machine belongs."""
    return folder / f"{what}_{machine()}_{today()}.json"


def write_result(what: str, record: dict, folder: Path = RESULTS, quiet: bool = False) -> Path:
    """Writes the record, where it comes from, and what gate_passed says by then. Whoever is killed
    meanwhile leaves the file as it was."""
    if what != "gate":
        record = {"gate_passed": gate_passed(commit()["git"], machine(), folder)} | record
    path = result_path(what, folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record | provenance(), indent=1) + "\n")
    part.replace(path)
    if not quiet:
        print(f"written: {path}", flush=True)
    return path


def result_of_today(what: str, folder: Path = RESULTS) -> dict | None:
    """Today's result of the same commit: a run that had no time for all goes on there."""
    path = result_path(what, folder)
    record = json.loads(path.read_text()) if path.exists() else None
    return record if record and record["git"] == commit()["git"] else None


def newest_path(what: str, machine: str | None = None, folder: Path = RESULTS) -> Path | None:
    """The newest result of `what`: on a machine by its short name, on any "gpu", or (None) on any at all."""
    found = []
    for path in folder.glob(f"{what}_*.json"):
        name = _NAME.fullmatch(path.stem)
        if name is None or name["what"] != what:
            continue
        if machine in (None, name["machine"]) or (machine == "gpu" and name["machine"] != "cpu"):
            found.append((name["date"], path))
    return max(found)[1] if found else None


def newest(what: str, machine: str | None = None, folder: Path = RESULTS) -> dict | None:
    """newest_path, read."""
    path = newest_path(what, machine, folder)
    return json.loads(path.read_text()) if path else None


def gate_passed(git: str | None, machine: str, folder: Path = RESULTS) -> bool | None:
    """Whether the newest gate of this commit on this machine was green; None: there was none, and another
    commit's says nothing."""
    paths = sorted(folder.glob(f"gate_{machine}_*.json"), reverse=True)  # by their dates
    gates = (json.loads(path.read_text()) for path in paths if _NAME.fullmatch(path.stem))
    return next((gate["passed"] for gate in gates if gate["git"] == git), None)


def newest_shown(what: str, machine: str, folder: Path = RESULTS) -> tuple[dict | None, Path | None]:
    """The newest result and where it is: (None, path) on a red gate, (None, None) where there is none."""
    path = newest_path(what, machine, folder)
    if path is None:
        return None, None
    record = json.loads(path.read_text())
    passed = gate_passed(record.get("git"), machine_of(path), folder)  # run again since, it may say otherwise
    red = (record.get("gate_passed") if passed is None else passed) is False
    return None if red else record, path


def machine_of(path: Path) -> str:
    """The machine that a result's file name tells."""
    return _NAME.fullmatch(path.stem)["machine"]


def stage_parser(description: str) -> argparse.ArgumentParser:
    """What every GPU stage takes: dry_run, out (a folder), minutes."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on a CPU, into --out")
    parser.add_argument("--out", type=Path, help="the folder of the JSON (default: benchmarks/results)")
    parser.add_argument("--minutes", type=float, default=7.5, help="start nothing new after these")
    return parser


def stage_arguments(stage: str | argparse.ArgumentParser) -> argparse.Namespace:
    """A stage's arguments, by its description or by its parser where it takes more."""
    parser = stage_parser(stage) if isinstance(stage, str) else stage
    args = parser.parse_args()
    if args.dry_run and args.out is None:
        parser.error("--dry-run needs --out: its numbers mean nothing and belong nowhere else")
    args.out = args.out or RESULTS
    return args


def gpu_arguments(stage: str | argparse.ArgumentParser) -> argparse.Namespace:
    """stage_arguments, of a stage that on a CPU has a --dry-run alone."""
    args = stage_arguments(stage)
    if not args.dry_run and not torch.cuda.is_available():
        sys.exit("no GPU here: --dry-run --out DIR shows that all of it runs")
    return args
