"""`report.html`: what happened in a run, made from the run folder's files alone, whenever one likes."""

import functools
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from fastdpo.config.keys import FIELDS
from fastdpo.console.formatting import counted, duration, first_few, percent, significant
from fastdpo.data.report import MEANING
from fastdpo.files import durable
from fastdpo.report.charts import charts, description, drawable, marks, said
from fastdpo.report.history import RunHistory, read_run
from fastdpo.report.plots import Chart, Mark, draw, draw_lengths
from fastdpo.report.rounds import extremes, kl_unknown, round_charts, round_table, rounds_in_words
from fastdpo.report.story import ending, headline_numbers, ignored, stage_tables, throughput, timeline

_LONGEST = 6000  # characters of a prompt or completion that the page shows
_CHECKPOINTS = 20  # that the timeline shows


def write_report(run: Path, ended: bool = True) -> Path:
    """Writes report.html, and plots/*.png where the run has ended, into its folder; returns the page's
    path.

    Whatever is missing or damaged there is named on the page. Raises OSError where nothing can be
    written; an earlier report then stays as it was.
    """
    run = Path(run)
    history = read_run(run)
    history.plots = run / "plots" if ended else None
    (run / "plots").mkdir(exist_ok=True)
    durable.write_text(run / "report.html", render(history))
    return run / "report.html"


def render(history: RunHistory) -> str:
    """The page; its charts are also written into plots/."""
    sections = {
        "facts": _facts,
        "ending": ending,
        "ignored": ignored,
        "headline": headline_numbers,
        "stage_tables": stage_tables,
        "figures": _figures,
        "said": lambda h: [said(c) for c in charts(h) if not drawable(c)],
        "rounds": round_table,
        "round_figures": lambda h: _drawn(h, round_charts(h), []),
        "kl_unknown": kl_unknown,
        "extremes": extremes,
        "samples": samples,
        "data": _data,
        "lengths": _lengths,
        "stages": lambda h: [s for s in h.stages() if "first_step_tokens" in s],
        "throughput": throughput,
        "timeline": lambda h: timeline(h, _CHECKPOINTS),
        "environment": _environment,
    }
    parts: dict[str, Any] = {}
    for name, build in sections.items():
        try:
            parts[name] = build(history)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            parts[name] = None  # a file that is JSON, but not what a run writes
            why = f"{type(error).__name__}: {error}"
            history.problems.append(f"The part '{name}' of this report could not be made ({why}).")
    parts |= {"written": datetime.now(UTC), "fields": FIELDS}
    return template("report.html.jinja").render(history=history, **parts)


@functools.cache
def template(name: str, folder: Path | None = None):
    """A page of this folder, or of another one, with the filters that pages use."""
    here = FileSystemLoader([folder or Path(__file__).parent, Path(__file__).parent])
    environment = Environment(loader=here, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    for filter in (significant, percent, duration, counted, first_few, shortened, spoken):
        environment.filters[filter.__name__] = filter
    return environment.get_template(name)


def shortened(text, where: str = "samples.jsonl") -> str:
    """Very long texts end with how much was left out, and where it is."""
    text = str(text)
    rest = len(text) - _LONGEST
    return text if rest <= 0 else f"{text[:_LONGEST]}\n[... {rest:,} more characters in {where}]"


def spoken(turns) -> str:
    """A conversation, each turn behind its role; text as it is."""
    if isinstance(turns, str):
        return turns
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def _facts(history: RunHistory) -> dict:
    """What was trained on what, in a line."""
    config, data = history.config, history.data.get("data") or {}
    names = {"sigmoid": "DPO", "sft": "SFT", "bradley_terry": "A reward model"}
    begun = [stage["objective"] for stage in history.stages()]
    wanted = [history.objective(stage) for stage in range(len(config.get("stages") or [0]))]
    objectives = [str(objective or "training") for objective in begun or wanted]
    lora = config.get("lora_rank")
    frozen = "images" in data.get("notes", ()) and config.get("freeze_vision")
    trained = "all weights of the language model" if frozen else "all weights"
    return {
        "name": history.run.resolve().name,
        "model": config.get("model", "a model that config.yaml would name"),
        "objectives": " then ".join(names.get(name, name) for name in objectives),
        "rounds": rounds_in_words(history),
        "how": f"LoRA of rank {lora}" if lora else trained,
        "rows": history.rows_kept,
        "source": data.get("source") or config.get("data"),
        "writes": "bradley_terry" not in objectives,
        "has_model": any((history.run / "model").glob("*.safetensors")),
    }


def _figures(history: RunHistory) -> list[dict]:
    return _drawn(history, charts(history), marks(history))


def _drawn(history: RunHistory, some: list[Chart], at: list[Mark]) -> list[dict]:
    return [
        {"title": c.title, "note": c.note, "words": description(c), "svg": draw(c, at, history.plots)}
        for c in some
        if drawable(c)
    ]


def _lengths(history: RunHistory) -> dict | None:
    lengths = (history.data.get("data") or {}).get("lengths")
    if not lengths or not sum(lengths["counts"]):
        return None
    note = ", ".join(f"{name} {lengths[name]:,}" for name in ("p50", "p90", "p99", "max"))
    words = f"Histogram of the training responses' lengths with their prompts, in tokens: {note}."
    limit = history.config.get("max_length")
    svg = draw_lengths(lengths["edges"], lengths["counts"], limit, history.plots)
    return {"title": "Lengths", "note": f"Prompt + response in tokens: {note}.", "words": words, "svg": svg}


def samples(history: RunHistory) -> list[dict]:
    """One entry a prompt: its first completion and, where there is a later one, its last; those that changed
    come first."""
    found: dict[tuple, dict] = {}
    for sample in history.samples:
        entry = found.setdefault((sample.get("row"), sample.get("prompt")), {"before": None, "after": None})
        entry |= {name: sample.get(name) for name in ("row", "prompt", "turns", "chosen")}
        entry["images"] = [_image(image) for image in sample.get("images", ())]
        if sample.get("when") != "start":
            entry["after"] = sample
        elif not entry["before"]:
            entry["before"] = sample
    for entry in found.values():
        before, after = entry["before"], entry["after"]
        entry["changed"] = before and after and before.get("completion") != after.get("completion")
    return sorted(found.values(), key=lambda entry: not entry["changed"])


def _image(image: dict) -> dict:
    """What data.images.shown tells of one, in words."""
    width, height = image["size"]
    return image | {"size": f"{width:d}x{height:d}", "tokens": counted(image["tokens"], "token")}


def _data(history: RunHistory) -> list[dict]:
    """The account of each data set, its notes with their meaning."""
    out = []
    for name, title in (("data", "training"), ("eval_data", "held-out")):
        report = dict(history.data.get(name) or {})
        if "rows" in report and "kept" in report:
            rows, dropped, notes = max(report["rows"], 1), report["dropped"].items(), report["notes"].items()
            report["dropped"] = [dict(tally, name=n, share=tally["rows"] / rows) for n, tally in dropped]
            report["notes"] = [dict(tally, name=n, meaning=MEANING.get(n, "")) for n, tally in notes]
        if report:
            out.append(dict(report, title=title))
    return out


def _environment(history: RunHistory) -> list[dict]:
    """What the run ran on; again where a resumed run found something else."""
    out: list[dict] = []
    for event in history.happened("start", "resume"):
        ran = {key: event[key] for key in ("versions", "device", "git_sha", "command") if event.get(key)}
        if ran and (not out or ran != out[-1]["ran"]):
            out.append({"event": event["event"], "ran": ran})
    return out
