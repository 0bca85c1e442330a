"""Blocks that see both ways: all backends against the dense oracle, which is the mask written out."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fastdpo.data.layout import Prompt
from fastdpo.data.packing import pack
from fastdpo.model import attention
from tests.tiny import group

# prompt, responses, blocks: in the middle, two, from the start, to the end, all of it, none
CASES = [
    (11, [5, 1, 3], ((3, 8),)),
    (14, [4, 6], ((2, 5), (7, 13))),
    (9, [3, 1], ((0, 6),)),
    (8, [1, 4], ((5, 8),)),
    (7, [2, 5, 1], ((0, 7),)),
    (6, [1, 1], ((0, 6),)),
    (10, [3, 2], ()),
]


def layout_of(cases):
    groups = [group(row, n, lengths) for row, (n, lengths, _) in enumerate(cases)]
    return groups, pack(groups, prompts=[Prompt(blocks) for _, _, blocks in cases]).layout


def tensors(n, dtype=torch.float64):
    torch.manual_seed(0)
    q = torch.randn(n, 4, 8, dtype=dtype, requires_grad=True)
    return q, *(torch.randn(n, 2, 8, dtype=dtype, requires_grad=True) for _ in range(2))


def varlen_kernel(
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, softmax_scale=None, softcap=0.0, **options
):
    """What the varlen kernels do: (left, right) from the diagonal, which ends in the last key; -1: no end."""
    left, right = options["window_size"]
    if options.get("causal"):
        right = 0
    out = []
    for q0, q1, k0, k1 in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:]):
        n_q, n_k = int(q1 - q0), int(k1 - k0)
        assert n_q <= max_q and n_k <= max_k
        place = torch.arange(n_k)[None] - torch.arange(n_k - n_q, n_k)[:, None]
        sees = (place <= right if right >= 0 else place < n_k) & (
            place >= -left if left >= 0 else place > -n_k
        )
        keys, values = (x[k0:k1].repeat_interleave(2, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * (
            (scale or softmax_scale) or q.shape[-1] ** -0.5
        )
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(out)


@pytest.mark.parametrize("window", [None, 3, 12])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_oracle_is_the_mask_written_out(case, window):
    """Row by row: a response's tokens see the prompt and those before them, a block's each other."""
    (one,), layout = layout_of([CASES[case]])
    n, lengths, blocks = CASES[case]
    q, k, v = tensors(len(layout.seen_until))
    ours = attention.attend(q, k, v, layout, window=window, backend="dense")
    first = n
    for length in lengths:
        rows = torch.tensor([*range(n), *range(first, first + length - 1)])
        first += length - 1
        place = torch.arange(len(rows))
        sees = place[None] <= place[:, None]
        for start, end in blocks:
            sees[start:end, start:end] = True
        if window is not None:
            sees &= place[None] > place[:, None] - window
        pieces = [x[rows].transpose(0, 1)[None] for x in (q, k, v)]
        truth = torch.nn.functional.scaled_dot_product_attention(*pieces, attn_mask=sees, enable_gqa=True)
        torch.testing.assert_close(ours[rows], truth[0].transpose(0, 1), rtol=0, atol=1e-12)
    assert first == len(layout.seen_until) and sum(len(one.inputs(r)) for r in one.responses) == first - n


@pytest.mark.parametrize("backend", ["segments", "varlen", "flash_attn"])
@pytest.mark.parametrize("window", [None, 1, 3, 11])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_backends_agree(backend, window, softcap, monkeypatch):
    """Outputs and gradients in fp64; of the GPU's kernels the arguments, by what they would do with them."""
    if backend == "varlen" and softcap:
        pytest.skip("torch's varlen kernel has no softcap")
    monkeypatch.setattr(attention, "_torch_varlen", lambda: (varlen_kernel, {}))
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen_kernel))
    for cases in (CASES, CASES[:1], CASES[-2:-1], CASES[-3:-1], CASES[::-1]):
        _, layout = layout_of(cases)
        q, k, v = tensors(len(layout.seen_until))
        results = []
        for name in ("dense", backend):
            out = attention.attend(q, k, v, layout, window=window, softcap=softcap, backend=name)
            results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
        for dense, ours in zip(*results):
            torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)


def test_plain_prompts_have_no_second_set():
    _, layout = layout_of(CASES[-1:])
    assert layout.full is None


def test_segments_cover_every_row_once():
    _, layout = layout_of(CASES)
    full = layout.full
    rows = [r for q0, q1, _, _ in (*layout.segments, *full.segments) for r in range(q0, q1)]
    assert sorted(rows) == list(range(len(layout.seen_until)))
    assert torch.cat([full.other_rows, full.rows])[full.place].tolist() == sorted(rows)
    assert int(layout.cu_k[-1]) == full.first_key and full.first_key + int(full.cu_k[-1]) == len(
        layout.kv_index
    )
    assert max(k1 for *_, k1 in full.segments) == len(layout.kv_index)
