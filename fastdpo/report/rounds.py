"""What the report says of a run with rounds: how its samples scored, round by round."""

from collections.abc import Callable
from functools import partial

import numpy as np

from fastdpo.config.rounds import SampleSpec, sample_spec
from fastdpo.console.formatting import counted, percent, signed, significant
from fastdpo.errors import ConfigError
from fastdpo.report.history import RunHistory, Series
from fastdpo.report.plots import Chart, Curve

SCORE, ERROR, KL = "objective/scores", "objective/scores_stderr", "objective/kl"
ENDED, LENGTH = "val/contain_eos_token", "completions/mean_length"
# (file name, title, unit, its number): what is drawn over rounds
CHARTS = (
    ("round_score", "Score", "mean score of the samples", SCORE),
    ("round_kl", "KL from the start", "nats a response", KL),
    ("round_length", "Length of the samples", "tokens", LENGTH),
    ("round_ended", "Samples that ended by themselves", "share", ENDED),
)
_LEFT_OUT = 0.05  # the share of samples cut at max_new_tokens from which they are pointed at


def rounds_of(history: RunHistory) -> list[dict]:
    """The `round` event of each round, in order: of one that was begun again after a stop the last, and none
    that lay behind the checkpoint from which the run went on, unless it came again."""
    found: dict[int, dict] = {}
    for event in history.happened("resume", "round"):
        if event["event"] == "round":
            found[int(event["round"])] = event
        elif isinstance(at := event.get("step"), int):
            found = {number: one for number, one in found.items() if one["step"] <= at}
    return [found[number] for number in sorted(found)]


def reward_of(history: RunHistory) -> str:
    """What scored the samples, by its name."""
    return str(history.config.get("reward") or "a reward that config.yaml would name")


def spec_of(history: RunHistory) -> SampleSpec:
    try:
        return sample_spec(history.config.get("sample"))
    except ConfigError:
        return SampleSpec()  # an option of another version


def over_rounds(history: RunHistory, name: str) -> Series:
    """A number of the rounds; its steps are rounds."""
    told = [(one["round"], _number(one, name)) for one in rounds_of(history)]
    points = [(number, value) for number, value in told if value is not None]
    number, value = np.array(points, float).reshape(-1, 2).T
    return Series(np.zeros(len(points)), number, value)


def _number(event: dict, name: str) -> float | None:
    """Of a round, where it is known and finite."""
    value = event.get(name)
    return value if isinstance(value, int | float) and np.isfinite(value) else None


def round_charts(history: RunHistory) -> list[Chart]:
    """Score, KL, length and the share that ended, over rounds, those that there are."""
    notes = {SCORE: _score, KL: _kl, LENGTH: _length, ENDED: _ended}
    out = []
    for name, title, unit, metric in CHARTS:
        series = over_rounds(history, metric)
        if len(series):
            error = over_rounds(history, ERROR) if metric == SCORE else None
            curve = Curve("samples", "train", series, dots=True, style="-", error=error)
            out.append(Chart(name, title, unit, [curve], [], note=notes[metric](history), of="round"))
    return out


def _score(history: RunHistory) -> str:
    penalty = spec_of(history).missing_eos_penalty
    note = f"By {reward_of(history)}. The band is one standard error over prompts; each round has its own."
    return note + (f" A sample that did not end in time has lost {penalty:g} of it." if penalty else "")


def _kl(history: RunHistory) -> str:
    spec = spec_of(history)
    note = "The mean over samples of log π − log π of the start, before the round trains."
    if (spec.temperature, spec.top_p) != (1.0, 1.0):
        note += " Samples of another temperature or top_p than 1 are not the policy's own: it has a bias."
    return note


def _length(history: RunHistory) -> str:
    spec, last = spec_of(history), rounds_of(history)[-1]
    text = f"At most {spec.max_new_tokens:,} (max_new_tokens)."
    cut = last["truncated"] / last["responses"]
    if cut > _LEFT_OUT:
        text += f" In the last round {percent(cut)} were cut there."
    return text


def _ended(history: RunHistory) -> str:
    return "With an end token before max_new_tokens; the others are scored as they were cut."


def kl_unknown(history: RunHistory) -> str:
    """Why no KL to the start is told, where it is not."""
    if not rounds_of(history) or len(over_rounds(history, KL)):
        return ""
    if history.config.get("lora_rank"):
        return (
            "The KL to the start is not known: the objective refers to nothing, so no log-probs of the start "
            "were computed. Nothing holds the policy near it: look at the samples."
        )
    return (
        "The KL to the start is not known: all weights train, and no copy of the start is kept. Each round "
        "refers to the one before, so the drift from the start is unbounded: look at the samples."
    )


def round_tiles(history: RunHistory) -> list[dict]:
    """The headline of such a run: its last round's samples beside the first's."""
    found = rounds_of(history)
    tiles = [
        _tile(found, SCORE, "Score", significant, True),
        _tile(found, KL, "KL from the start", significant),
        _tile(found, LENGTH, "Length, tokens", significant),
        _tile(found, ENDED, "Samples that ended", percent),
    ]
    return [tile for tile in tiles if tile]


def _tile(found: list[dict], name: str, title: str, written, higher_is_better: bool = False) -> dict | None:
    last = _number(found[-1], name) if found else None
    if last is None:
        return None
    first, error = _number(found[0], name), _number(found[-1], ERROR)
    tile = {"title": title, "after": written(last), "before": "", "change": "", "verdict": ""}
    if name == SCORE and error is not None:
        tile["error"] = significant(error, 2)
    if len(found) > 1 and first is not None and name != KL:  # which begins with 0
        change = last - first
        tile |= {"before": written(first)}
        tile |= {"change": f"{signed(100 * change)} pp" if written is percent else signed(change)}
        if higher_is_better and change:
            tile["verdict"] = "better" if change > 0 else "worse"
    return tile


def round_table(history: RunHistory) -> list[dict]:
    """A row a round, as text."""
    write: dict[str, tuple[str, Callable[..., str]]] = {
        "score": (SCORE, significant),
        "error": (ERROR, partial(significant, digits=2)),
        "spread": ("objective/scores_std", partial(significant, digits=3)),
        "kl": (KL, significant),
        "length": (LENGTH, partial(significant, digits=3)),
        "ended": (ENDED, percent),
        "ties": ("tied_pairs", "{:,}".format),
        "resets": ("resets", "{:,}".format),
    }
    return [
        {
            name: "" if (value := _number(one, key)) is None else written(value)
            for name, (key, written) in write.items()
        }
        | {"round": f"{one['round']:,}", "step": f"{one['step']:,}"}
        | {"signal": f"{one['prompts'] - one['no_signal']:,} of {one['prompts']:,}"}
        for one in rounds_of(history)
    ]


def extremes(history: RunHistory) -> list[dict]:
    """The best and the worst sample of the first, the middle and the last round."""
    found = rounds_of(history)
    places = sorted({0, len(found) // 2, len(found) - 1}) if found else []
    return [
        {"round": one["round"], "samples": [(what, one[what.lower()]) for what in ("Best", "Worst")]}
        for one in (found[place] for place in places)
    ]


def rounds_in_words(history: RunHistory) -> str:
    """`4 rounds of 24 prompts, 4 samples each, scored by reward.py:score`; empty without rounds."""
    if not (rounds := history.config.get("rounds")):
        return ""
    spec = spec_of(history)
    prompts, samples = counted(spec.prompts, "prompt"), counted(spec.responses, "sample")
    return f"{counted(rounds, 'round')} of {prompts}, {samples} each, scored by {reward_of(history)}"
