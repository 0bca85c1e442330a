"""Groups of token ids -> one packed microbatch, and a step's groups -> microbatches under a token cap.

Every function here is a pure one of its arguments: numpy in, CPU tensors out. A step is a fixed set
of groups, whatever the cap: packing never changes what an optimizer step sees, only how it is cut.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate, count
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdpo.data.beginnings import Branch, own_prompts
from fastdpo.data.layout import PLAIN, Prompt, separate_rows, shared_rows
from fastdpo.data.store.facts import Facts
from fastdpo.data.store.stored import facts_of
from fastdpo.records import Groups, PackedGroups, PreferenceGroup, Response


def epoch_order(n_groups: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, i64[n_groups]: a function of (seed, epoch) and nothing else."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_groups)


def epoch_steps(n_groups: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """The places of each step's groups, epoch after epoch, without end."""
    for epoch in count():
        order = epoch_order(n_groups, seed, epoch)
        yield from (order[start : start + batch_size] for start in range(0, n_groups, batch_size))


class Size(NamedTuple):
    """What a group, or a microbatch, is counted by."""

    tokens: int  # of the shared-prompt forward
    responses: int
    width: int  # of the longest separate row
    scored: int
    row: int  # of the first group

    @classmethod
    def of(cls, group: PreferenceGroup) -> "Size":
        width = len(group.prompt) + max(len(group.inputs(r)) for r in group.responses)
        return cls(group.input_tokens, len(group.responses), width, group.scored_tokens, group.row)

    def places(self, share: bool) -> int:
        """What it takes of max_tokens: shared rows have no padding, separate ones are as wide as the
        longest."""
        return self.tokens if share else self.responses * self.width


def sizes_of(facts: Facts) -> np.ndarray:
    """The columns of Size, i64[G, 5]."""
    width = facts.prompt + np.maximum.reduceat(facts.inputs, facts.cu_resp[:-1])
    columns = facts.input_tokens, facts.responses, width, facts.scored_tokens, facts.row
    return np.stack(columns, 1, dtype=np.int64, casting="unsafe")


def places_of(sizes: np.ndarray, share: bool) -> np.ndarray:
    """What each of these groups alone takes of max_tokens, i64[G]."""
    of_shared: np.ndarray = sizes[:, 0]
    return of_shared if share else sizes[:, 1] * sizes[:, 2]


def places(group: PreferenceGroup, share: bool) -> int:
    """What a group alone takes of max_tokens."""
    return Size.of(group).places(share)


def split_step(
    groups: Sequence[PreferenceGroup],
    max_tokens: int,
    max_scored: int | None = None,
    share: bool = True,
) -> list[list[PreferenceGroup]]:
    """Cuts one step's groups into microbatches of at most `max_tokens` input tokens (padding counted
    where rows are separate) and `max_scored` scored ones: first-fit decreasing, ties by row. A group is
    never split, so a group larger than a cap is a microbatch of its own."""
    parts = split_sizes(list(map(Size.of, groups)), max_tokens, max_scored, share)
    return [[groups[i] for i in part] for part in parts]


def split_sizes(
    sizes: Sequence[Size], max_tokens: int, max_scored: int | None = None, share: bool = True
) -> list[list[int]]:
    """split_step by what it looks at: the places of the groups of each microbatch."""
    most = math.inf if max_scored is None else max_scored
    in_order = sorted(range(len(sizes)), key=lambda i: (-sizes[i].places(share), sizes[i].row))
    return _fill(in_order, sizes, max_tokens, most, share)


def row_bounds(facts: Facts, max_tokens: int, share: bool = True) -> np.ndarray:
    """Cuts groups into microbatches of at most `max_tokens` places, in their own order: next-fit. Groups
    added at the end leave the microbatches before the last one as they were. i64[n+1]: microbatch i is the
    groups bounds[i]:bounds[i + 1]."""
    bounds: list[int] = []
    tokens = rows = widest = 0
    for i, (more, responses, width) in enumerate(zip(*sizes_of(facts)[:, :3].T.tolist())):
        tokens, rows, widest = tokens + more, rows + responses, max(widest, width)
        if not bounds or (tokens if share else rows * widest) > max_tokens:
            bounds.append(i)
            tokens, rows, widest = more, responses, width
    return np.array([*bounds, len(facts)], np.int64)


def in_row_order(groups: Groups, max_tokens: int, share: bool = True) -> "Cut":
    """The microbatches of `row_bounds`."""
    return Cut(groups, row_bounds(facts_of(groups), max_tokens, share))


@dataclass(frozen=True, eq=False)
class Cut(Sequence[Groups]):
    """Groups in microbatches of neighbours, which are read when one is asked for."""

    groups: Groups
    bounds: np.ndarray

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]  # raises IndexError, where iterating ends
        return [self.groups[i] for i in range(*self.bounds[number : number + 2].tolist())]


def _fill(
    order: Iterable[int],
    sizes: Sequence[Size],
    max_tokens: int,
    max_scored: float,
    share: bool,
) -> list[list[int]]:
    """Each group into the first microbatch that still fits with it, or into a new one."""
    parts: list[list[int]] = []
    filled: list[tuple[int, int, int, int]] = []  # of each its tokens, responses, width, scored tokens
    for i in order:
        tokens, responses, width, scored, _ = sizes[i]
        for n in range(len(parts)):
            has_tokens, has_responses, has_width, has_scored = filled[n]
            both, wider = has_responses + responses, max(has_width, width)
            places = has_tokens + tokens if share else both * wider
            if places <= max_tokens and has_scored + scored <= max_scored:
                filled[n] = has_tokens + tokens, both, wider, has_scored + scored
                parts[n].append(i)
                break
        else:
            parts.append([i])
            filled.append((tokens, responses, width, scored))
    return parts


@dataclass(frozen=True)
class Packing:
    """Microbatches, each packed when it is asked for: a GPU computes the one before meanwhile. With images,
    which take long to read, the next one is made meanwhile too, in a thread."""

    parts: Sequence[Groups]
    pack: Callable[[Groups], PackedGroups]
    stands_in: bool = False  # the last one, see PackedGroups

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[PackedGroups]:
        for number, batch in enumerate(made_ahead(self.pack, self.parts), 1):
            yield replace(batch, stands_in=True) if self.stands_in and number == len(self) else batch


def made_ahead(make: Callable[[Groups], PackedGroups], parts: Sequence[Groups]) -> Iterator[PackedGroups]:
    """make(part) of each part, in order; of the next one with images in a thread, while the caller works."""
    with ThreadPoolExecutor(1) as thread:  # which starts with the first part that is given to it
        coming: Future[PackedGroups] | None = None
        part = parts[0] if len(parts) else []
        for number in range(len(parts)):
            batch = make(part) if coming is None else coming.result()
            part, coming = parts[number + 1] if number + 1 < len(parts) else [], None
            if any(group.images for group in part):
                coming = thread.submit(make, part)
            yield batch


def pack(
    groups: Sequence[PreferenceGroup],
    share: bool = True,
    tree: Sequence[Branch] | None = None,
    prompts: Sequence[Prompt] | None = None,
) -> PackedGroups:
    """Packs whole groups into one microbatch.

    share=True computes each prompt once, with a PrefixLayout; where a `tree` of the responses is given, what
    that says once. share=False gives one right-padded row a response, for models whose attention cannot be
    shared. All score the same tokens in the same order. `prompts`: where a model makes more of them than
    tokens in a row, which separate rows leave to it; those that see both ways must be roots of the tree.
    """
    if share:
        flat = shared_rows(groups, tree or own_prompts(groups), prompts or [PLAIN] * len(groups))
    else:
        flat = separate_rows(groups)
    responses = [r for g in groups for r in g.responses]
    group_resp = tuple(accumulate((len(g.responses) for g in groups), initial=0))
    scored = [int(r.target_mask.sum()) for r in responses]
    cu_resp = tuple(accumulate(scored, initial=0))
    pairs = [(first + p.winner, first + p.loser) for first, g in zip(group_resp, groups) for p in g.pairs]
    numbered = lambda found: torch.tensor(
        [first + i for first, some in zip(group_resp, found) for i in some], dtype=torch.int64
    )
    return PackedGroups(
        **flat,
        target=torch.from_numpy(np.concatenate([r.ids[r.target_mask] for r in responses])),
        cu_resp=torch.tensor(cu_resp),
        group=torch.arange(len(groups)).repeat_interleave(torch.tensor(group_resp).diff()),
        pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        offset=torch.tensor([p.offset for g in groups for p in g.pairs], dtype=torch.float32),
        weight=torch.tensor([p.weight for g in groups for p in g.pairs], dtype=torch.float32),
        chosen=numbered(g.chosen for g in groups),
        desirable=numbered(g.judged(True) for g in groups),
        undesirable=numbered(g.judged(False) for g in groups),
        paired_tokens=sum(scored[winner] + scored[loser] for winner, loser in pairs),
        score=torch.tensor([math.nan if r.score is None else r.score for r in responses]),
        token_weight=_token_weight(responses),
        ref_token_logp=None,
        old_token_logp=None,
        rows=tuple(g.row for g in groups),
        group_resp=group_resp,
        group_scored=tuple(cu_resp[r] for r in group_resp),
        unshared_tokens=sum(len(g.prompt) + len(r.ids) for g in groups for r in g.responses),
    )


def _token_weight(responses: Sequence[Response]) -> torch.Tensor | None:
    """f32[M]; None where no response has weights, NaN in those without."""
    if all(r.token_weight is None for r in responses):
        return None
    missing = lambda r: np.full(len(r.ids), np.nan, np.float32)
    weights = [(missing(r) if r.token_weight is None else r.token_weight)[r.target_mask] for r in responses]
    return torch.from_numpy(np.concatenate(weights))
