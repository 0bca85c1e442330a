"""Offsets past 32 bits. Partial results lie slot after slot, each of tiles x M values, and a slot's number
times that length needs more bits than the length: from 429 million values on with statistics, whose last
slot is number 5, and from 1.07 billion on for the three slots that every pass has."""

import pytest
import torch

from .interpreted import SMALL, head_case, interpreted, small_tiles  # noqa: F401

if not interpreted:
    pytest.skip("test_interpreter.py runs this", allow_module_level=True)

from fastdpo_kernels import launch, triton_head, triton_rows
from fastdpo_kernels.head import Head

STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
STRIDE = 2**30  # twice it, where the third slot starts, is negative in 32 bits
M, V, TILES = 3, 130, 3


@pytest.fixture
def slots(tmp_path):
    """near and far: the same slots, close by and STRIDE apart, in a file of holes (34 GB, few of them
    written). An offset that wraps is at most 2^31 too low, and falls into the room before `far`."""
    room = 2**31
    file = torch.from_file(str(tmp_path / "holes"), shared=True, size=room + triton_head.SLOTS * STRIDE)
    far = file[room:].as_strided((triton_head.SLOTS, TILES, M), (STRIDE, M, 1), room)
    return torch.zeros(triton_head.SLOTS, TILES, M), far


def passes():
    """A function of partial results that launches a whole pass with statistics."""
    c = head_case(M, V).to(torch.float32)
    head = Head(c.weight, c.bias, None, None, 1.0, 1.0, None)
    state, _ = triton_head.start(head, c.hidden, c.target)
    arguments = (SMALL, head, c.hidden, c.target, (0, V), state)
    return state, lambda partial: launch.tile_pass(
        *arguments, partial=partial, sums=True, profile=True, stats=STATS
    )


def test_the_gemm_leaves_its_results_there(slots):
    near, far = slots
    _, run = passes()
    run(near)
    run(far)
    assert (near != 0).all()
    assert torch.equal(far, near)


def test_statistics_are_read_there(slots):
    near, far = slots
    state, run = passes()
    run(near)
    far.copy_(near)
    got = []
    for partial in slots:
        values = triton_head.statistics(partial, V, state.target_logit, STATS)
        got.append(torch.stack(list(values.values())))
    assert got[0][:3].all() and torch.equal(*got)


def test_rows_out_of_range_are_settled_there(slots):
    near, far = slots
    state, run = passes()
    run(near)
    far.copy_(near)
    got = []
    for partial in slots:
        peak, rest = state.peak.clone(), torch.zeros(M)
        arguments = (
            torch.ones(M + 1, dtype=torch.int32),
            partial,
            partial.stride(0),
            peak,
            rest,
            None,
            M,
            TILES,
            1,
        )
        launch.run(triton_rows.settle, 1, *arguments, BM=32, BT=16, BD=128)
        got.append(rest)
    assert got[0].all() and torch.equal(*got)
