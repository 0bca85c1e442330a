"""A step's groups -> rounds of microbatches, one a rank and round. Pure functions of the step, as packing's,
so that all ranks agree on them without a word."""

import math
from collections.abc import Sequence

from fastdpo.data.packing import Size, split_sizes
from fastdpo.records import PreferenceGroup

Rounds = list[list[list[int]]]  # [round][rank]: the places of its groups, none where there is nothing to do


def deal_step(
    groups: Sequence[PreferenceGroup],
    ranks: int,
    max_tokens: int,
    max_scored: int | None = None,
    share: bool = True,
) -> list[list[list[PreferenceGroup]]]:
    """split_step for several ranks: [round][rank], the groups of each microbatch."""
    rounds = deal_sizes(list(map(Size.of, groups)), ranks, max_tokens, max_scored, share)
    return [[[groups[i] for i in part] for part in one] for one in rounds]


def deal_sizes(
    sizes: Sequence[Size],
    ranks: int,
    max_tokens: int,
    max_scored: int | None = None,
    share: bool = True,
) -> Rounds:
    """deal_step by what it looks at. On one rank the microbatches of split_sizes. On several as many rounds
    as these would take, or a few more: the groups go, largest first, each into the microbatch with the fewest
    tokens so far that it fits into (longest processing time first, Graham 1969), so that all take about as
    long; the largest are dealt first, each second round in the other direction."""
    parts = split_sizes(sizes, max_tokens, max_scored, share)
    if ranks == 1:
        return [[part] for part in parts]
    most = math.inf if max_scored is None else max_scored
    count = -(-len(parts) // ranks) * ranks
    while (even := _even(sizes, count, max_tokens, most, share)) is None:
        count += ranks
    even.sort(key=lambda part: -sum(sizes[i].tokens for i in part))
    rounds = [even[i : i + ranks] for i in range(0, count, ranks)]
    return [one[::-1] if number % 2 else one for number, one in enumerate(rounds) if any(one)]


def _even(
    sizes: Sequence[Size], count: int, max_tokens: int, max_scored: float, share: bool
) -> list[list[int]] | None:
    """So many microbatches with about the same tokens; None where that needs more of them."""
    parts: list[list[int]] = [[] for _ in range(count)]
    filled = [Size(0, 0, 0, 0, 0)] * count
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i].places(share), sizes[i].row)):
        for n in sorted(range(count), key=lambda n: filled[n].tokens):
            has, more = filled[n], sizes[i]
            tokens, responses = has.tokens + more.tokens, has.responses + more.responses
            both = Size(tokens, responses, max(has.width, more.width), has.scored + more.scored, 0)
            if not parts[n] or (both.places(share) <= max_tokens and both.scored <= max_scored):
                parts[n].append(i)
                filled[n] = both
                break
        else:
            return None
    return parts


def used_and_room(sizes: Sequence[Size], rounds: Rounds) -> tuple[int, int]:
    """(tokens that all ranks compute, tokens that they could in the time: of each round those of its largest
    microbatch on every rank)."""
    tokens = [[sum(sizes[i].tokens for i in part) for part in one] for one in rounds]
    return sum(map(sum, tokens)), sum(len(one) * max(one) for one in tokens)
