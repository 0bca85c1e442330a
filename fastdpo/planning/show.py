"""A plan as a person reads it."""

from rich.console import Console
from rich.table import Table

from fastdpo.config.keys import Config
from fastdpo.config.reading import to_word
from fastdpo.console.formatting import counted, duration, gigabytes
from fastdpo.planning.allocations import OWNERS
from fastdpo.planning.prediction import Prediction
from fastdpo.planning.search import Option
from fastdpo.planning.step_time import SHARE, StepTime
from fastdpo.planning.target import SLACK, Target

_MEANINGS = {
    "weights": "as they are kept",
    "weight copies": "in the compute dtype, or dequantised",
    "saved activations": "what the forward keeps for the backward",
    "layer workspace": "of the layer at work, recomputed ones, cuBLAS",
    "attention workspace": "keys and values gathered for shared prompts, buffers of its backward",
    "head buffers": "of the lm_head: at most head_memory, and the scored rows",
    "reference": "its log-probs wait on the host; no second model",
    "allocator slack": f"assumed: {SLACK:.0%} of what comes and goes",
    "CUDA context": "assumed, beside what torch allocates",
}


def owners_table(prediction: Prediction, target: Target) -> Table:
    """The peak's bytes by owner."""
    table = Table(title=f"Predicted peak: {gigabytes(prediction.total)}, in the {prediction.peak.where}")
    table.add_column("owner")
    table.add_column("bytes", justify="right")
    table.add_column("")
    rows = [(owner, prediction.peak.bytes[owner]) for owner in OWNERS]
    rows.append(("reference", 0))
    if not target.is_cpu:
        rows += [("allocator slack", prediction.slack), ("CUDA context", prediction.context)]
    for owner, size in rows:
        if size or owner in ("gradients", "optimizer states", "reference"):
            table.add_row(owner, gigabytes(size), _MEANINGS.get(owner, ""))
    table.add_section()
    table.add_row("all", gigabytes(prediction.total), "")
    return table


def verdict(prediction: Prediction, budget: int | None) -> str:
    if budget is None:
        return "--memory 24GB would say whether it fits, and what to change"
    rest = budget - prediction.total
    if rest >= 0:
        return f"[green]fits[/] in {gigabytes(budget)}: {gigabytes(rest)} are left"
    return f"[red]does not fit[/] in {gigabytes(budget)}: {gigabytes(-rest)} too much"


def time_line(time: StepTime, target: Target) -> str:
    """What a step is estimated to take."""
    work = f"an optimizer step: {time.flops / 1e12:,.1f} TFLOP of matrix products"
    if target.card is None:
        return f"{work} (no time estimated: the card is not known; --card H100 names one)"
    rate = f"{SHARE:.0%} of {target.card.flops / 1e12:.0f} TFLOP/s"
    return f"{work}, about {duration(time.seconds)} (estimated at {rate}, not measured)"


def words(changes: dict) -> str:
    return ", ".join(f"{name}: {to_word(value)}" for name, value in changes.items()) or "as it is"


def order(option: Option) -> tuple:
    """What leaves the learning as it is first, then by time, then what changes little."""
    return not option.same_learning, round(option.time.seconds, 1), len(option.changes)


def options_table(options: list[Option], now: StepTime, budget: int, target: Target) -> Table:
    """What would make it fit, in `order`."""
    table = Table(title="What would make it fit, least cost in speed first")
    for name in ("change", "peak", "fits", "time, estimated"):
        table.add_column(name, justify="left" if name == "change" else "right", overflow="fold")
    told = False
    for option in sorted(options, key=order):
        if not option.same_learning and not told:
            table.add_section()
            table.add_row("[yellow]these change what is learnt; no run takes them by itself:", "", "", "")
            told = True
        size, cost = option.prediction.total, option.time.seconds / now.seconds - 1
        fits = "[green]yes" if size <= budget else f"[red]{gigabytes(size - budget)} over"
        slower = f"{cost:+.0%}" if cost < 2 else f"{1 + cost:.0f}x"
        table.add_row(words(option.changes), gigabytes(size), fits, slower)
    return table


def load_line(config: Config, loads, assumed: bool) -> str:
    """Which microbatch the peak is of."""
    load = loads[0]
    places = sum(group.input_tokens for group in load.groups)
    scored = sum(group.scored_tokens for group in load.groups)
    whose = "assumed (the data was not read)" if assumed else "of this data"
    more = ", in a step of several" if load.several else ""
    groups = counted(len(load.groups), "group")
    return f"largest microbatch, {whose}: {groups}, {places:,} tokens, {scored:,} scored{more}"


def print_plan(console: Console, prediction: Prediction, target: Target, lines: list[str]) -> None:
    console.print(owners_table(prediction, target))
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
