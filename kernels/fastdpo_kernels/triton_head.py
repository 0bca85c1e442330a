"""The head by Triton kernels and cuBLAS: the backend for GPUs with a tile (see head_pass.py).

See triton_tile.py for E. The buffers here are [M, v], row by row, where chunked.py has [v, M].

Letters: M scored rows, D hidden, V vocab, v a chunk of it.
"""

import torch
from triton import cdiv

from . import launch, tiles, triton_finish, triton_rows
from .chunk import Softmax
from .head_pass import NONE, Gradients, State, factors, target_coefficient
from .ops import aligned_rows, matmul, matmul_add
from .plan import spans, spare_width
from .triton_tile import BITS, NATS

SLOTS = 6  # of partial results, numbered in triton_tile.py; the first three settle rows out of range
MERGED = 16  # tiles whose sums are merged at a time; plan.NARROWEST is as many


def tile_for(head, x):
    """The tile of a pass over these tensors; descriptors need 16-byte rows and starts."""
    tile = tiles.tile(x.device, x.dtype)
    fits = all(t.data_ptr() % 16 == 0 and t.stride(0) * t.itemsize % 16 == 0 for t in (head.weight, x))
    return tile if fits and not tiles.avoids("triton") else tile.plain()


def start(head, x, target):
    """(State, rest f32[M]): references are set, `rest`, the sum of E with the target left out, is 0."""
    new, w = lambda: torch.empty(len(x), dtype=torch.float32, device=x.device), head.weight
    state, rest = State(new(), new(), new(), new()), new()
    by_row = (target, state.peak, state.target_logit, rest)
    sizes, tile = (len(x), len(w), x.shape[1], x.stride(0), w.stride(0), *head.ends), tile_for(head, x)
    block = min(128, tile.columns)
    how = dict(BLOCK=block, BK=tile.depth, warps=tile.warps, stages=tile.stages)
    launch.run(triton_rows.start_rows, cdiv(len(x), block), x, w, head.bias, *by_row, *sizes, **how)
    return state, rest


def forward(head, hidden, target, how, stats=()):
    """One pass over the vocabulary: keep fills `kept` with E (times the softcap's slope, at the target
    less the whole sum), frozen makes `sums` f32[M, D], the target left out."""
    x = hidden.contiguous()
    M, V, tile = len(x), len(head.weight), tile_for(head, x)
    new = lambda *shape: torch.empty(*shape, dtype=torch.float32, device=x.device)
    state, rest = start(head, x, target)
    if head.group is not None:
        state.target_logit = head.group.sum(head.group.own(state.target_logit, target)[0])
        state.peak = (state.target_logit + triton_rows.OFFSET.value) * BITS.value
    cuts = spans(V, how.width)
    width, chunk = cuts[0][1], None
    if how.name == "keep":
        chunk = state.kept = aligned_rows(M, V, like=x)
    elif how.name == "frozen":
        chunk = aligned_rows(M, width, like=x)
        state.sums = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    scratch = new(3, cdiv(width, tile.columns), M)
    profile = new(SLOTS, cdiv(V, tile.columns), M) if stats else None
    for v0, v1 in cuts:
        where = (head, x, target, (v0, v1), state)
        out = None if chunk is None else chunk[:, : v1 - v0]
        partial = profile[:, v0 // tile.columns :] if stats else scratch
        launch.tile_pass(tile, *where, out=out, partial=partial, sums=True, profile=bool(stats), stats=stats)
        _add_sums(tile, where, partial, rest, scratch, out)
        if state.sums is not None:
            matmul_add(out, head.weight[v0:v1], state.sums)
    if head.group is not None:
        rest = _merge(tile, (head, x, target, (0, V), state), rest)
        if stats:
            profile = _merged(head.group, profile, target, state.target_logit, stats)
    finished = (state.peak, rest, state.target_logit, state.total, state.logp)
    launch.run(triton_finish.finish_rows, cdiv(M, 128), *finished, M, BLOCK=128)
    if state.kept is not None:
        launch.put_target(state.kept, target, _own(head, state), (0, V))
    values = statistics(profile, V, state.target_logit, stats) if stats else {}
    state.entropy = values.get("entropy")
    return state, values


def statistics(profile, V, target_logit, stats):
    """{name: f32[M]} of those named, from the tiles' profiles f32[SLOTS, tiles, M]."""
    M, values = len(target_logit), {name: torch.empty_like(target_logit) for name in stats}
    into = (values.get(name) for name in ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1"))
    arguments = (profile, profile.stride(0), target_logit, *into, M, profile.shape[1], V)
    launch.run(triton_finish.finish_stats, cdiv(M, 32), *arguments, BM=32, BT=MERGED)
    return values


def _add_sums(tile, where, partial, rest, scratch, out):
    """Adds a chunk's sums to rest, and does its rows out of range again, relative to their own peak.

    Nothing here waits for the device: with no such row the kernels end at once. Both passes over such rows
    are by one tile, so that their logits have the same bits: E adds up to `rest` however large they are.
    """
    head, x, _, (v0, v1), state = where
    (M, D), T, again = x.shape, cdiv(v1 - v0, tile.columns), _tile_again(tile, head)
    blocks = cdiv(M, again.rows)
    flags = torch.empty(M + blocks, dtype=torch.int32, device=x.device)
    merged = dict(BM=again.rows, BT=MERGED)
    launch.run(triton_rows.merge_sums, blocks, partial, rest, flags, M, T, **merged)
    launch.tile_pass(again, *where, partial=scratch, profile=True, flags=flags)
    profiles = (flags, scratch, scratch.stride(0), state.peak, rest, state.sums, M, T, D)
    launch.run(triton_rows.settle, blocks, *profiles, **merged, BD=128)
    if out is not None:
        launch.tile_pass(again, *where, out=out, flags=flags)


def _tile_again(tile, head):
    """Of the rows that are done again: small enough for whatever they leave."""
    half = tile.plain().half()
    return half if head.softcap is None else half.half()


def _merge(tile, where, rest):
    """Brings the rows of all slices to one reference, the greatest. Returns their sum `rest`."""
    head, x, target, _, state = where
    own, whole = state.peak, Softmax(state.peak, rest, state.target_logit)
    head.group.merge(whole, target, NATS.value)
    state.peak, state.target_logit = whole.peak, whole.target_logit
    if state.sums is not None:
        state.sums.mul_(torch.exp2(own - state.peak)[:, None])
    if state.kept is not None:  # a target's entry could not be written beside an E that shrinks to 0
        again, moved = _tile_again(tile, head), (own != state.peak).int()
        blocks = torch.nn.functional.pad(moved, (0, -len(x) % again.rows)).view(-1, again.rows).amax(1)
        flags = torch.cat((moved, blocks))
        launch.tile_pass(again, *where, out=state.kept[:, : len(head.weight)], flags=flags)
    return whole.rest


def _merged(group, profile, target, target_logit, stats):
    """The profile of all slices as of one tile, f32[SLOTS, 1, M]; its logits add up to V of their means."""
    _, peaks, total, *slots = profile
    named = ("entropy", "log_sum_sq_probs", "mean_logit")
    slots = [slot if name in stats else None for name, slot in zip(named, slots)]
    one = Softmax(peaks, total, target_logit, *slots)
    V = group.merge(one, target, NATS.value)
    logits = None if one.logits is None else one.logits * (group.V / V)
    rows = (None, one.peak, one.rest, one.plogp, one.squares, logits)
    return torch.stack([one.rest if row is None else row for row in rows])[:, None]


def gradients(head, hidden, target, how, state, need, d_logp, d_entropy=None, into=NONE, wide=False):
    """See head_pass.py; hidden's is of hidden's dtype, but of logp's where slices were added up."""
    x = hidden.contiguous()
    if not isinstance(d_logp, torch.Tensor):  # a number over a tensor is a product with its reciprocal
        d_logp = torch.full_like(state.logp, d_logp)
    put = lambda name: matmul if getattr(into, name) is None else matmul_add
    out = Gradients.like(head, need, into, state.logp.dtype if wide else None)
    at_target = target_coefficient(head, state, d_logp, d_entropy)
    factor, by_logit = factors(head, state, d_logp, d_entropy)
    sums = state.sums
    if sums is None and state.kept is not None and d_entropy is None:
        sums = _of_kept(head, x, state.kept, need, factor, out, put)
        at_target -= factor * _own(head, state)  # what is left, of which rounding took its part
    elif sums is None:
        # beside a kept matrix there is room for what the forward held of tiles' sums
        width = how.width if state.kept is None else spare_width(len(head.weight), x.dtype)
        sums = _again(head, x, target, width, state, need, factor, by_logit, at_target, out, put)
        factor = None
    if need.hidden:
        w, out.hidden = head.weight, torch.empty_like(x) if head.group is None else sums
        arguments = (sums, w, target, factor, at_target, out.hidden, len(w), x.shape[1], w.stride(0))
        launch.run(triton_finish.hidden_gradient, len(x), *arguments, BLOCK=1024)
        if head.group is not None:
            head.group.sum(out.hidden)
    return out


def _own(head, state):
    """The target's own entry of a kept E less the row's sum, of which dZ is a multiple as everywhere else:
    f32[M], rounded to E's dtype."""
    own = torch.expm1(state.logp) * state.total  # without the cancellation
    if head.softcap is not None:
        own *= head.slope(state.target_logit)
    return own.to(state.kept.dtype).float()


def _of_kept(head, x, kept, need, factor, out, put):
    """Two plain GEMMs on E: the row factor goes onto x for dW, and onto the result for dX. Returns the sums
    of E_v W_v f32[M, D], the target's own entry with them, or None."""
    e, sums = kept[:, : len(head.weight)], None
    if need.hidden:
        sums = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        matmul(e, head.weight, sums)
    if need.weight:
        put("weight")(e.t(), (x * factor[:, None]).to(x.dtype), out.weight)
    if need.bias:
        high = factor.to(x.dtype)  # and the rest of fp32 in a column of its own
        columns = torch.stack((high, (factor - high).to(x.dtype)), 1)
        by_column = torch.empty(len(out.bias), 2, dtype=torch.float32, device=x.device)
        matmul(e.t(), columns, by_column)
        _put_bias(out.bias, by_column.sum(1), put)
    return sums


def _again(head, x, target, width, state, need, factor, by_logit, at_target, out, put):
    """dZ from logits computed again, a chunk at a time; its rows of dW are written once. Returns the sums of
    dz_v W_v f32[M, D] without the target, or None."""
    tile, cuts = tile_for(head, x), spans(len(head.weight), width)
    sums = torch.zeros(x.shape, dtype=torch.float32, device=x.device) if need.hidden else None
    block = aligned_rows(len(x), cuts[0][1], like=x)
    for v0, v1 in cuts:
        dz = block[:, : v1 - v0]
        launch.tile_pass(tile, head, x, target, (v0, v1), state, out=dz, factor=factor, by_logit=by_logit)
        if need.hidden:
            matmul_add(dz, head.weight[v0:v1], sums)
        launch.put_target(dz, target, at_target, (v0, v1))
        if need.bias:
            _put_bias(out.bias[v0:v1], dz.sum(0, dtype=torch.float32), put)
        if need.weight:
            put("weight")(dz.t(), x, out.weight[v0:v1])
    return sums


def _put_bias(bias, value, put):
    (bias.copy_ if put("bias") is matmul else bias.add_)(value)
