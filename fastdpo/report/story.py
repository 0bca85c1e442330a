"""How a run went, in words and a few numbers: the top of the report and its timeline."""

from datetime import datetime

import numpy as np

from fastdpo.config.reading import to_word
from fastdpo.console.formatting import about, counted, duration, gigabytes, percent, signed, significant
from fastdpo.report.history import RunHistory
from fastdpo.report.rounds import round_tiles, rounds_of

# (metric, what it is called, and at the top, how it is written, whether lower is better; None: neither)
_NUMBERS = (
    ("loss", "loss", "Loss", significant, True),
    ("accuracy", "accuracy", "Accuracy", percent, False),
    ("margin", "margin of the rewards", "Margin", significant, False),
    ("mean_reward", "mean reward", None, significant, None),
    ("rewards/accuracies", "accuracy over the reference", "Accuracy over the reference", percent, False),
    ("logps/accuracies", "accuracy of the policy alone", "Accuracy of the policy alone", percent, False),
    ("rewards/margins", "reward margin", "Reward margin", significant, False),
    ("kl", "KL from the reference, nats a token", "KL", significant, None),
    ("rewards/chosen", "reward of the chosen", None, significant, None),
    ("rewards/rejected", "reward of the rejected", None, significant, None),
    ("logps/chosen", "log-prob of the chosen, nats", None, significant, None),
    ("logps/rejected", "log-prob of the rejected, nats", None, significant, None),
    ("entropy", "entropy, nats a token", None, significant, None),
    ("mean_token_accuracy", "token accuracy on the chosen", None, percent, False),
)


def ending(history: RunHistory) -> dict:
    """How the run stands: a state for the eye, a headline, a sentence, the steps done."""
    step = history.last_step
    planned = sum(stage.get("steps") or 0 for stage in history.stages())
    n_stages = len(history.config.get("stages") or [0])
    known = len(history.stages()) == n_stages and planned
    rounds = rounds_of(history)
    known = known and not rounds  # prompts without a signal make a round shorter
    where = f"step {step:,} of {planned:,}" if known else f"step {step:,}"
    if rounds:
        where = f"round {rounds[-1]['round']} of {history.config.get('rounds', '?')}, {where}"
    last = (history.happened("start", "resume", "done", "stopped", "error") or [{}])[-1]
    spent = seconds_spent(history)
    took = f" after {duration(spent)}" if spent else ""
    way_on = "The same command with --resume goes on from the newest checkpoint."
    done = f"Finished in {duration(spent)}" if spent else "Finished"
    going_on = "It had not ended when this page was written; if its process is gone, it was killed."
    state, headline, text = {
        "done": ("done", done, ""),
        "stopped": ("stopped", f"Stopped by {last.get('signal') or 'a signal'} at {where}{took}", way_on),
        "error": ("failed", f"Failed at {where}{took}", str(last.get("message") or "")),
        None: ("unknown", f"At {where}", "events.jsonl does not say whether the run ended."),
    }.get(last.get("event"), ("running", f"At {where}{took}{_left(history)}", f"{going_on} {way_on}"))
    return {
        "state": state,
        "headline": headline,
        "text": text,
        "step": step,
        "planned": planned if known else None,
        "model": _which_weights(history, state),
    }


def ignored(history: RunHistory) -> list[str]:
    """Keys of another trainer's config that the run went on without, with what they said."""
    return [f"{key}: {to_word(value)}" for key, value in (history.config.get("ignore") or {}).items()]


def _left(history: RunHistory) -> str:
    """What the newest logged line knows of the time left."""
    stages = history.stages()
    left = history.series("seconds_left", stages[-1]["stage"]).value.tolist() if stages else []
    if not left or not left[-1]:
        return ""
    of = f" of stage {len(stages)}" if len(history.config.get("stages") or []) > 1 else ""
    return f", {about(left[-1])} left{of}"


def throughput(history: RunHistory) -> str:
    """How fast it went, in a line: the medians of what was logged."""
    median = lambda name: float(np.median(found)) if len(found := history.series(name).value) else None
    wording = {
        "pairs_per_second": lambda v: f"{significant(v, 3)} pairs/s",
        "tokens_per_second": lambda v: f"{significant(v, 3)} tokens/s",
        "tflops_per_second": lambda v: f"{significant(v, 3)} TFLOP/s",
        "mfu": lambda v: f"model FLOP utilisation {v:.0%}",
        "idle_share": lambda v: f"idle {v:.0%}",
    }
    return ", ".join(word(v) for name, word in wording.items() if (v := median(name)) is not None)


def _which_weights(history: RunHistory, state: str) -> str:
    """Which step's weights model/ holds, and whether others did better on the held-out rows."""
    stages = history.stages()
    if history.config.get("rounds"):  # the last are kept, whatever held-out rows say
        return ""
    if not stages or len(loss := history.series("eval_loss", stages[-1]["stage"])) < 2:
        return ""
    best = int(np.argmin(loss.value))
    at = lambda i: f"{significant(float(loss.value[i]))} at step {loss.step[i]:,.0f}"
    if best == len(loss) - 1:
        return f"The last held-out loss is also the lowest: {at(best)}."
    text = f"The lowest held-out loss was {at(best)}, the last {at(-1)}."
    if state == "done" and history.config.get("load_best"):
        return f"{text} load_best: the model is the checkpoint with the lowest."
    return f"{text} The model is the last; load_best: true would have kept the checkpoint with the lowest."


def seconds_spent(history: RunHistory) -> float:
    """Between the first and the last event of each process that worked on the run."""
    processes: list[list[datetime]] = [[]]
    for event in history.events:
        if at := moment(event):
            if event.get("event") in ("start", "resume"):
                processes.append([])
            processes[-1].append(at)
    return sum((times[-1] - times[0]).total_seconds() for times in processes if times)


def moment(event: dict) -> datetime | None:
    try:
        return datetime.fromisoformat(event["time"])
    except (KeyError, TypeError, ValueError):
        return None


def headline_numbers(history: RunHistory) -> list[dict]:
    """The last stage's loss, accuracy, margin and KL, before and after; of a run with rounds, how its samples
    scored."""
    if rounds_of(history):
        return round_tiles(history)
    last = (stage_tables(history) or [{"rows": []}])[-1]
    return [dict(row, title=row["tile"]) for row in last["rows"] if row["tile"]]


def stage_tables(history: RunHistory) -> list[dict]:
    """Each stage's numbers before, at its best held-out loss, and after."""
    out = []
    for stage in history.stages():
        number = stage["stage"]
        held_out = len(history.series("eval_loss", number)) > 1
        prefix = "eval_" if held_out else ""
        loss = history.series(f"{prefix}loss", number)
        if not len(loss):
            continue
        first, last = loss.step[0], loss.step[-1]
        best = loss.step[np.argmin(loss.value)] if held_out else first
        steps = (first, None if best in (first, last) else best, last)
        rows = [_row(history, history.series(f"{prefix}{n[0]}", number), steps, *n) for n in _NUMBERS]
        for metric, *_, written, _ in _NUMBERS if held_out else ():
            error = history.series(f"eval_{metric}_stderr", number).at(last)
            for row in rows:
                if row and row["metric"] == metric and error is not None:
                    row["error"] = error_text(error, written)
        if history.config.get("rounds"):
            alone = (
                {"logps/accuracies"} if history.reference_moves else {row["metric"] for row in rows if row}
            )
            rows = [row and _told(row, held_out and row["metric"] in alone) for row in rows]
        table = {"stage": number, "objective": stage["objective"], "held_out": held_out}
        table |= {"steps": steps if first < last else (None, None, last), "rows": list(filter(None, rows))}
        out.append(table)
    return out


def _told(row: dict, compares: bool) -> dict:
    """A row of a run with rounds, where a change is no better or worse if other samples train, or the
    reference has moved."""
    return row if compares else row | {"verdict": ""}


def error_text(error: float, written) -> str:
    """A standard error of a number that is written so."""
    return f"{significant(100 * error, 2)} pp" if written is percent else significant(error, 2)


def _row(history, series, steps, metric, title, tile, written, lower_is_better) -> dict | None:
    """One number at the first, the best (or None) and the last step."""
    before, best, after = (None if step is None else series.at(step) for step in steps)
    if after is None:
        return None
    write = lambda value: "" if value is None else written(value)
    row = {"metric": metric, "title": title, "tile": tile, "best": write(best), "after": write(after)}
    row |= {"before": "", "change": "", "verdict": ""}
    if metric == "rewards/accuracies" and history.all_ties(series.where(series.step == steps[0])).any():
        return row | {"before": "all ties"}
    if steps[0] == steps[2]:
        return row
    change = after - before if before is not None else 0.0
    better = None if lower_is_better is None or not change else (change < 0) == lower_is_better
    return row | {
        "before": write(before),
        "change": f"{signed(100 * change)} pp" if written is percent else signed(change),
        "verdict": {None: "", True: "better", False: "worse"}[better],
    }


def timeline(history: RunHistory, most_checkpoints: int) -> dict:
    """What happened when; of many checkpoints only the newest."""
    hidden = {id(event) for event in history.happened("checkpoint")[:-most_checkpoints]}
    start = next(filter(None, map(moment, history.events)), None)
    rows = []
    for event in history.events:
        if id(event) not in hidden:
            time, kind = moment(event), event.get("event", "")
            row = {"time": time.strftime("%Y-%m-%d %H:%M:%S") if time else ""}
            row |= {"since": duration((time - start).total_seconds()) if time and start else ""}
            rows.append(row | {"event": kind, "text": _TEXT.get(kind, _plain)(event)})
    return {"rows": rows, "hidden": len(hidden)}


def _plain(event: dict) -> str:
    return ", ".join(f"{k}: {v}" for k, v in event.items() if k not in ("time", "event"))


def _started(event: dict) -> str:
    from_where = f"from {event['checkpoint']}" if event.get("checkpoint") else "from the model as loaded"
    skipped = event.get("skipped") or {}
    skipped = skipped if isinstance(skipped, dict) else dict.fromkeys(skipped, "")
    return from_where + "".join(f"; passed over {name}: {why}" for name, why in skipped.items())


def _checkpoint(event: dict) -> str:
    text = f"{event['folder']}, {gigabytes(event['bytes'])} in {duration(event['seconds'])}"
    if event.get("eval_loss") is not None:
        text += f", held-out loss {significant(event['eval_loss'])}"
    return text + (", the best so far" if event.get("best") else "")


def _stage(event: dict) -> str:
    nouns = {"steps": "step", "groups": "prompt", "responses": "response"}
    return f"{event['objective']}: {', '.join(counted(event[key], noun) for key, noun in nouns.items())}"


def _reference(event: dict) -> str:
    source, misses = event.get("source"), event.get("misses") or 0
    if source == "columns":
        return f"{counted(event['responses'], 'response')}, from the data's own columns"
    if source == "cache" and not misses:
        return f"all {counted(event['hits'], 'response')} found in the cache"
    spent = f" in {duration(event['seconds'])}" if event.get("seconds") is not None else ""
    return f"{source}: {event.get('hits') or 0:,} found, {misses:,} computed{spent}"


def _pairs(event: dict) -> str:
    left, flipped = event.get("left_out") or {}, event.get("flipped_rows")
    text = f"{event['pairs']}: {counted(left.get('pairs', 0), 'pair')} left out"
    return text + (f", {counted(flipped, 'row')} flipped on purpose" if flipped is not None else "")


def _round(event: dict) -> str:
    error = event.get("objective/scores_stderr")
    text = f"round {event['round']}: score {significant(event['objective/scores'])}"
    text += f" ± {significant(error, 2)}" if error is not None else ""
    quiet = f", {counted(event['no_signal'], 'prompt')} without a signal" if event["no_signal"] else ""
    return f"{text} over {counted(event['responses'], 'sample')}{quiet}"


_TEXT = {
    "round": _round,
    "no_room": lambda e: f"{counted(e['rows'], 'row')} left out, whose prompts leave no room for a sample",
    "pairs": _pairs,
    "start": _started,
    "resume": _started,
    "checkpoint": _checkpoint,
    "stage": _stage,
    "reference": _reference,
    "drift": lambda e: (
        f"{significant(e['max_nats'], 2)} nats a token at most (bound {significant(e['bound'], 2)})"
    ),
    "stopped": lambda e: f"by {e.get('signal')}",
    "error": lambda e: str(e.get("message")),
    "done": lambda e: f"this process took {duration(e['seconds'])}" if e.get("seconds") else "",
}
