"""The head's two passes by Triton kernels and cuBLAS: the counterpart of chunked.py on a GPU.

`scan` reduces every row to its log-prob and keeps E where a plan wants it; `gradients` goes back. See
triton_tile.py for E. The buffers here are [M, v], row by row, where chunked.py has [v, M].

Letters: M scored rows, D hidden, V vocab, v a chunk of it.
"""

from dataclasses import dataclass

import torch
import triton

from . import launch, tiles
from .chunked import Gradients, Rows, target_coefficient
from .ops import matmul, matmul_add
from .plan import spare_width


@dataclass(frozen=True)
class State:
    """Of each row while the vocabulary goes by, f32[M]."""

    reference: torch.Tensor  # r in E = exp(z - r)
    target_logit: torch.Tensor
    rest: torch.Tensor  # sum of E, the target left out


def buffer(M, columns, like):
    """An uninitialised [M, columns or more] matrix with rows that descriptors and cuBLAS like."""
    return torch.empty(M, tiles.padded(columns, like.dtype), dtype=like.dtype, device=like.device)


def tile_for(head, x):
    """The tile of a pass over these tensors; descriptors need 16-byte rows and starts."""
    tile = tiles.tile(x.device, x.dtype)
    fits = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 for t in (head.weight, x))
    return tile if fits and not tiles.avoids("triton") else tile.plain()


def spans(V, how, tile):
    """The vocabulary cut for the plan `how`.

    plan.py allows 12 bytes for an entry of a chunk: fp32 logits and two temporaries. Here an entry is
    one of E in 2 bytes, so chunks are five times as wide (partial results take some of the sixth). A
    width of whole merges of tiles keeps the order of sums the same however many chunks there are: a
    pass without gradient gives the same log-probs.
    """
    return [(0, V)] if how.name in ("forward", "keep") else _cut(V, tile, 5 * -(-V // how.chunks))


def _cut(V, tile, most):
    """[start, stop) of chunks of about `most` columns."""
    unit = tile.columns * launch.MERGED
    width = max(unit, most // unit * unit)
    return [(v, min(v + width, V)) for v in range(0, V, width)]


def scan(head, x, target, spans, tile, *, stats=(), kept=None, sums=None):
    """One pass over the vocabulary: (Rows, stats by name).

    x [M, D] contiguous, target i64[M]. kept [M, V] is filled with E (times the softcap's slope, 0 at
    the target), and needs one span; sums f32[M, D] grows by sum_v E_v W_v, the target left out.
    """
    M, V, columns = len(x), len(head.weight), tile.columns
    new = lambda *shape: torch.empty(*shape, dtype=torch.float32, device=x.device)
    state = State(new(M), new(M), new(M))
    launch.start_rows(head, x, target, state).run()
    width = max(v1 - v0 for v0, v1 in spans)
    chunk = kept if sums is None else buffer(M, width, x)
    scratch = new(3, triton.cdiv(width, tile.plain().columns), M)
    profile = new(launch.SLOTS, triton.cdiv(V, columns), M) if stats else None
    safe = _Safe(head, x, target, tile, state, scratch, sums)
    for v0, v1 in spans:
        out = None if chunk is None else chunk[:, : v1 - v0]
        partial = scratch if profile is None else profile[:, v0 // columns :]
        launch.tile_pass(
            *(tile, head, x, target, (v0, v1), state),
            out=out,
            partial=partial,
            sums=True,
            profile=profile is not None,
            stats=stats,
        ).run()
        safe.add_chunk((v0, v1), partial, out)
        if sums is not None:
            matmul_add(out, head.weight[v0:v1], sums)
    total, logp = new(M), new(M)
    launch.finish_rows(state, total, logp).run()
    values = {name: new(M) for name in stats}
    if stats:
        launch.finish_stats(profile, profile.shape[1], V, state.target_logit, values).run()
    return Rows(state.reference, total, state.target_logit, logp, values.get("entropy")), values


class _Safe:
    """Adds each chunk's sums, and does the rows out of range again, relative to their own peak.

    Nothing here waits for the device: with no such row the kernels end at once.
    """

    def __init__(self, head, x, target, tile, state, scratch, sums):
        self.arguments, self.state = (tile.plain(), head, x, target), state
        self.columns, self.scratch, self.sums = tile.columns, scratch, sums
        new = lambda n: torch.empty(n, dtype=torch.int32, device=x.device)
        self.out_of_range, self.listed = new(len(x)), (new(len(x)), new(1))
        self.shrink = torch.empty(len(x), dtype=torch.float32, device=x.device)

    def add_chunk(self, span, partial, out):
        state, scratch, listed = self.state, self.scratch, self.listed
        tiles_in = lambda columns: triton.cdiv(span[1] - span[0], columns)
        launch.merge_sums(partial, tiles_in(self.columns), state, self.out_of_range).run()
        launch.gather(self.out_of_range, listed).run()
        again = (*self.arguments, span, state)
        launch.tile_pass(*again, partial=scratch, profile=True, listed=listed).run()
        launch.settle(listed, scratch, tiles_in(self.arguments[0].columns), state, self.shrink).run()
        if out is not None:
            launch.tile_pass(*again, out=out, listed=listed).run()
        if self.sums is not None:
            launch.rescale(listed, self.shrink, self.sums).run()


def frozen_gradient(head, x, target, rows, sums, d_logp, out):
    """Writes the gradient of hidden [M, D] to out, from the sums of `scan`."""
    factor, at_target = -head.scale * d_logp / rows.total, target_coefficient(head, rows, d_logp)
    launch.hidden_gradient(sums, head.weight, target, factor, at_target, out).run()


def gradients(head, x, target, spans, tile, rows, need, *, d_logp, d_entropy=None, kept=None, into=None,
              wide=False):  # fmt: skip
    """The Gradients for upstream gradients d_logp, d_entropy f32[M] (None: zero), in the parameters'
    dtype, or float32 with `wide`. need: a Gradients of booleans. kept: from `scan`; without it, and
    for d_entropy always, the logits are computed again. into: wide Gradients of other rows, to which
    the parameters' are added instead.
    """
    out = into if into is not None else Gradients.like(head, need, torch.float32 if wide else None)
    put = matmul if into is None else matmul_add
    d_logp = torch.zeros_like(rows.logp) if d_logp is None else d_logp
    at_target = target_coefficient(head, rows, d_logp, d_entropy)
    factor = -head.scale * d_logp / rows.total
    if kept is not None and d_entropy is None:
        sums = _kept(head, x, target, rows, need, factor, kept, out, put)
    else:
        by_logit = None
        if d_entropy is not None:
            # dH/dz = -p (log p + H) and log p = (z - r) - log(total)
            by_logit = -head.scale * d_entropy / rows.total
            factor = factor + by_logit * (rows.entropy - torch.log(rows.total))
        if kept is not None:  # beside it there is room for what the forward held of tiles' sums
            spans = _cut(len(head.weight), tile, spare_width(len(head.weight), x.dtype))
        again = _Again(head, x, target, tile, rows, factor, by_logit, at_target)
        sums, factor = again.run(spans, need, out, put), None
    if need.hidden:
        out.hidden = torch.empty_like(x)
        launch.hidden_gradient(sums, head.weight, target, factor, at_target, out.hidden).run()
    return out


def _kept(head, x, target, rows, need, factor, kept, out, put):
    """Two plain GEMMs on E: the row factor goes onto x for dW, and onto the result for dX."""
    whole = (0, len(head.weight))
    sums = None
    if need.hidden:
        sums = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        matmul(kept, head.weight, sums)
    if need.weight or need.bias:
        own = torch.expm1(rows.logp) * rows.total  # E minus the total, without the cancellation
        if head.softcap is not None:
            own *= head.slope(rows.target_logit)
        launch.put_target(kept, target, own, whole).run()
    if need.weight:
        put(kept.t(), (x * factor[:, None]).to(x.dtype), out.weight)
    if need.bias:
        high = factor.to(x.dtype)  # and the rest of fp32 in a column of its own
        columns = torch.stack((high, (factor - high).to(x.dtype)), 1)
        by_column = torch.empty(len(out.bias), 2, dtype=torch.float32, device=x.device)
        matmul(kept.t(), columns, by_column)
        _put_bias(out.bias, by_column.sum(1), put)
    if need.weight or need.bias:  # as it was, for another backward
        launch.put_target(kept, target, torch.zeros_like(rows.logp), whole).run()
    return sums


def _put_bias(bias, value, put):
    if put is matmul:
        bias.copy_(value)
    else:
        bias.add_(value)


class _Again:
    """dZ from logits computed again, a chunk at a time; its rows of dW are written once."""

    def __init__(self, head, x, target, tile, rows, factor, by_logit, at_target):
        self.head, self.x, self.target, self.at_target = head, x, target, at_target
        state = State(rows.peak, rows.target_logit, rows.total)
        self.write = lambda span, out: launch.tile_pass(
            *(tile, head, x, target, span, state), out=out, factor=factor, by_logit=by_logit
        ).run()

    def run(self, spans, need, out, put):
        """Fills out's parameters; returns the sums of dz_v W_v [M, D] without the target, or None."""
        x = self.x
        sums = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if need.hidden else None
        block = buffer(len(x), max(v1 - v0 for v0, v1 in spans), x)
        for v0, v1 in spans:
            dz = block[:, : v1 - v0]
            self.write((v0, v1), dz)
            if need.hidden:
                matmul_add(dz, self.head.weight[v0:v1], sums)
            launch.put_target(dz, self.target, self.at_target, (v0, v1)).run()
            if need.bias:
                _put_bias(out.bias[v0:v1], dz.sum(0, dtype=torch.float32), put)
            if need.weight:
                put(dz.t(), x, out.weight[v0:v1])
        return sums
