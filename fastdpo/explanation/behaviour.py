"""What became of the model's behaviour on the rows: log-ratios, margins, exact KLs, by position and token."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastdpo.console.formatting import all_ties
from fastdpo.evaluation.estimates import Estimate
from fastdpo.evaluation.kl import log_softmax
from fastdpo.explanation.capture import Seen
from fastdpo.explanation.rows import Rows

KL_TOKENS = 8192  # at most, on which the KL over the whole vocabulary is computed
_AT_ONCE = 256  # of them
_SHOWN = 20  # tokens
_FEWEST = 3  # times that a token has to occur to be shown


def behaviour(
    rows: Rows, before: Seen, after: Seen, heads: tuple[dict, dict], tokenizer, *, device, seed: int
) -> dict[str, Any]:
    """The part "behaviour" of explain.json. heads: of `kl.head_of`, before's and after's."""
    at = rows.some_tokens(KL_TOKENS, seed)
    forward, reverse = kls(before.hidden[at], after.hidden[at], heads, device)
    change = after.token_logp.double() - before.token_logp.double()
    numbers = dict(_numbers(rows, before, after, change))
    numbers["kl/forward"] = rows.mean_of_tokens(forward, at)
    numbers["kl/reverse"] = rows.mean_of_tokens(reverse, at)
    return {
        "numbers": {name: {"value": one.value, "error": one.error} for name, one in numbers.items()},
        "kl_tokens": len(at),
        "by_position": list(_by_position(rows, change, reverse, at)),
        "tokens": _by_token(rows, change, tokenizer),
    }


@torch.no_grad()
def kls(before: Tensor, after: Tensor, heads: tuple[dict, dict], device) -> tuple[Tensor, Tensor]:
    """(KL(before || after), KL(after || before)) of each token, f64[K] in nats, over the whole vocabulary, of
    final hidden states [K, D] and lm_heads."""
    heads = tuple(on(head, device) for head in heads)  # type: ignore[assignment]
    forward, reverse = [], []
    for h, h_after in zip(before.split(_AT_ONCE), after.split(_AT_ONCE)):
        old = log_softmax(h.to(device), **heads[0])
        new = log_softmax(h_after.to(device), **heads[1])
        apart = new - old
        reverse.append((new.exp() * apart).sum(-1).double().cpu())
        forward.append(-(old.exp() * apart).sum(-1).double().cpu())
    return torch.cat(forward), torch.cat(reverse)


def on(head: dict[str, Any], device) -> dict[str, Any]:
    """An lm_head's tensors there."""
    moved = lambda value: value.to(device) if isinstance(value, Tensor) else value
    return {
        name: tuple(map(moved, value)) if isinstance(value, tuple) else moved(value)
        for name, value in head.items()
    }


def _numbers(rows: Rows, before: Seen, after: Seen, change: Tensor) -> Iterator[tuple[str, Estimate]]:
    ratio = rows.sums(change)
    for which, of in (("chosen", rows.pairs[:, 0]), ("rejected", rows.pairs[:, 1])):
        yield f"log_ratio/{which}", rows.mean(ratio[of], of)
    margin = rows.of_pairs(ratio)
    yield "margins", rows.mean_of_pairs(margin)
    if not all_ties(float(margin.abs().mean())):
        yield "accuracies", rows.mean_of_pairs((margin > 0).double())
    for name, seen in (("before", before), ("after", after)):
        alone = rows.of_pairs(rows.sums(seen.token_logp))
        yield f"logps/accuracies/{name}", rows.mean_of_pairs((alone > 0).double())
        yield f"perplexity/{name}", perplexity(nll(rows, seen.token_logp))


def nll(rows: Rows, token_logp: Tensor) -> Estimate:
    """Of a scored token of the chosen responses, in nats."""
    return rows.mean(-rows.sums(token_logp)[rows.chosen], rows.chosen, rows.lengths[rows.chosen])


def perplexity(loss: Estimate) -> Estimate:
    """exp of it; its error to first order."""
    value = float(torch.tensor(loss.value, dtype=torch.float64).exp())
    return Estimate(value, None if loss.error is None else value * loss.error)


def _by_position(rows: Rows, change: Tensor, kl: Tensor, at: Tensor) -> Iterator[dict[str, Any]]:
    """In stretches of 1, 1, 2, 4, ... tokens: how far apart the two are there, and how much more log-prob the
    chosen gained there than the rejected (how deep an alignment is: Qi et al. 2024, arXiv 2406.05946)."""
    sides = [torch.isin(rows.response, rows.pairs[:, side]) for side in (0, 1)]
    first, place = 0, rows.position[at]
    while first <= int(place.max()):
        last = max(first, 2 * first - 1)
        here = (place >= first) & (place <= last)
        if here.any():
            there = (rows.position >= first) & (rows.position <= last)
            means = [change[there & side].mean() if (there & side).any() else None for side in sides]
            part = None if None in means else float(means[0] - means[1])  # type: ignore[operator]
            found = rows.mean_of_tokens(kl[here], at[here])
            where = {"first": first + 1, "last": last + 1, "tokens": int(here.sum())}
            yield where | {"kl": found.value, "error": found.error, "margin_part": part}
        first = last + 1


def _by_token(rows: Rows, change: Tensor, tokenizer) -> list[dict[str, Any]]:
    """Those of the rows' own tokens whose log-probs changed most in all."""
    count = torch.bincount(rows.target)
    total = torch.zeros(len(count), dtype=torch.float64).index_add_(0, rows.target, change)
    total[count < _FEWEST] = 0
    most = total.abs().argsort(descending=True, stable=True)[:_SHOWN].tolist()
    return [
        {
            "token": tokenizer.decode([i]),
            "count": int(count[i]),
            "change": float(total[i] / count[i]),
            "total": float(total[i]),
        }
        for i in most
        if total[i]
    ]
