"""Where fastdpo stands beside TRL, in one table: what was measured on which machine, and what was not."""

from pathlib import Path

from benchmarks.results import RESULTS, newest_shown
from benchmarks.tables.blocks import measured, races
from benchmarks.tables.markdown import link, markdown, where


def steps(record: dict) -> str:
    """Beside the fastest setting of TRL in each race."""
    found = [measured(race) for _, _, race in races(record)]
    trl = [[r for name, r in race.items() if name.startswith("TRL")] for race in found if "fastdpo" in race]
    best = [max(rivals, key=lambda r: r["pairs_per_second"]) for rivals in trl if rivals]
    faster = [r["fastdpo_times_faster"] for r in best]
    return f"{_beside(faster, [r['fastdpo_memory_ratio'] for r in best])}, {where(record)}"


def dropin(record: dict) -> str:
    """TRL after one line beside itself."""
    sizes = [of for found in record["results"].values() for of in found["sizes"].values()]
    runs = [(of["stock"], of["patched"]) for of in sizes if "failed" not in of]
    faster = [patched["pairs_per_second"] / stock["pairs_per_second"] for stock, patched in runs]
    memory = [patched["peak_bytes"] / stock["peak_bytes"] for stock, patched in runs]
    return f"{_beside(faster, memory)}, {where(record)}"


def parity(record: dict) -> str:
    """The largest difference of a step's loss in each dtype."""
    found = [
        f"at most {r['largest_difference']:.0e} apart in {r['dtype']}" for r in record["results"].values()
    ]
    return f"{', '.join(found)}, {where(record)}"


def _beside(faster: list[float], memory: list[float]) -> str:
    return f"{_span(faster, '.1f')}x faster, {_span(memory, '.2f')}x memory"


def _span(values: list[float], form: str) -> str:
    least, most = format(min(values), form), format(max(values), form)
    return least if least == most else f"{least} to {most}"


ROWS = (
    ("optimizer steps, beside TRL at its fastest setting", "steps", steps),
    ("TRL's own trainer, after one line (`patch()`)", "dropin", dropin),
    ("the loss of each step, beside TRL's", "parity", parity),
)


def standing(folder: Path = RESULTS, up: str = "") -> str:
    """The table, and above it whether a GPU was there at all. A cell of what nobody measured says so."""
    cells = [[_cell(what, on, say, folder, up) for on in ("cpu", "gpu")] for _, what, say in ROWS]
    rows = [[label, *found] for (label, _, _), found in zip(ROWS, cells)]
    none = all(newest_shown(what, "gpu", folder)[1] is None for _, what, _ in ROWS)
    above = "**Nothing has been measured on a GPU yet.**\n\n" if none else ""
    return above + markdown(("fastdpo and TRL 1.16", "on a CPU", "on a GPU"), rows, numbers=False)


def _cell(what: str, machine: str, say, folder: Path, up: str) -> str:
    record, path = newest_shown(what, machine, folder)
    if path is None:
        return "not measured yet"
    return f"{say(record)} ({link(path, up)})" if record else "no numbers: the gate was red"
