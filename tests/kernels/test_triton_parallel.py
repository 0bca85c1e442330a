"""The Triton kernels over a vocabulary in slices, against the whole head: ranks are threads."""

import pytest
import torch
from fastdpo_kernels import linear_logp

from .cases import STATS
from .interpreted import interpreted, many_chunks, small_tiles  # noqa: F401
from .sliced import WAYS, Threads, assert_a_slice_is_right, bounds_of, hard_case, options_of

if not interpreted:
    pytest.skip("test_interpreter.py runs this", allow_module_level=True)

HEADS = ((dict(), STATS), (dict(softcap=3.0, entropy=True), ("entropy",)))


def big_case(**options):
    """Chunks of one tile, several a slice."""
    return hard_case(V=260, D=36, lora=False, **options)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head, stats", HEADS, ids=("stats", "softcap"))
def test_slices_of_two_ranks(way, head, stats, many_chunks, monkeypatch):  # noqa: F811
    if way == "forward" and "entropy" in head:
        return  # there is no gradient
    c = big_case(**head)

    def work(group):
        for even in (True, False):
            bounds = bounds_of(260, 2, even)
            options = options_of(way) | dict(vocab_start=None if even else bounds[group.rank()])
            # an exponent near 40 nats is rounded to 3e-6
            assert_a_slice_is_right(c, group, bounds, WAYS[way], stats, most=5e-6, **options)

    Threads(2, monkeypatch).run(work)


def test_hidden_is_rounded_after_the_sum(monkeypatch):
    # a CPU has no product of half operands into float32
    add = lambda a, b, out: out.add_(a.float() @ b.float())
    monkeypatch.setattr("fastdpo_kernels.triton_head.matmul_add", add)
    c, ranks = big_case(bias=False).to(torch.bfloat16), Threads(1, monkeypatch)
    got = []
    ranks.run(lambda group: got.append(c.run(linear_logp, ("hidden",), process_group=group)["d_hidden"]))
    summed = ranks.parts[0]  # of the last collective
    assert got[0].dtype == torch.bfloat16 and summed.shape == c.hidden.shape
    assert summed.dtype == torch.float32


def test_a_slice_masked_by_bias(monkeypatch):
    # its peak stands for -inf, and none of its sums may become NaN
    c = big_case(scale=1.0)
    c.target.clamp_(max=129)
    c.bias[130:] = -torch.inf

    def work(group):
        stats = ("entropy", "log_sum_sq_probs", "is_top1")
        assert_a_slice_is_right(c, group, (0, 130, 260), WAYS["keep"], stats, most=5e-6, **options_of("keep"))

    Threads(2, monkeypatch).run(work)


@pytest.mark.parametrize("way", ("frozen", "keep"))
def test_a_group_of_one_gives_the_very_bits(way, monkeypatch):
    c = big_case()
    plain = c.run(linear_logp, WAYS[way], STATS, **options_of(way))

    def work(group):
        got = c.run(linear_logp, WAYS[way], STATS, process_group=group, **options_of(way))
        for name in ("logp", "is_top1", "d_hidden", "d_weight"):
            assert plain.get(name) is None or torch.equal(got[name], plain[name]), name

    Threads(1, monkeypatch).run(work)


@pytest.mark.parametrize("stats, calls", (((), 3), (("entropy",), 5)))
def test_how_many_collectives(stats, calls, monkeypatch):
    # the docstring's numbers
    c, ranks = big_case(), Threads(1, monkeypatch)
    ranks.run(lambda group: c.run(linear_logp, (), stats, process_group=group))
    assert ranks.calls == calls
