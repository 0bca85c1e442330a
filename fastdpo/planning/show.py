"""A plan as a person reads it."""

from rich.markup import escape
from rich.table import Column, Table

from fastdpo.config.keys import Config
from fastdpo.config.reading import to_word
from fastdpo.config.rounds import sample_spec
from fastdpo.console.formatting import counted, duration, gigabytes
from fastdpo.planning.collectives import LINK_SHARE, NETWORK, Ranks
from fastdpo.planning.prediction import Prediction
from fastdpo.planning.ranks import GATHERED, KEPT, WHOLE, RankPlan, refusal
from fastdpo.planning.search import Option
from fastdpo.planning.step_time import SHARE, StepTime
from fastdpo.planning.target import SLACK, Target
from fastdpo.training.job import objective_of

_MEANINGS = {
    "weights": "as they are kept",
    "weight copies": "in the compute dtype, or dequantised",
    "saved activations": "what the forward keeps for the backward",
    "layer workspace": "of the layer at work, recomputed ones, cuBLAS",
    "attention workspace": "keys and values gathered for shared prompts, buffers of its backward",
    "head buffers": "of the lm_head: at most head_memory, and the scored rows",
    "generation's cache": "keys and values of the sequences that are sampled at once",
    "logits of a token": "of these sequences, in fp32, and what sampling makes of them",
    "reward model": "its weights, while it scores",
    "reference": "its log-probs wait on the host; no second model",
    "allocator slack": f"assumed: {SLACK:.0%} of what comes and goes",
    "CUDA context": "assumed, beside what torch allocates",
}


_PHASES = ["sampling", "scoring", "forward", "head", "backward", "optimizer step"]


def owners_table(prediction: Prediction, target: Target) -> Table:
    """The peak's bytes by owner."""
    title = f"Predicted peak: {gigabytes(prediction.total)}, in the {prediction.peak.where}"
    table = Table("owner", Column("bytes", justify="right"), "", title=title)
    sizes = prediction.peak.bytes | {"reference": 0}
    if not target.is_cpu:
        sizes |= {"allocator slack": prediction.slack, "CUDA context": prediction.context}
    for owner, size in sizes.items():
        if size or owner in ("gradients", "optimizer states", "reference"):
            table.add_row(owner, gigabytes(size), _MEANINGS.get(owner, ""))
    table.add_section()
    table.add_row("all", gigabytes(prediction.total), "")
    return table


def phase_lines(config: Config, prediction: Prediction) -> list[str]:
    """The peak of each phase of a round, and what these stand on."""
    spec = sample_spec(config.sample)
    sizes = {
        "optimizer step" if name == "optimizer" else name: size for name, size in prediction.phases.items()
    }
    in_order = sorted(sizes.keys() - {"before"}, key=_PHASES.index)
    lines = [f"phases of a round: {', '.join(f'{name} {gigabytes(sizes[name])}' for name in in_order)}"]
    if objective_of(config).needs_reference:
        lines[0] += "; the reference's pass takes no more than the forward"
    if spec.engine == "vllm":
        lines.append("sampling: by vLLM, in a process of its own that takes what is left; not in the plan")
    return [
        *lines,
        f"lengths are the worst case: every sample as long as max_new_tokens ({spec.max_new_tokens}), behind "
        "the longest prompts",
    ]


def way_out(prediction: Prediction) -> str:
    """What is left to do where no change of keys makes it fit."""
    if prediction.peak.where.startswith("sampling"):
        return "sample: {engine: vllm}, a process of its own, a smaller max_new_tokens or a larger card"
    return "a shorter max_length, a smaller model or a larger card"


def verdict(prediction: Prediction, budget: int | None) -> str:
    if budget is None:
        return "--memory 24GB would say whether it fits, and what to change"
    rest = budget - prediction.total
    if rest >= 0:
        return f"[green]fits[/] in {gigabytes(budget)}: {gigabytes(rest)} are left"
    return f"[red]does not fit[/] in {gigabytes(budget)}: {gigabytes(-rest)} too much"


def time_line(time: StepTime, target: Target, rounds: bool = False) -> str:
    """What a step is estimated to take."""
    also = "; the time of sampling and scoring is not estimated" if rounds else ""
    work = f"an optimizer step: {time.flops / 1e12:,.1f} TFLOP of matrix products"
    if target.card is None:
        return f"{work} (no time estimated: the card is not known; --card H100 names one){also}"
    rate = f"{SHARE:.0%} of {target.card.flops / 1e12:.0f} TFLOP/s"
    return f"{work}, about {duration(time.seconds)} (estimated at {rate}, not measured){also}"


def words(changes: dict) -> str:
    return ", ".join(f"{name}: {to_word(value)}" for name, value in changes.items()) or "as it is"


def order(option: Option) -> tuple:
    """What leaves the learning as it is first, by time, then what changes little. The rest stays as it was
    found, from what alters the learning least to what alters it most."""
    return (0, round(option.time.seconds, 1), len(option.changes)) if option.same_learning else (1,)


def options_table(options: list[Option], now: StepTime, budget: int, target: Target) -> Table:
    """What would make it fit, in `order`."""
    numbers = (Column(n, justify="right", overflow="fold") for n in ("peak", "fits", "time, estimated"))
    title = "What would make it fit, least cost in speed first"
    table = Table(Column("change", overflow="fold"), *numbers, title=title)
    same = True
    for option in sorted(options, key=order):
        if same and not option.same_learning:
            table.add_section()
            table.add_row(
                "[yellow]these change what is learnt, the least first; no run takes them by itself:"
            )
        same = option.same_learning
        size, cost = option.prediction.total, option.time.seconds / now.seconds - 1
        fits = "[green]yes" if size <= budget else f"[red]{gigabytes(size - budget)} over"
        slower = f"{cost:+.0%}" if cost < 2 else f"{1 + cost:.0f}x"
        table.add_row(words(option.changes), gigabytes(size), fits, slower)
    return table


def ranks_table(plans: list[RankPlan], ranks: Ranks, budget: int | None, target: Target) -> Table:
    """A line a mode: what each rank takes, whether that fits, how long a step takes, what is sent in it."""
    nodes = f" on each of {ranks.nodes} nodes" if ranks.nodes > 1 else ""
    title = f"Each of {counted(ranks.gpus, 'GPU')}{nodes}, predicted"
    names = ("kept", "gathered", "of the step", "all", "fits", "step", "speed", "sent a step")
    table = Table("mode", *(Column(name, justify="right") for name in names), title=title)
    for plan in plans:
        sizes, all_ = plan.prediction.peak.bytes, plan.prediction.total
        kept, gathered = (sum(sizes.get(name, 0) for name in some) for some in (KEPT, (GATHERED, WHOLE)))
        fits = "" if budget is None else "[green]yes" if all_ <= budget else "[red]no"
        time = ["", ""] if target.card is None else [duration(plan.seconds), f"{plan.speed:.1f}x"]
        parts = map(gigabytes, (kept, gathered, all_ - kept - gathered, all_))
        table.add_row(plan.mode, *parts, fits, *time, gigabytes(plan.sent))
    return table


def ranks_lines(
    config: Config, ranks: Ranks, mode: str, why: str, target: Target, images: bool = False
) -> list[str]:
    """Which mode the key takes, what refuses the others, and what the numbers stand on. images: rows have
    some."""
    lines = [f"{why}: [bold]{mode}[/]"]
    for other in ranks.modes:
        if why_not := refusal(config, other, ranks, images):
            lines.append(f"[yellow]{other} is not planned: {escape(why_not)}[/]")
    lines.append(
        "kept: weights, gradients, states; gathered: what sharding makes whole for a while; speed: times one "
        "GPU's, as if the same step fitted it"
    )
    if target.card is not None and ranks.all > 1:
        network = f", {NETWORK / 1e9:.0f} GB/s a GPU between nodes" if ranks.nodes > 1 else ""
        link = f"{target.card.link / 1e9:.0f} GB/s one way within a node"
        lines.append(f"assumed, not measured: {LINK_SHARE:.0%} of {link}{network} (docs/several_gpus.md)")
    return lines


def load_line(config: Config, loads, assumed: bool) -> str:
    """Which microbatch the peak is of."""
    groups, several = loads[0].groups, loads[0].several
    tokens, scored = sum(g.input_tokens for g in groups), sum(g.scored_tokens for g in groups)
    whose = "assumed (the data was not read)" if assumed else "of this data"
    size = f"{counted(len(groups), 'group')}, {tokens:,} tokens, {scored:,} scored"
    return f"largest microbatch, {whose}: {size}{', in a step of several' if several else ''}"
