"""The records that flow through fastdpo, from one preference row to one loss.

Letters, here and everywhere: T packed tokens, D hidden, V vocabulary, M scored tokens, R responses,
P pairs, G groups, S attention segments, K gathered keys.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor

from fastdpo.moving import to_device
from fastdpo.preferences import Groups, Pair, PreferenceGroup, Response

__all__ = ["FullSegments", "Groups", "Movable", "PackedGroups", "Pair", "PreferenceGroup", "PrefixLayout"]
__all__ += ["Response", "ResponseLogps", "Responses"]


@dataclass(frozen=True, eq=False)
class Movable:
    """A frozen record of tensors (and of records of tensors) that can move to a device."""

    def to(self, device: torch.device | str) -> Self:
        """The same record there; see `moving.to_device` for what a GPU gets."""
        moved = iter(to_device(self._tensors(), device))
        return self._with(lambda tensor: next(moved))

    def _tensors(self) -> list[Tensor]:
        """All tensors, those of records inside too, in the order of the fields."""
        found: list[Tensor] = []
        self._with(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def _with(self, change: Callable[[Tensor], Tensor]) -> Self:
        """With change(tensor) in the place of each."""

        def changed(value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(value)
            if isinstance(value, Movable):
                return value._with(change)
            if isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                return tuple(map(change, value))
            if isinstance(value, dict) and value and all(isinstance(v, Tensor) for v in value.values()):
                return {name: change(tensor) for name, tensor in value.items()}
            return value

        return replace(self, **{f.name: changed(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True, eq=False)
class PrefixLayout(Movable):
    """Which keys each query of a packed microbatch sees.

    Per group the queries are [prompt + R1 | R2 | ...] and the keys are gathered to
    [prompt + R1 | prompt + R2 | ...]; every segment is then bottom-right causal, which is exact
    (research credit: flash-preference, PrefixGrouper, dpo-prefix-sharing).
    """

    cu_q: Tensor  # i32[S+1]
    cu_k: Tensor  # i32[S+1]
    max_q: int
    max_k: int
    kv_index: Tensor  # i64[K]: the packed row each gathered key comes from
    first_copy: Tensor  # i64[T]: for each packed row, its first place in kv_index
    more_rows: tuple[Tensor, ...]  # per further copy of shared rows: which rows, i64, all different
    more_places: tuple[Tensor, ...]  # ... and where in kv_index those copies are, i64
    seen_until: Tensor  # i64[T]: query q sees key k exactly when k <= q < seen_until[k]
    segments: tuple[tuple[int, int, int, int], ...]  # (q start, q end, k start, k end), on the CPU
    full: "FullSegments | None" = None  # where some prompt rows see both ways; segments has the others
    # what the segments backend has built for this layout, by window
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)
    seen: list[tuple[str, int | None]] | None = None  # where given, attention calls append (backend, window)


@dataclass(frozen=True, eq=False)
class FullSegments(Movable):
    """Blocks of a prompt whose rows see each other, the later ones too, and all before the block: each is a
    segment, queries = the block, keys = the prompt up to its end. Their keys are the last of kv_index."""

    cu_q: Tensor  # i32[B+1]
    cu_k: Tensor  # i32[B+1]
    max_q: int
    max_k: int
    segments: tuple[tuple[int, int, int, int], ...]  # as PrefixLayout's: q in packed rows, k in kv_index
    first_key: int  # where in kv_index their keys begin
    rows: Tensor  # i64[.]: the packed rows of all blocks
    other_rows: Tensor  # i64[.]: all other packed rows, in order
    place: Tensor  # i64[T]: where each packed row is in [other_rows, rows]


@dataclass(frozen=True, eq=False)
class Responses:
    """How the scored tokens of a microbatch form responses, and responses pairs."""

    cu_resp: Tensor  # i64[R+1]: the scored tokens of response r are cu_resp[r]:cu_resp[r+1]
    group: Tensor  # i64[R]: the number of its group in the batch; rising
    pairs: Tensor  # i64[P, 2]: (winner, loser) as indices of responses
    offset: Tensor  # f32[P]
    weight: Tensor  # f32[P]
    chosen: Tensor  # i64[C]: responses that no other response beats
    desirable: Tensor  # i64[.]: responses labelled so, or the winner of each pair
    undesirable: Tensor  # i64[.]: ... or the loser of each pair
    paired_tokens: int  # scored tokens of both responses of each pair, over all pairs
    score: Tensor  # f32[R]: the rows' ratings, NaN where there is none
    token_weight: Tensor | None  # f32[M]; None where no row has any, NaN in the responses without
    ref_token_logp: Tensor | None  # f32[M]; None where the objective asked for no reference
    old_token_logp: Tensor | None  # f32[M]: of the policy that sampled; None: the reference's are those


@dataclass(frozen=True, eq=False)
class PackedGroups(Responses, Movable):
    """One microbatch: whole groups, flat. `hidden[score_row]` predicts `target`.

    With a layout the forward is one shared-prompt row, T tokens in [1, T]. Without one (models whose
    attention cannot be shared) it is one padded row a response, and T counts the rows' flattened places.
    """

    input_ids: Tensor  # i64[1, T], or i64[R, L] unshared
    position_ids: Tensor  # the same shape; of models that place images in height and width [3, ...]
    attention_mask: Tensor | None  # i64[R, L], unshared only
    layout: PrefixLayout | None
    score_row: Tensor  # i64[M]
    target: Tensor  # i64[M]
    rows: tuple[int, ...]  # the data set's row numbers, one a group
    group_resp: tuple[int, ...]  # G+1 bounds: responses of group g are group_resp[g]:group_resp[g+1]
    group_scored: tuple[int, ...]  # G+1 bounds in the scored tokens
    input_tokens: int  # tokens that go through the model, without padding
    unshared_tokens: int  # tokens that separate rows would take (prompt once a response, last token kept)
    stands_in: bool = (
        False  # computed where a rank has nothing to do, so that all compute as often; counts nothing
    )
    images: dict[str, Tensor] = field(default_factory=dict)  # what the model takes of its prompts' images
    # i64[.]: of each image token the row of features it takes, where an image has several places and is
    # encoded once; None: one after the other
    features: Tensor | None = None

    @property
    def some_rows(self) -> str:
        """Its rows' numbers, for errors."""
        return ", ".join(map(str, self.rows[:8])) + (", ..." if len(self.rows) > 8 else "")


@dataclass(frozen=True, eq=False)
class ResponseLogps(Responses):
    """What an objective sees: per-token log-probs of a microbatch and how they form responses and pairs."""

    token_logp: Tensor  # f32[M], the policy's, with gradient
    token_stats: dict[str, Tensor]  # f32[M] each; only those the objective named
    aux_loss: Tensor | None = None  # the balance loss of one microbatch of a mixture of experts
    context: dict[str, Tensor | float] = field(default_factory=dict)  # what the objective knows of the step

    @classmethod
    def of(
        cls,
        batch: PackedGroups,
        token_logp: Tensor,
        ref_token_logp: Tensor | None = None,
        token_stats: dict[str, Tensor] | None = None,
    ) -> "ResponseLogps":
        shared: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(Responses)}
        shared["ref_token_logp"] = ref_token_logp
        return cls(token_logp=token_logp, token_stats=token_stats or {}, **shared)

    @classmethod
    def joined(cls, parts: Sequence["ResponseLogps"]) -> "ResponseLogps":
        """Several microbatches as one, response after response."""
        first, starts = parts[0], list(accumulate((len(p.cu_resp) - 1 for p in parts), initial=0))
        of = lambda name: [getattr(p, name) for p in parts]
        together: dict[str, Any] = {}
        for name in ("token_logp", "ref_token_logp", "old_token_logp", "offset", "weight", "score"):
            together[name] = None if getattr(first, name) is None else torch.cat(of(name))
        for name in ("pairs", "chosen", "desirable", "undesirable"):
            together[name] = torch.cat([value + start for value, start in zip(of(name), starts)])
        group: list[Tensor] = []
        for own in of("group"):
            group.append(own + (group[-1][-1] + 1 if group else 0))
        together["group"] = torch.cat(group)
        together["paired_tokens"] = sum(of("paired_tokens"))
        together["cu_resp"] = torch.cat([first.cu_resp[:1], torch.cat(of("lengths")).cumsum(0)])
        weighted = any(weight is not None for weight in of("token_weight"))
        together["token_weight"] = torch.cat(of("token_weights")) if weighted else None
        stats = {name: torch.cat([p.token_stats[name] for p in parts]) for name in first.token_stats}
        return cls(token_stats=stats, context=first.context, **together)

    def kept(self) -> "ResponseLogps":
        """The same values in memory of their own, for whoever keeps them: what a microbatch brought are views
        of all that went to the GPU with it."""
        values = {f.name: getattr(self, f.name) for f in fields(Responses)}
        copies: dict[str, Any] = {name: v.clone() for name, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **copies)

    def to(self, device: torch.device | str) -> "ResponseLogps":
        """The same values without gradient, on that device."""
        moved = lambda v: v.detach().to(device) if isinstance(v, Tensor) else v
        values: dict[str, Any] = {f.name: moved(getattr(self, f.name)) for f in fields(self)}
        values["token_stats"] = {name: moved(value) for name, value in self.token_stats.items()}
        return replace(self, **values)

    def detached(self) -> "ResponseLogps":
        """The same values without gradient."""
        return replace(self, token_logp=self.token_logp.detach())

    def per_response(self, per_token: Tensor) -> Tensor:
        """Sums [M] values over each response, [R] in their dtype. Sums in fp64: a response can be
        thousands of nats, where one fp32 step is already 5e-4."""
        sums = torch.segment_reduce(per_token.double(), "sum", offsets=self.cu_resp)
        return sums.to(per_token.dtype)

    def per_token(self, per_response: Tensor) -> Tensor:
        """Repeats [R] values over the tokens of each response, [M]."""
        return per_response.repeat_interleave(self.lengths, output_size=len(self.token_logp))

    @property
    def token_weights(self) -> Tensor:
        """f32[M]: token_weight, NaN where there is none."""
        missing = torch.full_like(self.token_logp, torch.nan, requires_grad=False)
        return missing if self.token_weight is None else self.token_weight

    @property
    def lengths(self) -> Tensor:
        """Scored tokens of each response, i64[R]."""
        return self.cu_resp.diff()

    @property
    def logp(self) -> Tensor:
        """log pi(response | prompt), f32[R]."""
        return self.per_response(self.token_logp)

    @property
    def ref_logp(self) -> Tensor:
        """The reference's log pi(response | prompt), f32[R]."""
        assert self.ref_token_logp is not None
        return self.per_response(self.ref_token_logp)

    @property
    def log_ratio(self) -> Tensor:
        """log pi - log pi_ref of each response, f32[R]: differences a token first, so that equal
        models give exactly 0 and no large sums cancel."""
        if self.ref_token_logp is None:
            raise ValueError("this objective needs reference log-probs, and the batch carries none")
        return self.per_response(self.token_logp - self.ref_token_logp)

    @property
    def winner(self) -> Tensor:
        return self.pairs[:, 0]

    @property
    def loser(self) -> Tensor:
        return self.pairs[:, 1]
