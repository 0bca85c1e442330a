"""What a race says of each contender: pairs and tokens a second, memory, and how fastdpo is beside it."""

import statistics

import numpy as np

from benchmarks.steps.race import Contender, Entry, Race


def timed(contender: Contender, race: Race, pairs: int, tokens: float, our_tokens: float) -> dict:
    """What one contender's entry says, in pairs and tokens a second, beside fastdpo's. tokens: of one of
    its steps, and of fastdpo's."""
    entry = race.entries.get(contender.name) or Entry("time", "no time left")
    ours = race.entries[race.ours.name]
    compared = race.compared(contender, entry)
    ours_turns = race.ours_turns[entry.set_number or 0 :][:1]
    out = {
        "state": entry.state,
        "why": entry.why,
        "losses": [theirs for theirs, _ in compared],
        "largest_loss_difference": max((abs(a - b) for a, b in compared), default=None),
        "family": contender.family,
    }
    seconds = [s for turn in entry.turns for s in turn]
    if entry.state != "measured":
        return out
    if not seconds or not any(ours_turns):
        return out | {"state": "time", "why": "no time for a turn" + ("" if not seconds else " of fastdpo")}
    typical = statistics.mean(seconds) if contender.grouped else statistics.median(seconds)
    low, high = np.quantile(seconds, (0.25, 0.75)).tolist()
    memory, ours_memory = entry.memory, ours.memory
    return out | {
        "pairs_per_second": pairs / typical,
        "quartiles": [pairs / high, pairs / low],
        "slowest_and_fastest": [pairs / max(seconds), pairs / min(seconds)],
        "steps": len(seconds),
        "median_seconds": statistics.median(seconds),
        "useful_tokens_per_second": tokens / typical,
        "peak_gb": memory["peak_bytes"] / 1e9,
        "process_peak_gb": memory["resident_peak_bytes"] / 1e9,
        "paged_gb": memory.get("paged_bytes", 0) / 1e9,
        "fastdpo_times_faster": times_faster(contender, race, tokens / typical, our_tokens),
        "fastdpo_memory_ratio": ours_memory["peak_bytes"] / memory["peak_bytes"],
        "interleaved": entry.set_number is not None,
    }


def times_faster(contender: Contender, race: Race, tokens_per_second: float, our_tokens: float) -> float:
    """How many times faster fastdpo is: the median over the turns of their set, each beside its own. Of
    grouped rows, which are others in every turn, by useful tokens a second over all of them."""
    entry = race.entries[contender.name]
    alone, middle = entry.set_number is None, statistics.median
    ours = race.ours_turns[0 if alone else entry.set_number]
    if contender.grouped:
        return our_tokens / middle([s for turn in ours for s in turn]) / tokens_per_second
    if alone:
        return middle(map(middle, entry.turns)) / middle(map(middle, ours))
    return middle(middle(theirs) / middle(mine) for theirs, mine in zip(entry.turns, ours))


def mark_fastest(numbers: dict[str, dict]) -> None:
    """Sets fastest_of_family where the highest rate of a peer's settings is."""
    for family in {n["family"] for n in numbers.values()} - {None}:
        found = [n for n in numbers.values() if n["family"] == family and "pairs_per_second" in n]
        if found:
            max(found, key=lambda n: n["pairs_per_second"])["fastest_of_family"] = True
