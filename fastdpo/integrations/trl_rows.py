"""TRL's batch of padded rows -> our packed groups, and our scored tokens -> TRL's [rows, length - 1].

A DPO batch holds B pairs in 2B right-padded rows: row i is the chosen one of row i + B. Both begin with the
same prompt. Pairs of the same prompt form one group, and a row that occurs twice is computed once.

Letters: N rows (2B), S padded length, T packed tokens, M scored tokens of the pack.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.packing import pack
from fastdpo.records import Movable, PackedGroups, PreferenceGroup, Response

IGNORED = -100


@dataclass(frozen=True, eq=False)
class PackedRows(Movable):
    """A batch of rows, packed, and where each scored token belongs in it."""

    batch: PackedGroups
    groups: tuple[PreferenceGroup, ...]  # what the batch was packed from
    place: Tensor  # i64[.]: places in the flattened [N, S - 1], ascending by source
    source: Tensor | None  # i64[.]: which of the M scored tokens each takes; None: one after the other
    copies: Tensor  # f32[1, T]: in how many rows each packed token stands
    shape: tuple[int, int]  # (N, S - 1)

    def scatter(self, values: Tensor) -> Tensor:
        """[M] values -> [N, S - 1], zero (or False) where nothing is scored."""
        values = values if self.source is None else values[self.source]
        where = (self.place // self.shape[1], self.place % self.shape[1])
        return values.new_zeros(self.shape).index_put(where, values)


def pack_rows(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, whole: bool):
    """PackedRows on the CPU, or (why these rows cannot be packed) a str.

    `whole` keeps what no scored token sees: rows without any, and what follows the last one.
    """
    ids, labels = input_ids.cpu().numpy(), labels.cpu().numpy()
    mask = np.ones(ids.shape, bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
    scored = labels != IGNORED
    scored[:, 0] = False  # nothing predicts a row's first token
    if len(ids) % 2:
        return "the rows are no pairs"
    if (mask[:, 1:] > mask[:, :-1]).any() or not mask[:, 0].all():
        return "the rows are not padded on the right"
    if (scored & ~mask).any() or (labels != ids)[scored].any():
        return "the labels are not the rows' own tokens"
    if not scored.any():
        return "nothing is scored"
    return _packed(ids, mask.sum(1), scored, whole)


def _packed(ids: np.ndarray, lengths: np.ndarray, scored: np.ndarray, whole: bool) -> PackedRows:
    groups = _grouped(ids, lengths, scored, whole)
    responses = [places for places_by_response in groups.values() for places in places_by_response.values()]
    packed_groups = [
        _group(number, ids, scored, lengths, prefix, list(by_response.values()), whole)
        for number, ((_, prefix), by_response) in enumerate(groups.items())
    ]
    batch = pack(packed_groups)
    place, source = [], []
    for rows, start in zip(responses, batch.cu_resp.tolist()):
        for row in rows:
            positions = np.flatnonzero(scored[row])
            place.append(row * (ids.shape[1] - 1) + positions - 1)
            source.append(start + np.arange(len(positions)))
    place, source = np.concatenate(place), np.concatenate(source)
    order = np.argsort(source, kind="stable")
    return PackedRows(
        batch,
        tuple(packed_groups),
        torch.from_numpy(place[order]),
        torch.from_numpy(source[order]) if len(source) > len(batch.target) else None,
        torch.from_numpy(_copies(packed_groups, responses))[None],
        (ids.shape[0], ids.shape[1] - 1),
    )


def _grouped(ids, lengths, scored, whole) -> dict[tuple[bytes, int], dict[bytes, list[int]]]:
    """Per prompt (its bytes and length) and per distinct response the rows that hold it."""
    pairs = len(ids) // 2
    first = np.where(scored.any(1), scored.argmax(1), lengths)
    groups = defaultdict(lambda: defaultdict(list))
    for i in range(pairs):
        pair = [row for row in (i, i + pairs) if whole or scored[row].any()]
        alike = _common(ids, lengths, pair) if pair else 0
        for rows in [pair] if alike else [[row] for row in pair]:  # a row's first token is never its own
            prefix = int(min(first[rows].min(), alike or lengths[rows].min()))
            for row in rows:
                end = _end(row, lengths, scored, whole)
                rest = ids[row, prefix:end].tobytes() + scored[row, prefix:end].tobytes()
                groups[ids[row, :prefix].tobytes(), prefix][rest].append(row)
    return groups


def _common(ids, lengths, rows) -> int:
    """How many tokens the rows begin with alike."""
    shortest = int(lengths[rows].min())
    differ = (ids[rows, :shortest] != ids[rows[0], :shortest]).any(0)
    return int(differ.argmax()) if differ.any() else shortest


def _end(row, lengths, scored, whole) -> int:
    """Where a row's last token that is of use ends."""
    return int(lengths[row]) if whole else int(np.flatnonzero(scored[row])[-1]) + 1


def _group(number, ids, scored, lengths, prefix, responses: list[list[int]], whole) -> PreferenceGroup:
    made = []
    for row, *_ in responses:
        end = _end(row, lengths, scored, whole)
        tail, mask = ids[row, prefix:end], scored[row, prefix:end]
        if whole:  # a packed response's last token is no input, so that one which does not count follows
            tail, mask = np.append(tail, 0), np.append(mask, False)
        made.append(Response(tail.astype(np.int64), mask))
    return PreferenceGroup(number, ids[responses[0][0], :prefix].astype(np.int64), tuple(made), ())


def _copies(groups: list[PreferenceGroup], responses: list[list[int]]) -> np.ndarray:
    """f32[T], in the order of pack(groups)."""
    counts, rest = [], iter(responses)
    for group in groups:
        rows = [len(next(rest)) for _ in group.responses]
        counts.append(np.full(len(group.prompt), sum(rows), np.float32))
        counts += [np.full(len(r.ids) - 1, n, np.float32) for r, n in zip(group.responses, rows)]
    return np.concatenate(counts)
