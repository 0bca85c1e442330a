"""Which charts a run gets, and what to say under each: from its numbers alone."""

import numpy as np

from fastdpo.console.formatting import gigabytes, significant
from fastdpo.report.history import RunHistory, Series
from fastdpo.report.plots import Chart, Curve, Mark

_CURVES = (  # (its number, for a chart's metric in place of {}; label; colour): a chart has those there are
    ("{}", "training", "train"),
    ("eval_{}", "held-out", "held-out"),
    ("{}/chosen", "chosen", "chosen"),
    ("{}/rejected", "rejected", "rejected"),
    ("eval_{}/chosen", "chosen, held-out", "chosen"),
    ("eval_{}/rejected", "rejected, held-out", "rejected"),
)


def charts(history: RunHistory) -> list[Chart]:
    """The charts that this run has numbers for."""
    out = []
    for name, title, unit, metric, levels, note in _CHARTS:
        curves = []
        for number, label, colour in _CURVES:
            series = history.series(number.format(metric))
            if name == "accuracy":
                series = series.where(~history.all_ties(series))
            if len(series):
                curves.append(Curve(label, colour, series, dots=number.startswith("eval_")))
        if curves:
            chart = Chart(name, title, unit, curves, list(levels))
            chart.note = note if isinstance(note, str) else note(history, chart)
            out.append(chart)
    return out


def drawable(chart: Chart) -> bool:
    """Whether there is a curve in it: a number that was logged once is better said."""
    return max(len(curve.series) for curve in chart.curves) > 1


def said(chart: Chart) -> str:
    """A chart of single points, in words."""
    points = [
        f"{significant(c.series.value[0])} ({c.label}, step {c.series.step[0]:,.0f})" for c in chart.curves
    ]
    return f"{chart.title.lower()} {', '.join(points)}"


def description(chart: Chart) -> str:
    """The chart in words, for those who cannot see it."""
    ends = lambda v: f"from {significant(v[0])} to {significant(v[-1])}"
    parts = [f"{c.label} {ends(c.series.value)}" for c in chart.curves]
    first = min(int(c.series.step[0]) for c in chart.curves)
    last = max(int(c.series.step[-1]) for c in chart.curves)
    return f"{chart.title}, {chart.of.split()[-1]}s {first:,} to {last:,}: {'; '.join(parts)}."


def marks(history: RunHistory) -> list[Mark]:
    """Where stages began, when there are several, and where a stopped run went on."""
    stages = history.stages()
    out = []
    for stage in stages if len(stages) > 1 else []:
        begins = [series.of_stage(stage["stage"]).step for series in history.numbers.values()]
        begins = [step.min() for step in begins if len(step)]
        if begins:
            out.append(Mark(float(min(begins)), str(stage["objective"] or stage["stage"]), True))
    resumed = sorted({e["step"] for e in history.happened("resume") if isinstance(e.get("step"), int)})
    return out + [Mark(step, "" if i else "resumed", False) for i, step in enumerate(resumed)]


def _newest(history: RunHistory, name: str) -> tuple[str, Series]:
    """("held-out" or "training", the last stage's numbers), whichever there are."""
    stages = history.stages()
    last = stages[-1]["stage"] if stages else 0
    held_out = history.series(f"eval_{name}", last)
    if len(held_out) > 1:
        return "held-out", held_out
    return "training", history.series(name, last)


def _loss(history: RunHistory, chart: Chart) -> str:
    where, loss = _newest(history, "loss")
    if history.config.get("rounds"):
        return "Each round has samples of its own, so that its loss is not that of the round before."
    if where == "training":
        return "No held-out rows, so nothing here shows overfitting: eval_data: 0.05 splits some off."
    best = int(np.argmin(loss.value))
    note = f"Lowest held-out loss: {significant(loss.value[best])} at step {loss.step[best]:,.0f}."
    if loss.value[-1] > loss.value[best]:
        note += f" It has risen to {significant(loss.value[-1])} since, a sign of overfitting."
    return note


def _accuracy(history: RunHistory, chart: Chart) -> str:
    note = "Pairs whose chosen response gained more over the reference than the rejected one."
    policy = history.series("eval_logps/accuracies").value
    if not len(policy):
        return note
    if history.reference_moves:
        note += " The reference is each round's start."
    alone = "Without the reference, the policy itself finds the held-out chosen response likelier in"
    return f"{note} {alone} {policy[-1]:.1%} of pairs."


def _logps(history: RunHistory, chart: Chart) -> str:
    (where, chosen), (_, rejected) = (_newest(history, f"logps/{which}") for which in ("chosen", "rejected"))
    if not len(chosen):
        return ""
    if not len(rejected):
        return "The log-probability of the responses trained on."
    if history.config.get("rounds"):
        return "In training of each round's own samples, which the policy itself finds likely."
    fell, rejected_fell = (s.value[0] - s.value[-1] for s in (chosen, rejected))
    if fell > 0.005 * abs(chosen.value[0]):
        return (
            f"The chosen responses became less likely too, by {significant(fell)} nats ({where}), while the "
            f"rejected ones lost {significant(rejected_fell)}. This is a well-known symptom of DPO: only the "
            "difference is trained. Some fall is normal; if the completions below got worse, try a lower "
            "learning rate, a higher beta, or SFT on the chosen responses first."
        )
    return (
        "The chosen responses did not become less likely, as they often do in DPO "
        f"({where}: {significant(chosen.value[0])} to {significant(chosen.value[-1])} nats)."
    )


def _grad_norm(history: RunHistory, chart: Chart) -> str:
    value = chart.curves[0].series.value
    chart.log_scale = value.min() > 0 and value.max() > 50 * value.min()
    clip = history.config.get("max_grad_norm")
    if not clip:
        return ""
    if value.max() > 0.2 * clip:
        chart.levels.append((float(clip), f"clip {clip:g}"))
    return f"Above the clip ({clip:g}) in {np.mean(value > clip):.0%} of the logged lines."


def _learning_rate(history: RunHistory, chart: Chart) -> str:
    name = history.config.get("lr_scheduler_type")
    return f"Schedule: {name}." if name else ""


def _median(unit: str):
    return lambda history, chart: f"Median {significant(np.median(chart.curves[0].series.value), 3)} {unit}."


def _memory(history: RunHistory, chart: Chart) -> str:
    peak = gigabytes(chart.curves[0].series.value.max() * 1e9)
    return f"At most {peak}: of the GPU's allocator, or of the process where there is no GPU."


def _kl(history: RunHistory, chart: Chart) -> str:
    text = "How far the policy has moved from the reference: Schulman's k2 estimate on "
    if not history.config.get("rounds"):
        return f"{text}the data's own tokens, not on text that the policy wrote."
    return (
        text + "the tokens trained on, since the round began."
        if history.reference_moves
        else f"{text}the tokens trained on."
    )


_REFERENCE = [(0.0, "the reference")]
_MARGIN = "By how much the policy prefers the chosen response more than the reference does."
_REWARDS = "β times how much likelier each response became than under the reference."
_RIGHT = "Pairs whose chosen response has the higher reward."
_NOT_ITS_SIZE = (
    "How far apart the rewards of a pair are. Only differences are trained, so rewards have no zero."
)


def _share(of: str):
    return lambda history, chart: f"Median {np.median(chart.curves[0].series.value):.0%} {of}."


_MFU = _share(
    "of the GPU's dense bf16 rate by its data sheet: what a step cannot do without, each shared prompt once, "
    "only scored rows of the lm_head, nothing that is computed a second time"
)
_IDLE = _share(
    "of the time: on a GPU between microbatches and updates, on a CPU of its threads, which also wait where "
    "other processes have the cores"
)
_ONCE = _median("tokens/s, prompts counted once where they are shared")
_CHARTS: tuple[tuple, ...] = (
    # (file name, title, unit, metric, levels to compare with, note or what writes it)
    ("loss", "Loss", "loss", "loss", [], _loss),
    ("margin", "Reward margin", "chosen − rejected", "rewards/margins", _REFERENCE, _MARGIN),
    ("accuracy", "Accuracy", "share of pairs", "rewards/accuracies", [(0.5, "chance")], _accuracy),
    ("reward_margin", "Margin", "reward of chosen − rejected", "margin", [], _NOT_ITS_SIZE),
    ("reward_accuracy", "Accuracy", "share of pairs", "accuracy", [(0.5, "chance")], _RIGHT),
    ("mean_reward", "Mean reward", "reward", "mean_reward", [], "Over chosen and rejected responses."),
    ("logps", "Log-probabilities", "nats a response", "logps", [], _logps),
    ("rewards", "Rewards", "β · nats over the reference", "rewards", _REFERENCE, _REWARDS),
    ("kl", "KL from the reference", "nats a token", "kl", [], _kl),
    ("grad_norm", "Gradient norm", "norm before clipping", "grad_norm", [], _grad_norm),
    ("learning_rate", "Learning rate", "", "learning_rate", [], _learning_rate),
    ("pairs_per_second", "Pairs per second", "pairs/s", "pairs_per_second", [], _median("pairs/s")),
    ("tokens_per_second", "Tokens per second", "tokens/s", "tokens_per_second", [], _ONCE),
    ("mfu", "Model FLOP utilisation", "share of the peak", "mfu", [], _MFU),
    ("idle_share", "Idle share", "share of the time", "idle_share", [], _IDLE),
    ("memory", "Peak memory", "GB", "peak_memory_gb", [], _memory),
)
