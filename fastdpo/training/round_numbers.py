"""What a round's samples were like, in numbers, by TRL's names where it has them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastdpo.data.store.stored import facts_of
from fastdpo.records import Groups
from fastdpo.reference.fill import ReferenceTable
from fastdpo.sampling.rows import Answered

_BINS = 8


def numbers_of(
    rows: Sequence[Answered], groups: Groups, known: Mapping[str, ReferenceTable]
) -> dict[str, Any]:
    """Of scored samples. objective/kl: nats a response, mean(log pi - log pi_0) over the samples (of
    temperature 1 an unbiased estimate), where the log-probs of the start are `known`; it is the plain mean,
    for the k3 form explodes over whole sequences."""
    scores = np.array([one.scores for one in rows])  # [prompts, responses]
    flat = [(one, response) for one in rows for response in one.responses]
    ended = np.array([response["ended"] for _, response in flat])
    lengths = np.array([len(response["ids"]) for _, response in flat])
    ordered = sorted(flat, key=lambda pair: pair[1]["score"])
    n = scores.shape[1]
    ties = sum(n * (n - 1) // 2 - len(group.pairs) for group in groups)
    numbers: dict[str, Any] = {
        "objective/scores": float(scores.mean()),
        "objective/scores_std": float(scores.std()),
        "objective/scores_stderr": _stderr(scores.mean(1)),
        "val/contain_eos_token": float(ended.mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": int(lengths.max()),
        "prompts": len(rows),
        "responses": len(flat),
        "truncated": int((~ended).sum()),
        "tied_pairs": ties,
        "no_signal": sum(not group.pairs for group in groups),
        "resets": sum(one.forced > 0 for one in rows),
        "forced_tokens": sum(one.forced for one in rows),
        "best": _shown(*ordered[-1]),
        "worst": _shown(*ordered[0]),
    }
    if "start" in known:
        facts = facts_of(groups)
        numbers["objective/kl"] = float((known["now"].sums(facts) - known["start"].sums(facts)).mean())
    return numbers


def _stderr(means: np.ndarray) -> float | None:
    return float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None


def _shown(one: Answered, response: Mapping[str, Any]) -> dict[str, Any]:
    return {"row": one.row, "prompt": one.prompt, "text": response["text"], "score": response["score"]}


def quiet_rounds(number: int, rows: Sequence[Answered], ends: bool) -> str:
    """Why a run goes on no more of which two rounds have taught nothing. ends: it has learnt before."""
    counts, edges = np.histogram([score for one in rows for score in one.scores], bins=_BINS)
    bars = ", ".join(
        f"{count} in [{a:.3g}, {b:.3g}]" for count, a, b in zip(counts, edges, edges[1:]) if count
    )
    if ends:
        return (
            f"rounds {number - 1} and {number} have no signal any more ({bars}): the run ends here, with "
            "what it has learnt before"
        )
    return (
        f"rounds {number - 1} and {number} have no signal: to each prompt all samples score the same "
        f"({bars}). Look at what `reward` gives, ask for more responses or a higher temperature, or take "
        "other prompts"
    )
