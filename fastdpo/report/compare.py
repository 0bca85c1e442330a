"""`fastdpo report RUN [RUN ...]`: a run's report.html anew, or several runs over each other on one page."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape

from fastdpo.config.keys import FIELDS
from fastdpo.console.formatting import duration, first_few, gigabytes, significant
from fastdpo.errors import ConfigError
from fastdpo.files import durable
from fastdpo.files.names import similar
from fastdpo.report import beside
from fastdpo.report.charts import description, marks
from fastdpo.report.history import RunHistory, read_run
from fastdpo.report.page import samples, template, write_report
from fastdpo.report.plots import DASHED, DOTTED, Chart, Curve, Mark, draw
from fastdpo.report.rounds import CHARTS as ROUND_CHARTS
from fastdpo.report.rounds import ERROR, SCORE, over_rounds, round_tiles
from fastdpo.report.story import ending, seconds_spent

_RUN = ("config.yaml", "metrics.jsonl", "events.jsonl")  # a folder without any of them holds no run
_OURS = '<meta name="generator" content="fastdpo comparison">'
# Four colours that colour-blind people tell apart, each solid, dashed and dotted.
_LOOKS = [(c, style) for style in ("-", DASHED, DOTTED) for c in ("train", "held-out", "chosen", "rejected")]
_CHARTS: tuple[tuple, ...] = (  # (file name, title, unit, metric, levels to compare with)
    ("loss", "Loss", "loss", "loss", []),
    ("accuracy", "Accuracy over the reference", "share of pairs", "rewards/accuracies", [(0.5, "chance")]),
    ("margin", "Reward margin", "chosen − rejected", "rewards/margins", [(0.0, "the reference")]),
    ("reward_accuracy", "Accuracy of the rewards", "share of pairs", "accuracy", [(0.5, "chance")]),
    ("reward_margin", "Margin of the rewards", "chosen − rejected", "margin", []),
    ("kl", "KL from the reference", "nats a token", "kl", []),
    ("chosen", "Log-probability of the chosen", "nats a response", "logps/chosen", []),
    ("rejected", "Log-probability of the rejected", "nats a response", "logps/rejected", []),
    ("grad_norm", "Gradient norm", "norm before clipping", "grad_norm", []),
    ("learning_rate", "Learning rate", "", "learning_rate", []),
    ("pairs_per_second", "Pairs per second", "pairs/s", "pairs_per_second", []),
)


def report(runs: Sequence[Path], output: Path | None, console: Console) -> Path:
    """Writes the page and says where; also of runs that are going on, or were killed. Raises ConfigError."""
    runs = _checked(runs, console)
    try:
        if len(runs) == 1:
            if output is not None:
                raise ConfigError(
                    "--output is for a comparison of several runs; report.html stays in its run"
                )
            path = write_report(runs[0])
        else:
            path = output or _holding(runs) / "comparison.html"
            if path.exists() and (path.is_dir() or _OURS not in path.read_text("utf-8", "replace")[:2000]):
                raise ConfigError(
                    f"--output: {path} exists and is no comparison of runs; remove it, or name another file"
                )
            durable.write_text(path, render([read_run(run) for run in runs]))
    except OSError as error:
        raise ConfigError(f"report: cannot write: {error}") from None
    console.print(escape(f"{path}: open it in a browser"), highlight=False, soft_wrap=True)
    return path


def _holding(runs: Sequence[Path]) -> Path:
    """The folder that holds all of them."""
    common = Path(os.path.commonpath([run.absolute().parent for run in runs]))
    return common.relative_to(Path.cwd()) if common.is_relative_to(Path.cwd()) else common


def _checked(runs: Sequence[Path], console: Console) -> list[Path]:
    """The runs, without files that a pattern such as runs/* brings along, which are named."""
    files = [run for run in runs if run.is_file()] if len(runs) > 1 else []
    runs = [run for run in runs if run not in files]
    if files:
        console.print(escape(f"left out, as files are no run folders: {first_few(files)}"), soft_wrap=True)
    for run in runs:
        if not any((run / name).exists() for name in _RUN):
            inside = sorted({path.parent for name in _RUN for path in run.glob(f"*/{name}")})
            hint = f"; did you mean {first_few(inside)}?" if inside else ""
            if not run.exists():
                raise ConfigError(f"report: {run} does not exist{similar(run)}")
            raise ConfigError(f"report: {run} holds no run (none of {', '.join(_RUN)}){hint}")
    where = [run.resolve() for run in runs]
    if twice := [run for i, run in enumerate(runs) if where[i] in where[:i]]:
        raise ConfigError(f"report: {twice[0]} is named twice; name each run once")
    if not runs:
        raise ConfigError("report: which run? Name its folder, as in `fastdpo report runs/first`")
    if len(runs) > len(_LOOKS):
        raise ConfigError(
            f"report: {len(runs)} runs, and a page tells {len(_LOOKS)} apart at most; name fewer"
        )
    return list(runs)


def render(histories: list[RunHistory]) -> str:
    """The page. Raises ConfigError where no run has logged anything."""
    if not any(history.numbers for history in histories):
        raise ConfigError(
            "report: none of these runs has logged a number yet, so there is nothing to compare"
        )
    differ = beside.settings(histories)
    called = beside.names(histories, differ)
    at = [beside.scored_at(history) for history in histories]
    by_prompt = [beside.by_prompt(history, where) for history, where in zip(histories, at)]
    parts: dict[str, Any] = {
        "runs": [_run(*each) for each in zip(histories, called, beside.folders(histories), at)],
        "settings": [(key, list(map(beside.written, values))) for key, values in differ.items()],
        "machines": [
            (key, [str(v or "?") for v in values]) for key, values in beside.machines(histories).items()
        ],
        "rows": beside.rows(histories),
        "columns": beside.held_out(histories, at, by_prompt, differ),
        "prompts": beside.prompts(by_prompt),
        "looks": [{"colour": colour, "dashes": _dashes(style)} for colour, style in _LOOKS],
        "figures": _figures(histories, called),
        "samples": _samples(histories),
        "problems": [f"{n}: {p}" for n, h in zip(called, histories) for p in h.problems],
        "batches": "batch_size" in differ or any(key.endswith(": batch_size") for key in differ),
        "fields": FIELDS,
        "ours": _OURS,
        "written": datetime.now(UTC),
    }
    return template("compare.html.jinja").render(**parts)


def _run(history: RunHistory, name: str, folder: str, at) -> dict:
    """A run in a line: how it ended, how far it came, how fast it was."""
    how, spent = ending(history), seconds_spent(history)
    middle = lambda metric: significant(np.median(v), 3) if len(v := history.series(metric).value) else ""
    peak = history.series("peak_memory_gb").value
    prompts = history.series("eval_loss")
    return {
        "name": name,
        "folder": folder,
        "state": how["state"],
        "steps": f"{how['step']:,}" + (f" of {how['planned']:,}" if how["planned"] else ""),
        "took": duration(spent) if spent else "",
        "speed": middle("pairs_per_second"),
        "tokens": middle("tokens_per_second"),
        "memory": gigabytes(peak.max() * 1e9) if len(peak) else "",
        "rounds": {tile["title"]: tile for tile in round_tiles(history)},
        "scored": f"{at[1]:,}" if at else "",
        "lowest": _lowest(prompts, at) if at else "",
    }


def _lowest(loss, at) -> str:
    """Where another evaluation of the stage had a lower loss than the one shown."""
    loss = loss.of_stage(at[0])
    best = int(np.argmin(loss.value))
    return (
        "" if loss.step[best] == at[1] else f"{significant(loss.value[best])} at step {loss.step[best]:,.0f}"
    )


def _dashes(style) -> str:
    return "" if style == "-" else " ".join(f"{3 * part:g}" for part in style[1])


def _figures(histories: list[RunHistory], called: list[str]) -> dict[str, list[dict]]:
    """The curves over rounds, the held-out ones, then those of training; a chart where one of the runs has a
    curve in it."""
    ours = [mark for history in histories for mark in marks(history) if mark.is_stage]
    at = [Mark(step, label, True) for step, label in dict.fromkeys((m.step, m.label) for m in ours)]
    out: dict[str, list[dict]] = {"Of each round's samples": _over_rounds(histories, called)}
    for prefix, where in (("eval_", "On the held-out rows"), ("", "In training")):
        out[where] = []
        for name, title, unit, metric, levels in _CHARTS:
            curves = []
            for history, run, (colour, style) in zip(histories, called, _LOOKS):
                series = history.series(f"{prefix}{metric}")
                if metric == "rewards/accuracies":
                    series = series.where(~history.all_ties(series))
                if len(series):
                    curves.append(Curve(run, colour, series, bool(prefix), style))
            if any(len(curve.series) > 1 for curve in curves):
                chart = Chart(f"{prefix}{name}", title, unit, curves, list(levels), legend=False)
                facts = {"title": title, "words": f"{where}: {description(chart)}"}
                out[where].append(facts | {"svg": draw(chart, at, None)})
    return out


def _over_rounds(histories: list[RunHistory], called: list[str]) -> list[dict]:
    """Score, KL, length and ending of the runs with rounds."""
    out = []
    for name, title, unit, metric in ROUND_CHARTS:
        curves = []
        for history, run, (colour, style) in zip(histories, called, _LOOKS):
            series, error = over_rounds(history, metric), None
            if metric == SCORE:
                error = over_rounds(history, ERROR)
            if len(series):
                curves.append(Curve(run, colour, series, True, style, error))
        if any(len(curve.series) > 1 for curve in curves):
            chart = Chart(name, title, unit, curves, [], legend=False, of="round")
            out.append({"title": title, "words": description(chart), "svg": draw(chart, [], None)})
    return out


def _samples(histories: list[RunHistory]) -> list[dict]:
    """What each run completed last, and the first before, of the prompts that all runs completed."""
    of = [{(s["row"], s["prompt"]): s for s in samples(history)} for history in histories]
    shared = [key for key in of[0] if all(key in found for found in of)]
    text = lambda sample: sample["completion"] if sample else None
    out = []
    for key in shared:
        first, before = of[0][key], {text(found[key]["before"]) for found in of}
        after = [text(found[key]["after"]) for found in of]
        same = before.pop() if len(before) == 1 else None
        images = [found[key]["images"] for found in of]
        alike = images.count(images[0]) == len(images)  # where runs resize them, they differ
        out.append(
            {
                "prompt": first["prompt"],
                "row": key[0],
                "chosen": first["chosen"],
                "images": images[0] if alike else [],
                "own_images": [] if alike else images,
                "before": same,
                "after": after,
            }
        )
    return out
