"""Groups of token ids -> one packed microbatch, and a step's groups -> microbatches under a token cap.

Every function here is a pure one of its arguments: numpy in, CPU tensors out. A step is a fixed set
of groups, whatever the cap: packing never changes what an optimizer step sees, only how it is cut.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from fastdpo.records import Groups, PackedGroups, PreferenceGroup, PrefixLayout, Response


def epoch_order(n_groups: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch, i64[n_groups]: a function of (seed, epoch) and nothing else."""
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(n_groups)


@dataclass
class _Bin:
    """A microbatch being filled."""

    groups: Groups = field(default_factory=list)
    tokens: int = 0
    rows: int = 0  # responses
    width: int = 0  # of the longest separate row
    scored: int = 0

    def places(self, share: bool) -> int:
        """What it takes of max_tokens: shared rows have no padding, separate ones are as wide as the
        longest."""
        return self.tokens if share else self.rows * self.width

    def plus(self, group: PreferenceGroup) -> "_Bin":
        width = len(group.prompt) + max(len(group.inputs(r)) for r in group.responses)
        return _Bin(
            [*self.groups, group],
            self.tokens + group.input_tokens,
            self.rows + len(group.responses),
            max(self.width, width),
            self.scored + group.scored_tokens,
        )


def places(group: PreferenceGroup, share: bool) -> int:
    """What a group alone takes of max_tokens."""
    return _Bin().plus(group).places(share)


def split_step(
    groups: Sequence[PreferenceGroup],
    max_tokens: int,
    max_scored: int | None = None,
    share: bool = True,
) -> list[list[PreferenceGroup]]:
    """Cuts one step's groups into microbatches of at most `max_tokens` input tokens (padding counted
    where rows are separate) and `max_scored` scored ones: first-fit decreasing, ties by row. A group is
    never split, so a group larger than a cap is a microbatch of its own."""
    most = math.inf if max_scored is None else max_scored
    in_order = sorted(groups, key=lambda g: (-places(g, share), g.row))
    return _fill(in_order, lambda b: b.places(share) <= max_tokens and b.scored <= most)


def in_row_order(
    groups: Sequence[PreferenceGroup], max_tokens: int, share: bool = True
) -> list[list[PreferenceGroup]]:
    """Cuts groups into microbatches of at most `max_tokens` places, in their own order: next-fit. Groups
    added at the end leave the microbatches before the last one as they were."""
    return _fill(groups, lambda b: b.places(share) <= max_tokens, only_last=True)


def _fill(
    groups: Iterable[PreferenceGroup], fits: Callable[[_Bin], bool], only_last: bool = False
) -> list[list[PreferenceGroup]]:
    """Each group into the first microbatch (or the last one) that still fits with it, or into a new one."""
    bins: list[_Bin] = []
    for group in groups:
        for i in range(max(len(bins) - 1, 0) if only_last else 0, len(bins)):
            if fits(new := bins[i].plus(group)):
                bins[i] = new
                break
        else:
            bins.append(_Bin().plus(group))
    return [b.groups for b in bins]


@dataclass(frozen=True)
class Packing:
    """Microbatches, each packed when it is asked for: a GPU computes the one before meanwhile."""

    parts: list[Groups]
    pack: Callable[[Groups], PackedGroups]

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[PackedGroups]:
        return map(self.pack, self.parts)


def pack(groups: Sequence[PreferenceGroup], share: bool = True) -> PackedGroups:
    """Packs whole groups into one microbatch.

    share=True computes each prompt once, with a PrefixLayout. share=False gives one right-padded row a
    response, for models whose attention cannot be shared. Both score the same tokens in the same order.
    """
    flat = _shared_rows(groups) if share else _separate_rows(groups)
    responses = [r for g in groups for r in g.responses]
    group_resp = tuple(accumulate((len(g.responses) for g in groups), initial=0))
    scored = [int(r.target_mask.sum()) for r in responses]
    cu_resp = tuple(accumulate(scored, initial=0))
    pairs = [(first + p.winner, first + p.loser) for first, g in zip(group_resp, groups) for p in g.pairs]
    numbered = lambda found: torch.tensor(
        [first + i for first, some in zip(group_resp, found) for i in some], dtype=torch.int64
    )
    separate = sum(len(g.prompt) + len(g.inputs(r)) for g in groups for r in g.responses)
    return PackedGroups(
        **flat,
        target=torch.from_numpy(np.concatenate([r.ids[r.target_mask] for r in responses])),
        cu_resp=torch.tensor(cu_resp),
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
        rows=tuple(g.row for g in groups),
        group_resp=group_resp,
        group_scored=tuple(cu_resp[r] for r in group_resp),
        input_tokens=sum(g.input_tokens for g in groups) if share else separate,
        unshared_tokens=sum(len(g.prompt) + len(r.ids) for g in groups for r in g.responses),
    )


def _token_weight(responses: Sequence[Response]) -> torch.Tensor | None:
    """f32[M]; None where no response has weights, NaN in those without."""
    if all(r.token_weight is None for r in responses):
        return None
    missing = lambda r: np.full(len(r.ids), np.nan, np.float32)
    weights = [(missing(r) if r.token_weight is None else r.token_weight)[r.target_mask] for r in responses]
    return torch.from_numpy(np.concatenate(weights))


def _shared_rows(groups: Sequence[PreferenceGroup]) -> dict[str, Any]:
    """Flat order of a group: prompt, R1 without its last token (but of whole groups), R2 likewise, ...
    The last prompt row predicts the first token of every response."""
    ids, positions, score_row, seen_until, kv_index, segments = [], [], [], [], [], []
    base = gathered = 0
    for group in groups:
        n_prompt, end = len(group.prompt), base + group.input_tokens
        ids.append(group.prompt)
        positions.append(np.arange(n_prompt))
        seen_until.append(np.full(n_prompt, end))
        start = base + n_prompt
        for i, response in enumerate(group.responses):
            inputs = group.inputs(response)
            n = len(inputs)
            ids.append(inputs)
            positions.append(np.arange(n_prompt, n_prompt + n))
            seen_until.append(np.full(n, start + n))
            predicts = np.concatenate([[base + n_prompt - 1], np.arange(start, start + n)])
            score_row.append(predicts[: len(response.ids)][response.target_mask])
            first_query = base if i == 0 else start  # the prompt's own queries ride with R1
            if start + n > first_query:
                kv_index += [np.arange(base, base + n_prompt), np.arange(start, start + n)]
                segments.append((first_query, start + n, gathered, gathered + n_prompt + n))
                gathered += n_prompt + n
            start += n
        base = end
    return {
        "input_ids": torch.from_numpy(np.concatenate(ids))[None],
        "position_ids": torch.from_numpy(np.concatenate(positions))[None],
        "attention_mask": None,
        "layout": _layout(np.concatenate(kv_index), np.concatenate(seen_until), segments),
        "score_row": torch.from_numpy(np.concatenate(score_row)),
    }


def _layout(
    kv_index: np.ndarray, seen_until: np.ndarray, segments: list[tuple[int, int, int, int]]
) -> PrefixLayout:
    n_rows = len(seen_until)
    place = np.argsort(kv_index, kind="stable")
    copies = np.bincount(kv_index, minlength=n_rows)  # every row is a key of at least one segment
    first = np.cumsum(copies) - copies
    more_rows = [np.flatnonzero(copies > c) for c in range(1, copies.max())]
    more_places = [place[first[rows] + c] for c, rows in enumerate(more_rows, start=1)]
    lengths_q = [q1 - q0 for q0, q1, _, _ in segments]
    lengths_k = [k1 - k0 for _, _, k0, k1 in segments]
    return PrefixLayout(
        cu_q=torch.tensor([0, *accumulate(lengths_q)], dtype=torch.int32),
        cu_k=torch.tensor([0, *accumulate(lengths_k)], dtype=torch.int32),
        max_q=max(lengths_q),
        max_k=max(lengths_k),
        kv_index=torch.from_numpy(kv_index),
        first_copy=torch.from_numpy(place[first]),
        more_rows=tuple(map(torch.from_numpy, more_rows)),
        more_places=tuple(map(torch.from_numpy, more_places)),
        seen_until=torch.from_numpy(seen_until),
        segments=tuple(segments),
    )


def _separate_rows(groups: Sequence[PreferenceGroup]) -> dict[str, Any]:
    rows = [np.concatenate([g.prompt, g.inputs(r)]) for g in groups for r in g.responses]
    width = max(map(len, rows))
    ids, mask = np.zeros((2, len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    responses = enumerate((len(g.prompt), r) for g in groups for r in g.responses)
    score_row = [i * width + n - 1 + np.flatnonzero(r.target_mask) for i, (n, r) in responses]
    return {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.arange(width).expand(len(rows), width),
        "attention_mask": torch.from_numpy(mask),
        "layout": None,
        "score_row": torch.from_numpy(np.concatenate(score_row)),
    }
