"""What the blocks of README and docs are made of."""

from collections.abc import Sequence
from pathlib import Path

from fastdpo.console.formatting import significant


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], numbers: bool = True) -> str:
    """A table whose first column is text; the others are numbers, or text too."""
    lines = [header, ["---"] + ["--:" if numbers else "---"] * (len(header) - 1), *rows]
    return "\n".join("|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines)


def number(value: float) -> str:
    return significant(value, 3)


def where(record: dict) -> str:
    """The machine that a result is of."""
    n, cpu = record["threads"], record["cpu"]
    cores = f"{n} core{'s' if n > 1 else ''} of {'an' if cpu[:1] in 'AEIOU' else 'a'} {cpu}"
    return f"one {record['gpu']}" if record["gpu"] else cores


def link(path: Path, up: str = "") -> str:
    """To a result, from a page that lies `up` of the repository's root."""
    return f"[results]({up}benchmarks/results/{path.name})"
