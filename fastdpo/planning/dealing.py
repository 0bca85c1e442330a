"""A step's groups, cut for several ranks: microbatches of about one size, as many for each rank."""

import math
from collections.abc import Sequence

from fastdpo.data.packing import Size, split_sizes

Rounds = list[list[list[int]]]  # [round][rank]: the places of its groups, none where there is nothing to do


def deal_sizes(
    sizes: Sequence[Size],
    ranks: int,
    max_tokens: int,
    max_scored: int | None = None,
    share: bool = True,
) -> Rounds:
    """On one rank the microbatches of split_sizes. On several as many rounds as these would take, or a few
    more: the groups go, largest first, each into the microbatch with the fewest tokens so far that it fits
    into (longest processing time first, Graham 1969). The largest microbatches are dealt first, each second
    round in the other direction."""
    cut = split_sizes(sizes, max_tokens, max_scored, share)
    if ranks == 1:
        return [[part] for part in cut]
    most, n = math.inf if max_scored is None else max_scored, -(-len(cut) // ranks) * ranks
    while (even := _even(sizes, n, max_tokens, most, share)) is None:  # at last with a group in each
        n += ranks
    even.sort(key=lambda part: -_tokens(sizes, part))
    rounds = [even[first : first + ranks] for first in range(0, n, ranks)]
    return [one[::-1] if number % 2 else one for number, one in enumerate(rounds) if any(one)]


def of_slowest(sizes: Sequence[Size], rounds: Rounds, in_step: bool) -> list[list[int]]:
    """The microbatches that a step waits for. in_step: ranks wait for each other in each round (shards are
    gathered together), so the largest of each; else at the step's end alone, so those of the rank with the
    most tokens."""
    if in_step:
        return [max(one, key=lambda part: _tokens(sizes, part)) for one in rounds]
    ranks = [list(filter(None, parts)) for parts in zip(*rounds)]
    return max(ranks, key=lambda parts: sum(_tokens(sizes, part) for part in parts))


def _even(
    sizes: Sequence[Size], n: int, max_tokens: int, max_scored: float, share: bool
) -> list[list[int]] | None:
    """n microbatches with about the same tokens; None where that needs more of them."""
    parts: list[list[int]] = [[] for _ in range(n)]
    tokens = [0] * n
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i].places(share), sizes[i].row)):
        for place in sorted(range(n), key=tokens.__getitem__):
            if not parts[place] or _fits(sizes, [*parts[place], i], max_tokens, max_scored, share):
                parts[place].append(i)
                tokens[place] += sizes[i].tokens
                break
        else:
            return None
    return parts


def _fits(sizes: Sequence[Size], part: list[int], max_tokens: int, max_scored: float, share: bool) -> bool:
    places = _tokens(sizes, part)
    if not share:
        places = sum(sizes[i].responses for i in part) * max(sizes[i].width for i in part)
    return places <= max_tokens and sum(sizes[i].scored for i in part) <= max_scored


def _tokens(sizes: Sequence[Size], part: list[int]) -> int:
    return sum(sizes[i].tokens for i in part)
