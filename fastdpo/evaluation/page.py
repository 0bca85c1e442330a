"""eval.html: an evaluation as a page, made of its result alone."""

from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.console.formatting import significant
from fastdpo.evaluation.show import called, data_line, kind_of, present, test_words, with_error
from fastdpo.report.page import template
from fastdpo.report.plots import draw_histogram

_SHOWN = 12  # prompts whose answers the page has; eval.json has all
_BINS = 24
_LOOKS = {"model": "train", "reference": "muted", "versus": "held-out"}


def page(made: dict[str, Any]) -> str:
    """The page."""
    names = made["names"]
    numbers = [
        {
            "title": kind_of(number).title,
            "cells": [_cell(made["numbers"][key].get(number), number) for key in names],
        }
        for number in present(made)
    ]
    return template("eval.html.jinja", Path(__file__).parent).render(
        made=made,
        called={key: called(key) for key in names},
        data=data_line(made),
        numbers=numbers,
        tests=[test_words(test) for test in made["tests"]],
        sources=_sources(made),
        figures=list(_figures(made)),
        answers=made["answers"][:_SHOWN],
    )


def _cell(found: dict | None, number: str) -> dict[str, str]:
    value, error = with_error(number, found) if found else ("", "")
    return {"value": value, "error": error}


def _sources(made: dict[str, Any]) -> dict[str, Any] | None:
    """A column each number and model that some source has."""
    if not made["sources"]:
        return None
    columns = [
        (key, number)
        for number in ("logps/accuracies", "rewards/accuracies", "rewards/margins", "loss", "kl")
        for key in made["names"]
        if any(number in source["numbers"].get(key, {}) for source in made["sources"])
    ]
    rows = [
        {
            "source": source["source"],
            "pairs": source["pairs"],
            "cells": [_cell(source["numbers"][key].get(number), number) for key, number in columns],
        }
        for source in made["sources"]
    ]
    return {"columns": [f"{kind_of(number).title}, {called(key)}" for key, number in columns], "rows": rows}


def _figures(made: dict[str, Any]):
    """Histograms of margins and of scores, where there are."""
    scores = {
        key: [one["score"] for entry in made["answers"] for one in entry["answers"][key] if "score" in one]
        for key in made["names"]
        if made["answers"]
    }
    for name, title, unit, count, values in (
        ("margins", "Reward margins", "chosen − rejected, over the reference", "pairs", made["margins"]),
        ("scores", "Scores", f"score by {made['settings']['scorer']}", "answers", scores),
    ):
        values = {key: some for key, some in values.items() if some}
        if not values:
            continue
        edges = np.histogram_bin_edges(np.concatenate(list(values.values())), _BINS)
        counts = {called(key): (_LOOKS[key], np.histogram(some, edges)[0]) for key, some in values.items()}
        middle = ", ".join(f"{called(key)} {significant(np.median(some))}" for key, some in values.items())
        words = f"Histogram of {title.lower()}. Medians: {middle}."
        svg = draw_histogram(name, title, (unit, count), edges, counts)
        yield {"title": title, "note": f"Medians: {middle}.", "words": words, "svg": svg}
