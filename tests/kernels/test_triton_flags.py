"""Rows whose sum of E left the range: they are flagged, and done again alone, by the Triton kernels."""

import math
from collections import Counter

import pytest
import torch
from fastdpo_kernels import linear_logp, reference

from .cases import STATS
from .interpreted import (
    SMALL,
    assert_right,
    head_case,
    interpreted,
    many_chunks,  # noqa: F401
    poison,
    small_tiles,  # noqa: F401
)

if not interpreted:
    pytest.skip("test_interpreter.py runs this", allow_module_level=True)

from fastdpo_kernels import Plan, launch, triton_rows, triton_tile
from fastdpo_kernels.head import Head
from fastdpo_kernels.triton_head import forward

from .test_triton_range import WAYS, logits_case, options_of


def test_which_rows_are_out_of_range():
    gaps = (0.0, 40.0, 90.0, 95.0, 95.5, 1000.0)  # 40 + log 1e24 is 95.26
    logits = [[-gap / 2] + [-2e3] * 68 + [gap / 2] for gap in gaps]
    c = logits_case(logits, [0] * len(gaps))
    head = Head(c.weight, None, None, None, 1.0, 1.0, None)
    state, _ = forward(head, c.hidden, c.target, Plan("forward", 0, 0, 1, len(gaps), 70))
    reference_ = state.peak * math.log(2)
    own, greatest = c.hidden @ c.weight[0], c.hidden @ c.weight[69]
    torch.testing.assert_close(reference_, torch.cat((own[:4] + 40, greatest[4:])))


# a flag is of 32 rows, of 16 under a softcap
ROGUES = {
    "one": [40],
    "block bounds": [0, 15, 32, 63, 64, 69],
    "a block": [*range(32, 48)],
    "all": [*range(70)],
}


@pytest.mark.parametrize("rogue", ROGUES)
@pytest.mark.parametrize(("name", "softcap"), (("forward", None), ("frozen", 150.0), ("keep", None)))
def test_rows_out_of_range_change_no_others(name, softcap, rogue, many_chunks, monkeypatch):  # noqa: F811
    poison(monkeypatch)
    c = head_case(70, 150, softcap=softcap, scale=1).to(torch.float32)
    run = lambda: c.run(linear_logp, WAYS[name], STATS, **options_of(name, c))
    c.target %= 64
    clean, others = run(), torch.ones(70, dtype=torch.bool)
    others[ROGUES[rogue]] = False
    # a token of another chunk than the target's is 250 nats above it, which the softcap leaves 200 of
    apart = c.weight[139] - c.weight[c.target]
    far = 250 * apart / apart.square().sum(1, keepdim=True)
    c.hidden = torch.where(others[:, None], c.hidden, far)
    assert (c.to(torch.float64).run(reference.linear_logp, ())["logp"][~others] < -96).all()
    for key, value in run().items():
        assert (
            value is None or key in ("d_weight", "d_bias") or torch.equal(value[others], clean[key][others])
        )
    # where the greatest token has all of the probability, entropy is nothing to err relative to
    assert_right(c, WAYS[name], STATS if others.any() else (), **options_of(name, c))


@pytest.mark.parametrize("name", ("frozen", "keep"))
def test_a_row_settled_in_some_chunks_and_fine_in_others(name, many_chunks):  # noqa: F811
    rows = [[-300.0 + token for token in range(200)] for _ in range(3)]
    rows[0][70], rows[0][140], rows[0][190] = -150.0, 0.0, 120.0  # raised by three chunks of four
    rows[1][5], rows[1][130] = 100.0, 90.0  # by the first
    rows[2][199] = 0.0  # by the last
    c = logits_case(rows, [1, 66, 2])
    assert_right(c, WAYS[name], STATS, **options_of(name, c))


def test_launches_of_a_span(many_chunks, monkeypatch):  # noqa: F811
    launched, run = [], launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: launched.append(self.kernel.__name__) or run(self))
    c = head_case(7, 150)
    c.to(torch.float32).run(linear_logp, ("hidden",))
    span = ["head_tiles", "merge_sums", "head_tiles", "settle", "head_tiles"]
    assert launched == ["start_rows", *3 * span, "finish_rows", "hidden_gradient"]


@pytest.mark.parametrize("rogue", ([3], [*range(0, 256, 2)]), ids=("one row", "every other row"))
def test_tiles_of_rows_out_of_range_are_dealt_to_all_programs(rogue, monkeypatch):
    from triton.runtime.interpreter import interpreter_builder

    did, counts, tile, tile_pass = Counter(), [], triton_tile._tile, launch.tile_pass

    def counted(*args):
        did[interpreter_builder.grid_idx[0]] += 1
        return tile(*args)

    def counted_pass(*args, flags=None, **kwargs):
        did.clear()
        tile_pass(*args, flags=flags, **kwargs)
        if flags is not None:
            counts.append(dict(did))

    monkeypatch.setattr(triton_tile, "_tile", counted)
    monkeypatch.setattr(launch, "tile_pass", counted_pass)
    c = head_case(256, 700).to(torch.float32)
    c.hidden[rogue] *= 100
    c.run(linear_logp, ("hidden",))
    tiles_in_all = 11 * len({row // 32 for row in rogue})
    assert len(counts) == 2
    for count in counts:
        assert sum(count.values()) == tiles_in_all and max(count.values()) - min(count.values()) <= 1


def test_flagged_blocks_are_found():
    """More of them than are looked at together."""
    import triton
    import triton.language as tl

    @triton.jit
    def find(flags_ptr, out_ptr, blocks, FIND: tl.constexpr):
        count, _ = FIND(flags_ptr, blocks, 0)
        for which in range(0, count):
            tl.store(out_ptr + which, FIND(flags_ptr, blocks, which)[1])
        tl.store(out_ptr + blocks, count)

    flags = (torch.rand(1300) < 0.1).int()
    out = torch.full((1301,), -1, dtype=torch.int32)
    find[(1,)](flags, out, 1300, triton_tile._flagged)
    blocks = flags.nonzero()[:, 0].int()
    assert out[1300] == len(blocks) and torch.equal(out[: len(blocks)], blocks)


FLAGGED = [40, 69]  # of 70 rows, in the second and third block of 32
FLAGS = torch.zeros(70 + 3, dtype=torch.int32)
FLAGS[[*FLAGGED, 70 + 1, 70 + 2]] = 1


def test_only_flagged_rows_are_written():
    c = head_case(70, 130).to(torch.float32)
    head = Head(c.weight, c.bias, None, None, 1.0, 1.0, None)
    state, _ = forward(head, c.hidden, c.target, Plan("keep", 0, 0, 1, 70, 130))
    out, partial = torch.full((70, 160), 7.0), torch.full((3, 3, 70), 7.0)
    where = (SMALL.plain().half(), head, c.hidden, c.target, (0, 130), state)
    launch.tile_pass(*where, out=out[:, :130], partial=partial, profile=True, flags=FLAGS)
    others = [row for row in range(70) if row not in FLAGGED]
    assert (out[others] == 7).all() and (out[:, 130:] == 7).all() and (partial[..., others] == 7).all()
    own = torch.nn.functional.one_hot(c.target, 130)
    torch.testing.assert_close(out[FLAGGED, :130], (state.kept[:, :130] * (1 - own))[FLAGGED])
    assert (partial[1:, :, FLAGGED] != 7).all()


def test_only_flagged_rows_are_settled():
    """To the greatest peak of 20 tiles, by what the sums of E, 300 wide, shrink as well."""
    peak, rest, sums, partial = torch.rand(70), torch.rand(70), torch.randn(70, 300), torch.rand(3, 20, 70)
    partial[1] = 9 * torch.rand(20, 70) - 3
    before = [t.clone() for t in (peak, rest, sums)]
    arguments = (FLAGS, partial, partial.stride(0), peak, rest, sums, 70, 20, 300)
    launch.run(triton_rows.settle, 3, *arguments, BM=32, BT=16, BD=128)
    higher = torch.maximum(before[0], partial[1].amax(0))
    shrink = torch.exp2(before[0] - higher)
    after = (higher, before[1] * shrink + (partial[2] * torch.exp2(partial[1] - higher)).sum(0))
    flagged = FLAGS[:70] == 1
    for got, was, new in zip((peak, rest, sums), before, (*after, before[2] * shrink[:, None])):
        torch.testing.assert_close(got[flagged], new[flagged])
        assert torch.equal(got[~flagged], was[~flagged])
