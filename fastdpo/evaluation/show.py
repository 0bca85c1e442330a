"""An evaluation in the console: the numbers of each model, and the paired tests."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastdpo.console.formatting import counted, percent, signed, significant
from fastdpo.evaluation.estimates import KINDS, Kind
from fastdpo.report.story import error_text

_COLOURS = {"better": "green", "worse": "red"}


def kind_of(number: str) -> Kind:
    """Also of `samples/wins over reference`."""
    name, _, other = number.partition(" over ")
    kind = KINDS[name]
    return kind._replace(title=f"{kind.title} over {called(other)}") if other else kind


def called(key: str) -> str:
    return {"model": "the model", "reference": "the reference", "versus": "the other model"}[key]


def with_error(number: str, found: dict[str, Any]) -> tuple[str, str]:
    """(the number as it is written, its standard error)."""
    write, error = kind_of(number).write, found["stderr"]
    value = "no number" if found["value"] is None else write(found["value"])
    return value, "" if error is None else error_text(error, write)


def test_words(test: dict[str, Any]) -> dict[str, str]:
    """A paired test's parts as they are written."""
    kind = kind_of(test["number"])
    change, error = test["difference"], test["error"]
    text = f"{signed(100 * change)} pp" if kind.write is percent else signed(change)
    against = "chance" if test["number"] == "samples/wins" else called(test["other"])
    title = f"{kind.title} over {called(test['other'])}" if against == "chance" else kind.title
    return {
        "title": title,
        "against": against,
        "difference": text,
        "error": "" if error is None else error_text(error, kind.write),
        "z": "" if test["z"] is None else significant(test["z"], 3),
        "p": "" if test["p"] is None else small(test["p"]),
        "verdict": test["verdict"],
    }


def small(p: float) -> str:
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def present(made: dict[str, Any]) -> list[str]:
    """The numbers that a model has, in their order."""
    return list(dict.fromkeys(name for some in made["numbers"].values() for name in some))


def data_line(made: dict[str, Any]) -> str:
    data = made["data"]
    sizes = ((data["rows"], "row"), (data["prompts"], "prompt"), (data["pairs"], "pair"))
    text = ", ".join(counted(*size) for size in sizes)
    if won := data["won_by_length"]:
        text += f"; the longer response is the chosen one in {percent(won['value'])} of pairs"
    return text


def show(made: dict[str, Any], console: Console) -> None:
    console.print(escape(data_line(made)), highlight=False, soft_wrap=True)
    table = Table(
        "number", *(f"{called(key)}\n{escape(Path(name).name)}" for key, name in made["names"].items())
    )
    for number in present(made):
        cells = []
        for key in made["names"]:
            found = made["numbers"][key].get(number)
            value, error = with_error(number, found) if found else ("", "")
            cells.append(f"{value} ± {error}" if error else value)
        table.add_row(kind_of(number).title, *cells)
    console.print(table)
    if made["tests"]:
        table = Table("the model against", "number", "difference", "z", "p", "verdict")
        for test in map(test_words, made["tests"]):
            verdict = test["verdict"]
            colour = _COLOURS.get(verdict)
            difference = f"{test['difference']} ± {test['error']}" if test["error"] else test["difference"]
            shown = f"[{colour}]{verdict}[/]" if colour else verdict
            table.add_row(test["against"], test["title"], difference, test["z"], test["p"], shown)
        console.print(table)
    for note in made["notes"]:
        console.print(escape(f"note: {note}"), highlight=False, soft_wrap=True)
