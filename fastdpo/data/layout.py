"""The rows of a packed microbatch: where each prompt and response stands in it, and what sees what."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from fastdpo.data.beginnings import Branch, branches_of, own_tokens
from fastdpo.records import FullSegments, PreferenceGroup, PrefixLayout

Segments = list[tuple[int, int, int, int]]  # (q start, q end, k start, k end)


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model makes of a group's prompt beyond tokens one after the other."""

    blocks: tuple[tuple[int, int], ...] = ()  # (start, end) of the tokens that see each other both ways
    positions: np.ndarray | None = None  # i64[3, n]: time, height and width; responses follow the largest

    def positions_of(self, start: int, stop: int) -> np.ndarray:
        """Of the tokens start:stop of the prompt and a response behind it: i64[.], or [3, .]."""
        if self.positions is None:
            return np.arange(start, stop)
        n, following = self.positions.shape[1], self.positions.max(initial=-1) + 1
        behind = np.arange(max(start, n), max(stop, n)) - n + following
        return np.concatenate([self.positions[:, start:stop], np.broadcast_to(behind, (3, len(behind)))], 1)


PLAIN = Prompt()


def _in_one(positions: Sequence[np.ndarray]) -> np.ndarray:
    """[T], or [3, T] where some are in height and width: in words all three are the same."""
    if any(p.ndim == 2 for p in positions):
        positions = [np.broadcast_to(p, (3, p.shape[-1])) for p in positions]
    return np.concatenate(positions, -1)


def shared_rows(
    groups: Sequence[PreferenceGroup], tree: Sequence[Branch], prompts: Sequence[Prompt]
) -> dict[str, Any]:
    """The rows that each response brings of its own, and behind them those of what branches off it, the last
    branch first: of a plain group its prompt, R1 without its last token (but of whole groups), R2 likewise,
    ... The last prompt row predicts the first token of every response."""
    own, branches = own_tokens(groups, tree), branches_of(tree)
    beyond = [prompt for group, prompt in zip(groups, prompts) for _ in group.responses]
    order, todo = [], [i for i, branch in enumerate(tree) if branch.parent is None][::-1]
    while todo:
        order.append(i := todo.pop())
        todo += branches[i][::-1]
    starts, paths = [0] * len(tree), [np.zeros(0, np.int64)] * len(tree)
    causal, full = _Segments(), _Segments()
    rows = 0
    for i in order:
        (parent, at), n = tree[i], len(own[i])
        before = [] if parent is None else [paths[parent][:at]]
        starts[i], paths[i] = rows, np.concatenate([*before, np.arange(rows, rows + n)])
        done = 0
        for start, end in () if at else beyond[i].blocks:
            causal.add(rows + done, paths[i][:start], start - done)
            full.add(rows + start, paths[i][:end], end - start)
            done = end
        causal.add(rows + done, paths[i], n - done)
        rows += n
    seen_until, ends = np.empty(rows, np.int64), [0] * len(tree)
    for i in reversed(order):
        start, ends[i] = starts[i], starts[i] + len(own[i])
        seen_until[start : ends[i]] = ends[i]
        for branch in branches[i]:
            ends[i] = ends[branch]
            seen_until[start : start + tree[branch].at - tree[i].at] = ends[i]
    responses = [(len(group.prompt) - 1, r) for group in groups for r in group.responses]
    predicts = [path[n : n + len(r.ids)][r.target_mask] for path, (n, r) in zip(paths, responses)]
    positions = [beyond[i].positions_of(tree[i].at, tree[i].at + len(own[i])) for i in order]
    return {
        "input_ids": torch.from_numpy(np.concatenate([own[i] for i in order]))[None],
        "position_ids": torch.from_numpy(_in_one(positions)[..., None, :]),
        "attention_mask": None,
        "layout": _layout(seen_until, causal, full),
        "score_row": torch.from_numpy(np.concatenate(predicts)),
        "input_tokens": rows,
    }


class _Segments:
    """Segments as they are found, with the rows whose keys they gather."""

    def __init__(self) -> None:
        self.found: Segments = []
        self.keys: list[np.ndarray] = []
        self.gathered = 0

    def add(self, row: int, keys: np.ndarray, n: int) -> None:
        """n queries from `row` on, which see the last n of these keys, and those before."""
        if n:
            self.found.append((row, row + n, self.gathered, self.gathered + len(keys)))
            self.keys.append(keys)
            self.gathered += len(keys)

    def bounds(self) -> dict[str, Any]:
        """cu_q, cu_k, max_q, max_k."""
        lengths_q = [q1 - q0 for q0, q1, _, _ in self.found]
        lengths_k = [k1 - k0 for _, _, k0, k1 in self.found]
        return {
            "cu_q": torch.tensor([0, *accumulate(lengths_q)], dtype=torch.int32),
            "cu_k": torch.tensor([0, *accumulate(lengths_k)], dtype=torch.int32),
            "max_q": max(lengths_q, default=0),
            "max_k": max(lengths_k, default=0),
        }


def _layout(seen_until: np.ndarray, causal: _Segments, full: _Segments) -> PrefixLayout:
    n_rows, kv_index = len(seen_until), np.concatenate(causal.keys + full.keys)
    place = np.argsort(kv_index, kind="stable")
    copies = np.bincount(kv_index, minlength=n_rows)  # every row is a key of at least one segment
    first = np.cumsum(copies) - copies
    more_rows = [np.flatnonzero(copies > c) for c in range(1, copies.max())]
    more_places = [place[first[rows] + c] for c, rows in enumerate(more_rows, start=1)]
    return PrefixLayout(
        **causal.bounds(),
        kv_index=torch.from_numpy(kv_index),
        first_copy=torch.from_numpy(place[first]),
        more_rows=tuple(map(torch.from_numpy, more_rows)),
        more_places=tuple(map(torch.from_numpy, more_places)),
        seen_until=torch.from_numpy(seen_until),
        segments=tuple(causal.found),
        full=_full(n_rows, full, causal.gathered) if full.found else None,
    )


def _full(n_rows: int, full: _Segments, first_key: int) -> FullSegments:
    rows = np.concatenate([np.arange(q0, q1) for q0, q1, _, _ in full.found])
    others = np.setdiff1d(np.arange(n_rows), rows)
    return FullSegments(
        **full.bounds(),
        segments=tuple((q0, q1, first_key + k0, first_key + k1) for q0, q1, k0, k1 in full.found),
        first_key=first_key,
        rows=torch.from_numpy(rows),
        other_rows=torch.from_numpy(others),
        place=torch.from_numpy(np.argsort(np.concatenate([others, rows]))),
    )


def separate_rows(groups: Sequence[PreferenceGroup]) -> dict[str, Any]:
    """One right-padded row a response."""
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
        "input_tokens": sum(map(len, rows)),
    }
