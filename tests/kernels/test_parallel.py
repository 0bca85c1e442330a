"""linear_logp over a vocabulary in slices, against the whole head in one process."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from fastdpo_kernels import linear_logp

from .cases import STATS, case, plan_module
from .sliced import WAYS, Threads, assert_a_slice_is_right, bounds_of, hard_case, options_of

HEADS = (
    (dict(), STATS),
    (dict(bias=False, lora=False, scale=1.0), ()),
    (dict(softcap=3.0, entropy=True), ("entropy",)),
)


def check(group):
    """Every plan of every head on this rank, chunks of a few tokens, slices of both kinds."""
    plan_module.BLOCK_ELEMENTS, plan_module.BLOCK_WIDTH = 1, 7
    for seed, (head, stats) in enumerate(HEADS):
        for way, wanted in WAYS.items():
            if way == "forward" and "entropy" in head:
                continue  # there is no gradient
            torch.manual_seed(seed)
            c = hard_case(**head)
            for even in (True, False):
                bounds = bounds_of(len(c.weight), group.size(), even)
                start = None if even else bounds[group.rank()]
                options = options_of(way) | dict(vocab_start=start)
                assert_a_slice_is_right(c, group, bounds, wanted, stats, **options)


def worker(rank, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=4)
    check(dist.group.WORLD)
    pairs = [dist.new_group(ranks) for ranks in ((0, 1), (2, 3))]
    check(pairs[rank // 2])
    dist.barrier()  # else one might close what the other still reads
    dist.destroy_process_group()


def test_two_and_four_processes_of_gloo(tmp_path):
    torch.multiprocessing.spawn(worker, (tmp_path / "store",), nprocs=4)


@pytest.mark.parametrize("way", WAYS)
def test_a_group_of_one_gives_the_very_bits(way, monkeypatch):
    c = hard_case(entropy=way != "forward")
    plain = c.run(linear_logp, WAYS[way], STATS, **options_of(way))

    def work(group):
        got = c.run(linear_logp, WAYS[way], STATS, process_group=group, **options_of(way))
        for name, value in plain.items():
            assert value is None or torch.equal(got[name], value), name

    Threads(1, monkeypatch).run(work)


@pytest.mark.parametrize("way, lora, forward, backward", [
    ("forward", True, 2, 0), ("frozen", False, 3, 0), ("frozen", True, 4, 0),
    ("keep", False, 2, 1), ("keep", True, 2, 2), ("recompute", True, 2, 2),
])  # fmt: skip
def test_how_many_collectives(way, lora, forward, backward, monkeypatch):
    # the docstring's numbers
    c = case(lora=lora).to(torch.float32)
    ranks = Threads(1, monkeypatch)

    def work(group):
        lora = (c.a, c.b, 0.5) if c.a is not None else None
        for name in WAYS[way]:
            if getattr(c, name) is not None:
                getattr(c, name).requires_grad_()
        options = options_of(way) | dict(process_group=group, bias=c.bias, lora=lora, stats=STATS)
        logp, _ = linear_logp(c.hidden, c.weight, c.target, **options)
        assert ranks.calls == forward
        if WAYS[way]:
            logp.sum().backward()
        assert ranks.calls == forward + backward

    ranks.run(work)


def test_a_slice_masked_by_bias(monkeypatch):
    # its peak stands for -inf, and none of its sums may become NaN
    c = hard_case(scale=1.0)
    c.target.clamp_(max=29)
    c.bias[30:] = -torch.inf
    stats = ("entropy", "log_sum_sq_probs", "is_top1")

    def work(group):
        for way, wanted in WAYS.items():
            assert_a_slice_is_right(c, group, (0, 30, 60), wanted, stats, **options_of(way))

    Threads(2, monkeypatch).run(work)


def test_a_bad_row_stays_alone(monkeypatch):
    c = case(M=5, V=60, lora=False).to(torch.float32)
    c.hidden[2, 0] = torch.nan

    def work(group):
        mine = replace(c, weight=c.weight.chunk(2)[group.rank()], bias=c.bias.chunk(2)[group.rank()])
        got = mine.run(linear_logp, ("hidden",), STATS, process_group=group)
        for name in ("logp", "entropy", "d_hidden"):
            bad = got[name].isnan().view(5, -1)
            assert bad[2].all() and not bad[[0, 1, 3, 4]].any(), name

    Threads(2, monkeypatch).run(work)


@pytest.mark.parametrize("target, start", [(60, None), (-1, None), (25, 0)])
def test_a_target_that_no_slice_or_two_have(target, start, monkeypatch):
    # past both ends; and where a slice starts too early
    c = case(M=3, V=60, lora=False)
    c.target[:] = torch.tensor([1, target, 2])

    def work(group):
        weight, bias = (t.chunk(2)[group.rank()] for t in (c.weight, c.bias))
        expected = "each target must be in one rank's slice of the vocabulary, [13] are not"
        with pytest.raises(ValueError, match=expected):
            linear_logp(c.hidden, weight, c.target, bias, process_group=group, vocab_start=start)

    Threads(2, monkeypatch).run(work)


def test_such_a_target_is_nan_on_a_device(monkeypatch):
    # where looking would wait for it
    monkeypatch.setattr("fastdpo_kernels.parallel.check_owners", lambda *_: None)
    c = case(M=3, V=60, lora=False)
    c.target[1] = 60

    def work(group):
        weight, bias = (t.chunk(2)[group.rank()] for t in (c.weight, c.bias))
        mine = replace(c, weight=weight, bias=bias)
        got = mine.run(linear_logp, ("hidden",), process_group=group)
        assert got["logp"].isnan().tolist() == [False, True, False]
        assert got["d_hidden"].isnan().any(1).tolist() == [False, True, False]

    Threads(2, monkeypatch).run(work)


def test_ignored_rows(monkeypatch):
    c = hard_case(entropy=True)
    c.target[::2] = -100

    def work(group):
        for way, wanted in WAYS.items():
            if wanted:
                stats = ("entropy", "is_top1")
                assert_a_slice_is_right(c, group, (0, 30, 60), wanted, stats, **options_of(way))

    Threads(2, monkeypatch).run(work)


def test_ranks_are_frozen_or_trained_alike(monkeypatch):
    """Else they would meet in different collectives, and hidden's gradient would be wrong without a word."""
    hidden, weight, target = torch.randn(3, 8), torch.randn(20, 8), torch.tensor([1, 12, 3])

    def work(group):
        mine = weight.chunk(2)[group.rank()].clone().requires_grad_(group.rank() == 0)
        with pytest.raises(ValueError, match="frozen on some ranks"):
            linear_logp(hidden.clone().requires_grad_(), mine, target, process_group=group)

    Threads(2, monkeypatch).run(work)


def test_a_slice_needs_its_group():
    with pytest.raises(ValueError, match=r"vocab_start=10 .* needs process_group"):
        linear_logp(torch.randn(3, 8), torch.randn(20, 8), torch.tensor([1, 12, 3]), vocab_start=10)


def test_no_rows(monkeypatch):
    c = case(M=0, V=60).to(torch.float32)

    def work(group):
        for way, wanted in WAYS.items():
            weight, bias, b = (t.chunk(2)[group.rank()] for t in (c.weight, c.bias, c.b))
            mine = replace(c, weight=weight, bias=bias, b=b)
            got = mine.run(linear_logp, wanted, STATS, process_group=group, **options_of(way))
            assert all(got[name].shape == (0,) for name in ("logp", *STATS))
            parts = [got[f"d_{name}"] for name in wanted if name != "hidden"]
            assert all((gradient == 0).all() for gradient in parts)

    Threads(2, monkeypatch).run(work)


@pytest.fixture
def alone():
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_one_operator_for_a_compiler(alone):
    c = case(entropy=True).to(torch.float32)
    options = dict(process_group=alone, stats=("entropy",))

    def loss(hidden, weight):
        logp, values = linear_logp(hidden * 3, weight, c.target, c.bias, **options)
        return (logp * c.d_logp + values["entropy"]).sum()

    got, truth = [], []
    for function, into in ((torch.compile(loss, fullgraph=True, backend="aot_eager"), got), (loss, truth)):
        leaves = [t.clone().requires_grad_() for t in (c.hidden, c.weight)]
        value = function(*leaves)
        value.backward()
        into += [value, *(leaf.grad for leaf in leaves)]
    assert all(map(torch.equal, got, truth))
