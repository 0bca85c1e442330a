"""TRL's batch of padded rows -> our packed groups, and our scored tokens -> TRL's [rows, length - 1].

A DPO batch holds B pairs in 2B right-padded rows: row i is the chosen one of row i + B. Both begin with the
same prompt. Pairs of the same prompt form one group, and a row that occurs twice is computed once.

Letters: N rows (2B), S padded length, T packed tokens, M scored tokens of the pack.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.packing import pack
from fastdpo.integrations.images import BatchImages
from fastdpo.model.vision import pack_with_images
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


def pack_rows(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, whole: bool,
    images: BatchImages | None = None,
) -> PackedRows | str:  # fmt: skip
    """PackedRows on the CPU (but for pixels), or (why these rows cannot be packed) a str.

    `whole` keeps what no scored token sees: rows without any, and what follows the last one.
    """
    ids, targets = input_ids.cpu().numpy(), labels.cpu().numpy()
    mask = np.ones(ids.shape, bool) if attention_mask is None else attention_mask.cpu().numpy().astype(bool)
    scored = targets != IGNORED
    scored[:, 0] = False  # nothing predicts a row's first token
    if len(ids) % 2:
        return "the rows are no pairs"
    if (mask[:, 1:] > mask[:, :-1]).any() or not mask[:, 0].all():
        return "the rows are not padded on the right"
    if (scored & ~mask).any() or (targets != ids)[scored].any():
        return "the labels are not the rows' own tokens"
    if not scored.any():
        return "nothing is scored"
    if images is not None and (reason := images.read(ids)):
        return reason
    if images is not None and any(seen and not row.any() for seen, row in zip(images.of_row, scored)):
        return "a row with images has nothing that is scored"  # cut, maybe within them, which is TRL's error
    lengths = mask.sum(1)
    ends = lengths if whole else ids.shape[1] - scored[:, ::-1].argmax(1)
    return _packed(ids, lengths, ends, scored, whole, images)


def _packed(ids, lengths, ends, scored, whole: bool, images: BatchImages | None) -> PackedRows | str:
    """`ends`: where each row's last token that is of use ends."""
    groups: list[PreferenceGroup] = []
    rows_of, copies = [], []
    for prefix, by_response in _grouped(ids, lengths, ends, scored, whole, images):
        group = _group(len(groups), ids, ends, scored, prefix, by_response, whole)
        if images is not None:
            group = replace(group, images=images.of_row[by_response[0][0]])
            if reason := images.refusal(group, [row for rows in by_response for row in rows], lengths):
                return reason
        groups.append(group)
        rows_of += by_response
        copies.append((len(groups[-1].prompt), sum(map(len, by_response))))
        copies += [(len(r.ids) - 1, len(rows)) for r, rows in zip(groups[-1].responses, by_response)]
    batch = pack(groups) if images is None else pack_with_images(images.model, images, groups, True, None)
    places, sources = [], []
    for rows, start in zip(rows_of, batch.cu_resp.tolist()):
        for row in rows:
            positions = np.flatnonzero(scored[row])
            places.append(row * (ids.shape[1] - 1) + positions - 1)
            sources.append(start + np.arange(len(positions)))
    place, source = np.concatenate(places), np.concatenate(sources)
    order = np.argsort(source, kind="stable")
    tokens, times = np.array(copies).T
    return PackedRows(
        batch,
        tuple(groups),
        torch.from_numpy(place[order]),
        torch.from_numpy(source[order]) if len(source) > len(batch.target) else None,
        torch.from_numpy(times.repeat(tokens).astype(np.float32))[None],
        (ids.shape[0], ids.shape[1] - 1),
    )


def _grouped(
    ids, lengths, ends, scored, whole, images: BatchImages | None
) -> list[tuple[int, list[list[int]]]]:
    """Per prompt its length, and per distinct response the rows that hold it."""
    pairs = len(ids) // 2
    first = np.where(scored.any(1), scored.argmax(1), lengths)
    seen = [() if images is None else tuple(i.key for i in images.of_row[row]) for row in range(len(ids))]
    groups: dict[tuple, dict[bytes, list[int]]] = defaultdict(lambda: defaultdict(list))
    for i in range(pairs):
        pair = [row for row in (i, i + pairs) if whole or scored[row].any()]
        alike = _common(ids, lengths, pair) if pair and seen[i] == seen[i + pairs] else 0
        for rows in [pair] if alike else [[row] for row in pair]:  # a row's first token is never its own
            prefix = int(min(first[rows].min(), alike or lengths[rows].min()))
            for row in rows:
                rest = slice(prefix, ends[row])
                response = ids[row, rest].tobytes() + scored[row, rest].tobytes()
                groups[ids[row, :prefix].tobytes(), prefix, seen[row]][response].append(row)
    return [(prefix, list(by_response.values())) for (_, prefix, _), by_response in groups.items()]


def _common(ids, lengths, rows) -> int:
    """How many tokens the rows begin with alike."""
    shortest = int(lengths[rows].min())
    differ = (ids[rows, :shortest] != ids[rows[0], :shortest]).any(0)
    return int(differ.argmax()) if differ.any() else shortest


def _group(number, ids, ends, scored, prefix, by_response, whole) -> PreferenceGroup:
    responses = []
    for row, *_ in by_response:
        tail, mask = ids[row, prefix : ends[row]], scored[row, prefix : ends[row]]
        if whole:  # a packed response's last token is no input, so that one which does not count follows
            tail, mask = np.append(tail, 0), np.append(mask, False)
        responses.append(Response(tail.astype(np.int64), mask))
    return PreferenceGroup(number, ids[row, :prefix].astype(np.int64), tuple(responses), ())
