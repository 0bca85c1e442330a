"""plan() tells the truth about its choice, its chunks and its memory."""

import gc
import itertools

import pytest
import torch
from fastdpo_kernels import default_budget, linear_dpo, linear_logp, plan, tiles
from torch.profiler import ProfilerActivity, profile

from .cases import NAMES, STATS, case, plan_module

M, V, D = 96, 9001, 48
FORWARD = dict(train_weight=False, need_grad=False)
KINDS = ({"train_weight": True}, {"train_weight": False}, FORWARD)


def ask(dtype=torch.float32, train_weight=True, **options):
    return plan(M, V, D, dtype=dtype, train_weight=train_weight, **options)


def test_choice():
    kept = M * V * 4
    assert ask().name == "keep"
    assert ask(memory_budget=kept).name == "recompute"
    assert ask(torch.bfloat16, memory_budget=12 * kept).name == "keep"
    assert ask(torch.float64, memory_budget=kept).name == "recompute"
    assert ask(train_weight=False).name == ask(train_weight=False, memory_budget=1).name == "frozen"
    assert ask(need_grad=False).name == ask(**FORWARD).name == "forward"


def test_default_budget():
    wide = dict(dtype=torch.bfloat16, train_weight=True)
    # of a wide head 8VD: an fp32 dW for E, and one that a single part does without
    assert plan(8192, 128256, 4096, **wide, backend="triton").name == "keep"
    assert default_budget(128256, 4096, True) == 8 * 128256 * 4096
    assert plan(3000, 151936, 1024, **wide).name == "keep"  # 0.9 GB of half probabilities
    assert plan(4500, 151936, 1024, **wide).name == "recompute"
    assert plan(3000, 151936, 1024, **wide, memory_budget=1 << 30).name == "recompute"
    # of a small one 512 MiB and its dW; of a frozen one 512 MiB
    assert default_budget(1000, 64, True) == (512 << 20) + 4 * 1000 * 64
    assert default_budget(128256, 4096, False) == 512 << 20
    for trained in (True, False):
        named = default_budget(151936, 1024, trained)
        sizes = dict(dtype=torch.bfloat16, train_weight=trained, groups=[512] * 10)
        assert plan(5120, 151936, 1024, **sizes) == plan(5120, 151936, 1024, **sizes, memory_budget=named)


@pytest.mark.parametrize("memory_budget", (None, 1, 1 << 16, 1 << 20, 1 << 24))
@pytest.mark.parametrize("sizes", ((1, 5, 3), (0, 5, 3), (96, 9001, 48), (5000, 10, 4)))
def test_chunks_cover_the_vocabulary(sizes, memory_budget):
    told = plan(*sizes, dtype=torch.float32, train_weight=True, memory_budget=memory_budget)
    cuts = plan_module.spans(sizes[1], told.width)
    assert len(cuts) == told.chunks
    assert [v for v0, v1 in cuts for v in range(v0, v1)] == list(range(sizes[1]))


@pytest.mark.parametrize("budget", (1 << 20, 1 << 22, 5 << 20, 1 << 24))
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_budget_bounds_what_has_width_V(kind, budget):
    told = plan(M, V, D, dtype=torch.float32, memory_budget=budget, **kind)
    rows = 4 * M * (4 * D + 32 + told.chunks)
    assert told.peak_bytes <= budget + rows


def allocated(run):
    """The bytes of CPU tensors as they come during run(), and negative as they go."""
    gc.collect()  # what another test left must not go during the run
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def peak_of(run):
    """The most bytes of CPU tensors alive at once during run(), over those alive before."""
    return max(itertools.accumulate(allocated(run), initial=0))


def largest_of(run):
    return max(allocated(run))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize(
    ("name", "memory", "wanted"),
    (
        ("forward", None, ()),
        ("forward", 1 << 20, ()),
        ("frozen", 1 << 20, ("hidden",)),
        ("keep", 64 << 20, NAMES),
        ("recompute", 1 << 20, NAMES),
    ),
)
@pytest.mark.parametrize("softcap", (None, 5.0))
def test_peak_bytes_is_a_bound(dtype, name, memory, wanted, softcap):
    c = case(M, V, D, bias=False, lora=False, softcap=softcap).to(dtype)
    hidden = c.hidden.requires_grad_("hidden" in wanted)
    weight = c.weight.requires_grad_("weight" in wanted)
    train = dict(train_weight=bool(weight.requires_grad), need_grad=bool(wanted))
    told = plan(M, V, D, dtype=dtype, memory_budget=memory, **train)
    assert told.name == name

    def run():
        logp, _ = linear_logp(hidden, weight, c.target, softcap=softcap, stats=STATS, memory_budget=memory)
        if wanted:
            logp.sum().backward()

    handed_back = sum(t.nbytes for t in (hidden, weight) if t.requires_grad)
    handed_back += 4 * M * (1 + len(STATS))
    peak = peak_of(run)
    assert peak <= told.peak_bytes + handed_back
    # a bound that is never near is no help: half of it is really used (a third where softcap's
    # block is not)
    assert peak >= told.peak_bytes / 3


GROUPS = [10, 20, 0, 5, 30, 1, 30]
DPO_ROWS = dict(
    cu_resp=torch.tensor([0, 4, 10, 30, 35, 50, 65, 66, 96]), pairs=torch.tensor([[0, 1], [4, 5]])
)


def grouped(memory_budget, dtype=torch.float32, **options):
    return ask(dtype, groups=GROUPS, memory_budget=memory_budget, **options)


def shape(told):
    return [(part.name, part.rows) for part in told.parts]


def test_parts_are_whole_groups_that_keep_their_matrix():
    unit = 2 * V * D
    one = grouped(None)
    assert (one.name, shape(one), one.rows, one.flops) == ("grouped", [("keep", M)], M, 3 * M * unit)
    # room for 35 rows: the first groups together, then each large one with what small fits
    rows = grouped(4 << 20)
    assert shape(rows) == [("keep", 35), ("keep", 31), ("keep", 30)]
    assert rows.flops == 3 * M * unit
    few = grouped(2_000_000)  # room for 25 rows, not for 30
    assert shape(few) == [("keep", 10), ("keep", 25), ("recompute", 30), ("keep", 1), ("recompute", 30)]
    assert few.flops == (3 * 36 + 4 * 60) * unit
    none = grouped(1)  # no part of it would keep anything
    assert shape(none) == [("recompute", M)]
    assert none.flops == 4 * M * unit
    assert ask(groups=[0, M, 0], memory_budget=1).flops == ask(memory_budget=1).flops
    assert shape(plan(0, V, D, dtype=torch.float32, train_weight=True, groups=[])) == [("keep", 0)]


@pytest.mark.parametrize("budget", (None, 1, 3 << 20, 5 << 20))
def test_groups_cut_a_forward_alike_and_a_frozen_head_not_at_all(budget):
    trained, forward = grouped(budget), grouped(budget, need_grad=False)
    assert forward.name == "forward" and forward.flops == 2 * M * V * D
    cuts = lambda told: [(part.rows, part.chunks) for part in told.parts]
    assert cuts(forward) == cuts(trained)
    frozen = grouped(budget, train_weight=False)
    assert (frozen.name, frozen.parts) == ("frozen", ())
    assert frozen.flops == 4 * M * V * D


@pytest.mark.parametrize("budget", (1 << 20, 3 << 20, 5 << 20, 1 << 24))
def test_budget_bounds_what_has_width_V_in_every_part(budget):
    told = grouped(budget)
    rows = 4 * M * (4 * D + 32 + told.chunks) + 8 * M * plan_module.PAIR_VECTORS
    assert told.peak_bytes <= budget + rows


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("memory", (None, 40 << 20, 6 << 20, 3 << 20, 1 << 20))
@pytest.mark.parametrize("wanted", ((), ("hidden",), ("hidden", "weight")), ids=("none", "frozen", "trained"))
def test_peak_bytes_bounds_linear_dpo(dtype, memory, wanted):
    c = case(M, V, D, bias=False, lora=False).to(dtype)
    hidden = c.hidden.requires_grad_("hidden" in wanted)
    weight = c.weight.requires_grad_("weight" in wanted)
    train = dict(train_weight="weight" in wanted, need_grad=bool(wanted))
    told = plan(M, V, D, dtype=dtype, groups=GROUPS, memory_budget=memory, **train)

    def run():
        total, _ = linear_dpo(hidden, weight, c.target, **DPO_ROWS, groups=GROUPS, memory_budget=memory)
        if wanted:
            total.backward()

    handed_back = sum(t.nbytes for t in (hidden, weight) if t.requires_grad) + 4 * (M + 8 + 2 + 1)
    peak = peak_of(run)
    assert peak <= told.peak_bytes + handed_back
    assert peak >= (told.peak_bytes + handed_back) / 3.5


def test_few_rows_of_a_wide_head_keep_their_matrix():
    # whose chunks would be the widest, with fp32 copies of the weights in them
    wide = dict(dtype=torch.bfloat16, train_weight=True)
    assert {plan(m, 128256, 4096, **wide).name for m in range(1, 1200, 7)} == {"keep"}
    told = plan(8192, 128256, 4096, groups=[128] * 64, **wide)
    assert all(part.name == "keep" and part.rows > 1000 for part in told.parts[:-1])


def test_refusals():
    for wrong in ([M - 1], [M + 5, -5], []):
        with pytest.raises(ValueError, match=f"add up to M={M}, got .*sum {sum(wrong)}"):
            ask(groups=wrong)
    good = dict(dtype=torch.float32, train_weight=True)
    for sizes in ((-1, 5, 3), (1, 0, 3), (1, 5, -3)):
        with pytest.raises(ValueError, match=f"M={sizes[0]}, V={sizes[1]}, D={sizes[2]}"):
            plan(*sizes, **good)
    with pytest.raises(ValueError, match="int64"):
        plan(1, 5, 3, dtype=torch.int64, train_weight=True)


@pytest.mark.parametrize("need", ["frozen", "trained"])
def test_same_rows_have_the_same_chunks_with_and_without_gradient(need):
    """So a reference pass under no_grad gives the policy's very bits, however tight the budget."""
    names = set()
    for budget in range(1 << 16, 1 << 25, 123_456):
        keys = dict(dtype=torch.float32, train_weight=need == "trained", memory_budget=budget)
        with_gradient = plan(40, 30_000, 16, **keys)
        assert with_gradient.chunks == plan(40, 30_000, 16, need_grad=False, **keys).chunks
        names.add(with_gradient.name)
    assert names == ({"keep", "recompute"} if need == "trained" else {"frozen"})


BACKENDS = ("triton", "cublas", "torch")


def test_triton_keeps_with_room_for_its_matrix_alone():
    sizes = dict(dtype=torch.bfloat16, train_weight=True)
    for m, v, d in ((8192, 128256, 4096), (1024, 128256, 4096), (8192, 151936, 896), (7, 1001, 64)):
        exactly = 2 * m * v
        name = lambda backend, budget, m=m, v=v, d=d: (
            plan(m, v, d, backend=backend, memory_budget=budget, **sizes).name
        )
        assert name("triton", exactly) == "keep"
        assert {name("triton", exactly - 1), name("cublas", exactly), name("torch", exactly)} == {"recompute"}
        told = plan(m, v, d, backend="triton", memory_budget=exactly, **sizes)
        # what is not E: sums of its tiles, and with statistics their profile, or after them a chunk of dZ
        chunk = 2 * m * min(v + plan_module.ALIGNED, plan_module.NARROWEST)
        assert exactly < told.peak_bytes < 1.15 * exactly + 4 * m * (4 * d + 100) + chunk


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_widened_weights_are_counted_on_a_cpu_alone(backend, kind):
    # few rows of a wide head: the fp32 weights of a chunk are most of what it takes there
    wide = dict(dtype=torch.bfloat16, backend=backend, memory_budget=64 << 20, **kind)
    chunks = plan(64, 128256, 4096, **wide).chunks
    assert chunks > 100 if backend == "torch" else chunks <= 4
    assert plan(64, 128256, 64, **wide).chunks <= chunks


@pytest.mark.parametrize("budget", (1 << 23, 1 << 25, 1 << 27))
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_budget_bounds_what_cublas_has_of_width_V(kind, dtype, budget):
    told = plan(M, V, D, dtype=dtype, memory_budget=budget, backend="cublas", **kind)
    widest = max(v1 - v0 for v0, v1 in plan_module.spans(V, told.width))
    blocks = M * widest * (6 if dtype == torch.float16 else 4)
    blocks += M * V * dtype.itemsize if told.name == "keep" else 0
    assert blocks <= min(budget, told.peak_bytes)


@pytest.mark.parametrize("V", (63, 64, 65, 129, 1000, 128256))
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_begin_where_lines_of_memory_do(V, backend):
    for memory_budget in (1 << 20, 1 << 22, 1 << 24, 1 << 26):
        told = plan(
            300, V, 8, dtype=torch.float16, train_weight=True, memory_budget=memory_budget, backend=backend
        )
        cuts = plan_module.spans(V, told.width)
        assert len(cuts) == told.chunks
        width = cuts[0][1]
        assert len(cuts) == 1 or width < 64 or all(v0 % 64 == 0 for v0, _ in cuts)


def test_an_unknown_backend():
    with pytest.raises(ValueError, match="triton, cublas and torch, got 'cuda'"):
        ask(backend="cuda")


def test_tritons_chunks_are_of_whole_merges_of_tiles():
    """So that sums have one order in any plan; where all goes at once, a plan says so."""
    triton_head = pytest.importorskip("fastdpo_kernels.triton_head")
    assert {triton_head.MERGED * tile.columns for tile in tiles.TILES.values()} == {plan_module.NARROWEST}
    sizes = dict(dtype=torch.bfloat16, backend="triton", memory_budget=1 << 24)
    for m, kind in itertools.product((64, 1000), KINDS):
        told = plan(m, 151936, 64, **sizes, **kind)
        assert (told.chunks == 1) == (told.name in ("keep", "forward"))
        assert told.chunks == 1 or told.width % plan_module.NARROWEST == 0
        assert len(plan_module.spans(151936, told.width)) == told.chunks
