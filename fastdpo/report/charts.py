"""Which charts a run gets, and what to say under each: from its numbers alone."""

import numpy as np

from fastdpo.console.formatting import gigabytes, significant
from fastdpo.report.history import RunHistory, Series
from fastdpo.report.plots import Chart, Curve, Level, Mark

# The two ways a chart has its curves: (metric, label, colour) in training; the held-out ones are eval_*.
_ONE = lambda name: [(name, "training", "train"), (f"eval_{name}", "held-out", "held-out")]
_TWO = lambda name: [
    (f"{name}/chosen", "chosen", "chosen"),
    (f"{name}/rejected", "rejected", "rejected"),
    (f"eval_{name}/chosen", "chosen, held-out", "chosen"),
    (f"eval_{name}/rejected", "rejected, held-out", "rejected"),
]
_TRAIN = lambda name: [(name, "training", "train")]
_CHARTS = (  # (file name, title, unit, curves)
    ("loss", "Loss", "loss", _ONE("loss")),
    ("margin", "Reward margin", "chosen − rejected", _ONE("rewards/margins")),
    ("accuracy", "Accuracy", "share of pairs", _ONE("rewards/accuracies")),
    ("logps", "Log-probabilities", "nats a response", _TWO("logps")),
    ("rewards", "Rewards", "β · nats over the reference", _TWO("rewards")),
    ("kl", "KL from the reference", "nats a token", _ONE("kl")),
    ("grad_norm", "Gradient norm", "norm before clipping", _TRAIN("grad_norm")),
    ("learning_rate", "Learning rate", "", _TRAIN("learning_rate")),
    ("pairs_per_second", "Pairs per second", "pairs/s", _TRAIN("pairs_per_second")),
    ("tokens_per_second", "Tokens per second", "tokens/s", _TRAIN("tokens_per_second")),
    ("memory", "Peak memory", "GB", _TRAIN("peak_memory_gb")),
)


def charts(history: RunHistory) -> list[Chart]:
    """The charts that this run has numbers for."""
    out = []
    for name, title, unit, wanted in _CHARTS:
        curves = [_curve(history, *one) for one in wanted]
        curves = [curve for curve in curves if len(curve.step)]
        if curves:
            chart = Chart(name, title, unit, curves)
            _NOTES[name](history, chart)
            out.append(chart)
    return [chart for chart in out if chart.curves]


def drawable(chart: Chart) -> bool:
    """Whether there is a curve in it: a number that was logged once is better said."""
    return max(len(curve.step) for curve in chart.curves) > 1


def said(chart: Chart) -> str:
    """A chart of single points, in words."""
    points = [f"{significant(c.value[0])} ({c.label}, step {c.step[0]:,.0f})" for c in chart.curves]
    return f"{chart.title.lower()} {', '.join(points)}"


def marks(history: RunHistory) -> list[Mark]:
    """Where stages began, when there are several, and where a stopped run went on."""
    stages = history.stages()
    out = []
    if len(stages) > 1:
        for stage in stages:
            begins = [s.of_stage(stage["stage"]).step for s in history.numbers.values()]
            begins = [step.min() for step in begins if len(step)]
            if begins:
                out.append(Mark(float(min(begins)), str(stage["objective"] or stage["stage"]), True))
    resumed = sorted({e["step"] for e in history.happened("resume") if isinstance(e.get("step"), int)})
    out += [Mark(step, "" if i else "resumed", False) for i, step in enumerate(resumed)]
    return out


def _curve(history: RunHistory, name: str, label: str, colour: str) -> Curve:
    series = history.series(name)
    dots = name.startswith("eval_")
    return Curve(label, colour, series.step, series.value, series.stage, dots)


def description(chart: Chart) -> str:
    """The chart in words, for those who cannot see it."""
    ends = lambda v: f"from {significant(v[0])} to {significant(v[-1])}"
    parts = [f"{c.label} {ends(c.value)}" for c in chart.curves]
    first = min(int(c.step[0]) for c in chart.curves)
    last = max(int(c.step[-1]) for c in chart.curves)
    return f"{chart.title}, steps {first:,} to {last:,}: {'; '.join(parts)}."


def newest(history: RunHistory, name: str) -> tuple[str, Series]:
    """("held-out" or "training", the last stage's numbers), whichever there are."""
    stages = history.stages()
    last = stages[-1]["stage"] if stages else 0
    held_out = history.series(f"eval_{name}", last)
    if len(held_out) > 1:
        return "held-out", held_out
    return "training", history.series(name, last)


def _loss(history: RunHistory, chart: Chart) -> None:
    where, loss = newest(history, "loss")
    if where == "training":
        chart.note = "No held-out rows, so nothing here shows overfitting: eval_data: 0.05 splits some off."
        return
    best = int(np.argmin(loss.value))
    chart.note = f"Lowest held-out loss: {significant(loss.value[best])} at step {loss.step[best]:,.0f}."
    if best < len(loss) - 1 and loss.value[-1] > loss.value[best]:
        chart.note += f" It has risen to {significant(loss.value[-1])} since, a sign of overfitting."


def _margin(history: RunHistory, chart: Chart) -> None:
    chart.levels.append(Level(0.0, "the reference"))
    chart.note = "By how much the policy prefers the chosen response more than the reference does."


def _accuracy(history: RunHistory, chart: Chart) -> None:
    chart.levels.append(Level(0.5, "chance"))
    for curve in chart.curves:
        counts = ~history.all_ties(curve.stage, curve.step, curve.value)
        curve.step, curve.value, curve.stage = curve.step[counts], curve.value[counts], curve.stage[counts]
    chart.curves = [curve for curve in chart.curves if len(curve.step)]
    chart.note = "Pairs whose chosen response gained more over the reference than the rejected one."
    policy = history.series("eval_logps/accuracies")
    if len(policy):
        chart.note += (
            " Without the reference, the policy itself finds the held-out chosen response likelier in "
            f"{policy.value[-1]:.1%} of pairs."
        )


def _logps(history: RunHistory, chart: Chart) -> None:
    where, chosen = newest(history, "logps/chosen")
    _, rejected = newest(history, "logps/rejected")
    if not len(chosen):
        return
    if not len(rejected):
        chart.note = "The log-probability of the responses trained on."
        return
    fell, rejected_fell = (s.value[0] - s.value[-1] for s in (chosen, rejected))
    if fell > 0.005 * abs(chosen.value[0]):
        chart.note = (
            f"The chosen responses became less likely too, by {significant(fell)} nats ({where}), while the "
            f"rejected ones lost {significant(rejected_fell)}. This is a well-known symptom of DPO: only the "
            "difference is trained. Some fall is normal; if the completions below got worse, try a lower "
            "learning rate, a higher beta, or SFT on the chosen responses first."
        )
    else:
        chart.note = (
            "The chosen responses did not become less likely, as they often do in DPO "
            f"({where}: {significant(chosen.value[0])} to {significant(chosen.value[-1])} nats)."
        )


def _rewards(history: RunHistory, chart: Chart) -> None:
    chart.levels.append(Level(0.0, "the reference"))
    chart.note = "β times how much likelier each response became than under the reference."


def _kl(history: RunHistory, chart: Chart) -> None:
    chart.note = (
        "How far the policy has moved from the reference: Schulman's k2 estimate on the data's own tokens, "
        "not on text that the policy wrote."
    )


def _grad_norm(history: RunHistory, chart: Chart) -> None:
    value = chart.curves[0].value
    positive = value[value > 0]
    chart.log_scale = len(positive) == len(value) and positive.max() > 50 * positive.min()
    clip = history.config.get("max_grad_norm")
    if clip and len(value):
        if value.max() > 0.2 * clip:
            chart.levels.append(Level(float(clip), f"clip {clip:g}"))
        chart.note = f"Above the clip ({clip:g}) in {np.mean(value > clip):.0%} of the logged lines."


def _learning_rate(history: RunHistory, chart: Chart) -> None:
    name = history.config.get("lr_scheduler_type")
    chart.note = f"Schedule: {name}." if name else ""


def _median(unit: str):
    def note(history: RunHistory, chart: Chart) -> None:
        chart.note = f"Median {significant(float(np.median(chart.curves[0].value)), 3)} {unit}."

    return note


def _memory(history: RunHistory, chart: Chart) -> None:
    peak = gigabytes(chart.curves[0].value.max() * 1e9)
    chart.note = f"At most {peak}: of the GPU's allocator, or of the process where there is no GPU."


_NOTES = {
    "loss": _loss,
    "margin": _margin,
    "accuracy": _accuracy,
    "logps": _logps,
    "rewards": _rewards,
    "kl": _kl,
    "grad_norm": _grad_norm,
    "learning_rate": _learning_rate,
    "pairs_per_second": _median("pairs/s"),
    "tokens_per_second": _median("tokens/s, prompts counted once where they are shared"),
    "memory": _memory,
}
