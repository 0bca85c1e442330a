"""What is known of groups without their tokens: lengths, pairs, scores and hashes, as columns.

Small enough to be in memory for a million rows. Packing, the order of an epoch, what an objective needs and
the reference's look-up work from these; tokens are read for the step that trains on them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import numpy as np

from fastdpo.data.store.digests import BYTES, group_digest, prompt_key, response_keys, trained_digest
from fastdpo.preferences import Pair, PreferenceGroup, Response

HASH = np.dtype(f"V{BYTES}")
_NOTHING = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Facts:
    """Of G groups, R responses, P pairs: the responses of group g are cu_resp[g]:cu_resp[g+1], its pairs
    cu_pairs[g]:cu_pairs[g+1]."""

    row: np.ndarray  # i64[G]: the row's number in its data set
    prompt: np.ndarray  # i32[G]: tokens of the prompt
    largest: np.ndarray  # i32[G]: the largest token id
    whole: np.ndarray  # bool[G]: a response's last token is an input too
    digest: np.ndarray  # V16[G]: of all that the group says
    trained: np.ndarray  # V16[G]: of what it trains
    prompt_key: np.ndarray  # V16[G]
    images: np.ndarray  # i32[G]: of the prompt
    image_tokens: np.ndarray  # i32[G]: that stand for them in it
    cu_resp: np.ndarray  # i64[G+1]
    length: np.ndarray  # i32[R]: tokens of the response
    scored: np.ndarray  # i32[R]: those of them that are scored
    first: np.ndarray  # i32[R]: the place of the first of these in the response
    relevant: np.ndarray  # i32[R]: those with a token weight above 0; -1 without token weights
    key: np.ndarray  # V16[R]: see response_keys
    score: np.ndarray  # f64[R], NaN where there is none
    ref_logp: np.ndarray  # f64[R], NaN where there is none
    label: np.ndarray  # i8[R]: 1 desirable, 0 undesirable, -1 none
    cu_pairs: np.ndarray  # i64[G+1]
    pairs: np.ndarray  # i32[P, 2]: (winner, loser) as indices in the group
    offset: np.ndarray  # f64[P]
    weight: np.ndarray  # f64[P]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of(cls, groups: Iterable[PreferenceGroup]) -> Self:
        """Computed from the groups themselves."""
        columns: dict[str, list] = {name: [] for name in _TYPES}
        for group in groups:
            keys = response_keys(group)
            for name, value in _facts_of_group(group, keys).items():
                columns[name].append(value)
            for response, key in zip(group.responses, keys):
                for name, value in _facts_of_response(response, key).items():
                    columns[name].append(value)
            for pair in group.pairs:
                columns["pairs"].append((pair.winner, pair.loser))
                columns["offset"].append(pair.offset)
                columns["weight"].append(pair.weight)
        arrays = {name: np.array(some, _TYPES[name]) for name, some in columns.items()}
        arrays["pairs"] = arrays["pairs"].reshape(-1, 2)
        for name in ("cu_resp", "cu_pairs"):  # so far how many each group has
            arrays[name] = np.array([0, *accumulate(columns[name])], np.int64)
        return cls(**arrays)

    @classmethod
    def joined(cls, parts: Sequence["Facts"]) -> "Facts":
        """One after the other."""
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return cls.of(())
        columns: dict[str, Any] = {}
        for f in fields(cls):
            some = [getattr(part, f.name) for part in parts]
            if f.name.startswith("cu_"):
                columns[f.name] = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(c) for c in some]))])
            else:
                columns[f.name] = np.concatenate(some)
        return cls(**columns)

    def taken(self, indices: np.ndarray) -> "Facts":
        """Those of these groups, in this order."""
        responses, cu_resp = _ranges(self.cu_resp, indices)
        pairs, cu_pairs = _ranges(self.cu_pairs, indices)
        at = {"responses": responses, "pairs": pairs, "groups": indices}
        columns = {name: getattr(self, name)[at[of]] for of, names in _COLUMNS.items() for name in names}
        return Facts(cu_resp=cu_resp, cu_pairs=cu_pairs, **columns)

    def only(self, kept: np.ndarray) -> "Facts":
        """With these of the responses, bool[R], and no pairs; a group's hashes stay those of all it had."""
        columns = {name: getattr(self, name)[kept] for name in _COLUMNS["responses"]}
        columns |= {name: getattr(self, name)[:0] for name in _COLUMNS["pairs"]}
        bounds = np.concatenate([[0], np.cumsum(self.per_group(kept))])
        return replace(self, cu_resp=bounds, cu_pairs=np.zeros_like(self.cu_pairs), **columns)

    @cached_property
    def responses(self) -> np.ndarray:
        """Responses of each group, i64[G]."""
        return np.diff(self.cu_resp)

    @cached_property
    def inputs(self) -> np.ndarray:
        """Tokens of each response that go through the model, i64[R]."""
        return self.length.astype(np.int64) - ~np.repeat(self.whole, self.responses)

    @cached_property
    def input_tokens(self) -> np.ndarray:
        """Tokens of the shared-prompt forward of each group, i64[G]."""
        return self.prompt + self.per_group(self.inputs)

    @cached_property
    def scored_tokens(self) -> np.ndarray:
        """i64[G]"""
        return self.per_group(self.scored)

    @cached_property
    def group_of(self) -> np.ndarray:
        """Of each response its group, i64[R]."""
        return np.repeat(np.arange(len(self)), self.responses)

    @cached_property
    def of_pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """(winner, loser) of each pair, i64[P], counted over all responses."""
        first = np.repeat(self.cu_resp[:-1], np.diff(self.cu_pairs))
        return first + self.pairs[:, 0], first + self.pairs[:, 1]

    @cached_property
    def chosen(self) -> np.ndarray:
        """Whether a response is one of PreferenceGroup.chosen, bool[R]."""
        chosen = self.label != 0
        chosen[self.of_pairs[1]] = False
        return chosen

    @cached_property
    def resettable(self) -> np.ndarray:
        """Whether a chosen response has more than one scored token, so that a prompt may go on with the first
        of them, bool[G]."""
        return self.per_group(self.chosen & (self.scored > 1)) > 0

    def totals(self, alone: int) -> dict[str, int]:
        """The totals of the groups, by their names in data_report.json; of `alone` groups, which are prompts
        alone, the one token in place of a response is none."""
        weighted = self.relevant >= 0
        both = self.prompt[self.group_of] + self.length
        sums = {
            "groups": len(self),
            "prompts": len(np.unique(self.prompt_key)),  # different ones
            "responses": len(self.length) - alone,
            "pairs": len(self.pairs),
            "paired_rows": (np.diff(self.cu_pairs) > 0).sum(),
            "unpaired_rows": (self.label[self.cu_resp[:-1]] >= 0).sum(),  # then it is the only response
            "desirable": (self.label == 1).sum(),
            "undesirable": (self.label == 0).sum(),
            "weighted_responses": weighted.sum(),
            "relevant_tokens": self.relevant[weighted].sum(),
            "prompt_tokens": self.prompt.sum(),
            "response_tokens": self.length.sum() - alone,
            "scored_tokens": self.scored.sum() - alone,
            "shared_forward_tokens": self.input_tokens.sum(),  # each prompt once, last tokens left out
            "separate_rows_tokens": both.sum() - alone,  # a row a response
        }
        return {name: int(value) for name, value in sums.items()}

    def pairs_of(self, place: int) -> tuple[Pair, ...]:
        start, end = self.cu_pairs[place : place + 2].tolist()
        ends, more = self.pairs[start:end].tolist(), (self.offset[start:end], self.weight[start:end])
        return tuple(Pair(*both, *rest) for both, *rest in zip(ends, *(some.tolist() for some in more)))

    def said(self, response: int) -> tuple[float | None, float | None, bool | None]:
        """(score, ref_logp, label) of a response, counted over all."""
        score, ref_logp, label = (float(c[response]) for c in (self.score, self.ref_logp, self.label))
        or_none = lambda value: None if np.isnan(value) else value
        return or_none(score), or_none(ref_logp), None if label < 0 else bool(label)

    def outline(self, place: int) -> PreferenceGroup:
        """The group without its tokens: all arrays are empty."""
        numbers = range(*self.cu_resp[place : place + 2].tolist())
        weights = (None if self.relevant[number] < 0 else _NOTHING for number in numbers)
        responses = (Response(_NOTHING, _NOTHING, *self.said(n), w) for n, w in zip(numbers, weights))
        return PreferenceGroup(int(self.row[place]), _NOTHING, tuple(responses), self.pairs_of(place))

    def responses_of(self, groups: np.ndarray) -> np.ndarray:
        """The responses of these groups, one group after the other."""
        return _ranges(self.cu_resp, groups)[0]

    def per_group(self, per_response: np.ndarray) -> np.ndarray:
        """Sums [R] numbers over each group, i64[G]."""
        sums = np.concatenate([[0], np.cumsum(per_response, dtype=np.int64)])
        return sums[self.cu_resp[1:]] - sums[self.cu_resp[:-1]]


_COLUMNS = {
    "groups": tuple("row prompt largest whole digest trained prompt_key images image_tokens".split()),
    "responses": ("length", "scored", "first", "relevant", "key", "score", "ref_logp", "label"),
    "pairs": ("pairs", "offset", "weight"),
}
_TYPES: dict[str, Any] = (
    dict.fromkeys(("row", "cu_resp", "cu_pairs"), np.int64)
    | dict.fromkeys("prompt images image_tokens largest length scored first relevant pairs".split(), np.int32)
    | dict.fromkeys(("digest", "trained", "prompt_key", "key"), HASH)
    | dict.fromkeys(("score", "ref_logp", "offset", "weight"), np.float64)
    | {"whole": np.bool_, "label": np.int8}
)


def _facts_of_group(group: PreferenceGroup, keys: list[bytes]) -> dict[str, Any]:
    return {
        "row": group.row,
        "prompt": len(group.prompt),
        "largest": max(int(group.prompt.max()), *(int(r.ids.max()) for r in group.responses)),
        "whole": group.whole,
        "digest": group_digest(group, keys),
        "trained": trained_digest(group, keys),
        "prompt_key": prompt_key(group),
        "images": len(group.images),
        "image_tokens": sum(image.tokens for image in group.images),
        "cu_resp": len(group.responses),
        "cu_pairs": len(group.pairs),
    }


def _facts_of_response(response, key: bytes) -> dict[str, Any]:
    known = lambda value: np.nan if value is None else float(value)
    weight = response.token_weight
    return {
        "length": len(response.ids),
        "scored": int(response.target_mask.sum()),
        "first": int(response.target_mask.argmax()),
        "relevant": -1 if weight is None else int((weight > 0).sum()),
        "key": key,
        "score": known(response.score),
        "ref_logp": known(response.ref_logp),
        "label": -1 if response.label is None else int(response.label),
    }


def _ranges(cu: np.ndarray, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the items of these groups, one group after the other; their own bounds)."""
    counts = np.diff(cu)[indices]
    bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    starts = np.repeat(cu[:-1][indices] - bounds[:-1], counts)
    return starts + np.arange(bounds[-1]), bounds
