"""What the doctor found, as a person reads it, and as text for a bug report."""

from fastdpo_kernels import tiles
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fastdpo.doctor.ladder import Choice
from fastdpo.doctor.trials import Outcome

_STYLES = {"right": "green", "inexact": "red", "failed": "red", "unknown": "yellow", "not here": "dim"}
_SHOWN: dict[str | None, str] = {"plain_triton": "triton, plain", "flash_attn": "flash-attn"}

Outcomes = dict[tuple[str, str], Outcome]  # (what, its rung, or "" where there is one way only) -> ...


def facts_table(facts: dict[str, str]) -> Table:
    table = Table.grid(Column(style="bold", no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, Text(value))
    return table


def outcomes_table(outcomes: Outcomes, choice: Choice) -> Table:
    """Each check and rung; the rung that a run takes is marked."""
    names, sizes = ("what", "by", ""), Column("error, allowed", overflow="fold")
    columns = (*(Column(name, no_wrap=True) for name in names), sizes)
    table = Table(*columns, title="Small problems against fp64", title_justify="left")
    last = None
    for (name, rung), outcome in outcomes.items():
        if last not in (None, name):
            table.add_section()
        taken = rung != "" and choice.taken.get(name) == rung
        by = Text(_SHOWN.get(rung, rung) + (" *" if taken else ""), style="bold" if taken else "")
        verdict = Text(outcome.verdict, style=_STYLES[outcome.verdict])
        table.add_row(name if name != last else "", by, verdict, Text(_words(outcome, brief=True)))
        last = name
    return table


def outcome_line(name: str, rung: str, outcome: Outcome) -> str:
    by = f" by {_SHOWN.get(rung, rung)}" if rung else ""
    return f"{name}{by}: {outcome.verdict} ({_words(outcome)}), {outcome.seconds:.1f} s"


def _words(outcome: Outcome, brief: bool = False) -> str:
    worst = outcome.worst
    if outcome.verdict != "right":
        return outcome.why
    assert worst is not None
    if not worst.allowed:
        return "the same bits"
    sizes = f"{worst.error:.1e}, {worst.allowed:.1e}"
    return sizes if brief else f"{worst.what}: {sizes} allowed"


def speed_table(speed: dict[str, dict]) -> Table:
    numbers = (Column(name, justify="right") for name in ("ms", "TFLOP/s", "of the GEMM"))
    title = "Speed in bf16, forward and backward"
    table = Table("what", "by", *numbers, title=title, title_justify="left")
    for name, run in speed.items():
        share = run["tflops"] / speed["GEMM"]["tflops"]
        cells = (f"{run['milliseconds']:.2f}", f"{run['tflops']:.1f}", f"{share:.0%}")
        table.add_row(name, _SHOWN.get(run["how"], run["how"]), *cells)
    return table


def ahead_of_time(triton: str | None) -> str:
    """What linear_logp would take on GPUs, told where there is none."""
    if triton is None:
        return "triton is not installed: on a GPU the lm_head would be computed by plain torch"
    chips = ", ".join(f"{major}.{minor}" for major, minor in sorted(chip for chip, _ in tiles.TILES))
    return (
        f"with triton {triton}, on a GPU of compute capability {chips}, linear_logp takes the Triton GEMM "
        "for bf16, with tiles that are compiled and not measured; on the others from 8.0 on, and for other "
        "dtypes, cuBLAS with Triton's row kernels"
    )


def taken_line(choice: Choice) -> str:
    taken = (f"{name}: {_SHOWN.get(rung, rung) or 'nothing is right'}" for name, rung in choice.taken.items())
    return "a run here takes (*) " + "; ".join(taken)


def report_text(facts, outcomes: Outcomes, choice: Choice, speed: dict | str) -> str:
    """All of it in lines, for a bug report."""
    lines = ["```", *(f"{name}: {value}" for name, value in facts.items())]
    told = set()
    for (name, rung), outcome in outcomes.items():
        lines.append(outcome_line(name, rung, outcome))
        if outcome.detail not in told:
            lines += [f"    {line}" for line in outcome.detail.splitlines()]
            told.add(outcome.detail)
    lines.append(taken_line(choice))
    if isinstance(speed, str):
        lines += [speed] if speed else []
        speed = {}
    for name, run in speed.items():
        size = f"{run['milliseconds']:.2f} ms, {run['tflops']:.1f} TFLOP/s"
        lines.append(f"{name} by {run['how']}: {size}")
    return "\n".join([*lines, "```"])


def print_report(console: Console, text: str) -> None:
    """Plain lines, that no width breaks."""
    console.print("\nFor a bug report:", style="bold")
    console.print(Text(text), highlight=False, soft_wrap=True)
