"""Over sizes of every kind: nothing else that fits the budget is faster than the plan, nothing as fast is
smaller. What else there is gets counted here by other words than plan.py's."""

import itertools
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from fastdpo_kernels import default_budget, plan

from .cases import plan_module

ROWS, HIDDEN, VOCABULARIES = (1, 100, 2048, 8192, 65536), (64, 896, 8192), (1000, 32000, 151936, 262144)
HALF, FULL, MIB = torch.bfloat16, torch.float32, 1 << 20
WAYS = (("triton", HALF), ("cublas", HALF), ("cublas", FULL), ("torch", HALF), ("torch", FULL))


@dataclass(frozen=True)
class Head:
    backend: str
    dtype: torch.dtype
    V: int
    D: int

    def entry(self, rows):
        """Bytes of a token's column of E."""
        return rows * self.dtype.itemsize

    def column(self, rows):
        """Bytes of a token of a chunk that is worked on."""
        if self.backend == "triton":
            return self.entry(rows)
        if self.backend == "cublas":
            return rows * (6 if self.dtype == HALF else 4)
        return rows * 12 + (8 * self.D if self.dtype == HALF else 0)

    def keeps(self, rows, room):
        """Whether E fits, and a chunk of logits of the size it may have."""
        if self.backend == "triton":
            return self.V * self.entry(rows) <= room
        useful = min(self.V, max(4096, (1 << 22) // rows)) * self.column(rows)
        chunk = max(self.column(rows), min(useful, 256 * MIB, room // 2))
        return self.V * self.entry(rows) + chunk <= room

    def held(self, name, rows, room):
        """Bytes of E, or by Triton of a chunk of it; a chunk of logits has its share whatever the plan."""
        if name == "keep":
            return self.V * self.entry(rows)
        return cuts(self, rows, room)[1] * self.entry(rows) if self.backend == "triton" else 0

    def sums_over_parts(self):
        return 4 * self.V * self.D if self.dtype == HALF else 0


@cache
def cuts(head, rows, room):
    """(fewest chunks, tokens of the narrowest such). Chunks are of whole tiles or lines of memory, no wider
    than is of use, and take 256 MiB or (of logits, that E be kept beside) half the room at most."""
    if head.backend == "triton":
        step, most = 2048, max(2048, min(256 * MIB, room) // head.column(rows))
    else:
        step, useful = 64, max(4096, (1 << 22) // rows)
        most = min(useful, max(1, min(256 * MIB, room // 2) // head.column(rows)))
    if head.V <= most:
        return 1, head.V
    widths = range(step, most + 1, step) or range(1, most + 1)  # room for a few tokens: lines are cut
    return min((-(-head.V // w), w) for w in widths)


def products(name):
    return {"forward": 1, "frozen": 2, "keep": 3, "recompute": 4}[name]


def alternative(head, parts, budget):
    """(products x rows, parts, bytes) of a trained head by these rows."""
    added_up = head.sums_over_parts() if len(parts) > 1 else 0
    room, work, size = budget - added_up, 0, 0
    if added_up > budget:  # no room for anything beside dW
        return None
    for rows in parts:
        name = "keep" if head.keeps(rows, room) else "recompute"
        work, size = work + products(name) * rows, max(size, head.held(name, rows, room))
    return work, len(parts), size + added_up


def every_cut(groups):
    """All ways to take consecutive groups together."""
    for ends in itertools.product((False, True), repeat=len(groups) - 1):
        parts = [groups[0]]
        for rows, new in zip(groups[1:], ends):
            if new:
                parts.append(rows)
            else:
                parts[-1] += rows
        yield parts


def sizes():
    for (backend, dtype), M, D, V in itertools.product(WAYS, ROWS, HIDDEN, VOCABULARIES):
        yield M, Head(backend, dtype, V, D)


def asked(head, M, budget, **options):
    return plan(M, head.V, head.D, dtype=head.dtype, backend=head.backend, memory_budget=budget, **options)


@pytest.mark.parametrize("budget", (None, 4 << 30, 512 * MIB, 20 * MIB))
@pytest.mark.parametrize("kind", ("forward", "frozen", "trained"))
def test_all_rows_at_once(kind, budget):
    for M, head in sizes():
        room = default_budget(head.V, head.D, kind == "trained") if budget is None else budget
        told = asked(head, M, budget, train_weight=kind == "trained", need_grad=kind != "forward")
        name = kind
        if kind == "trained":
            name = "keep" if head.keeps(M, room) else "recompute"
        chunks, width = cuts(head, M, room)
        if head.backend == "triton" and name in ("forward", "keep"):
            chunks, width = 1, head.V
        assert (told.name, told.flops) == (name, products(name) * 2 * M * head.V * head.D), (M, head)
        assert (told.chunks, told.width) == (chunks, width), (M, head, told)
        if name != "forward":
            assert told.peak_bytes >= head.held(name, M, room)


@pytest.mark.parametrize("budget", (None, 4 << 30, 512 * MIB, 20 * MIB))
@pytest.mark.parametrize("shares", ((1,) * 7, (5, 1, 9, 2, 2, 7, 1)), ids=("even", "uneven"))
def test_groups(shares, budget):
    seen = set()
    for M, head in sizes():
        groups = [max(1, M * share // sum(shares)) for share in shares]
        rows, room = sum(groups), budget or default_budget(head.V, head.D, True)
        told = asked(head, rows, budget, train_weight=True, groups=groups)
        others = [alternative(head, parts, room) for parts in every_cut(groups)]
        found = alternative(head, [part.rows for part in told.parts], room)
        assert found == min(other for other in others if other), (groups, head, told)
        assert told.flops == found[0] * 2 * head.V * head.D and told.peak_bytes >= found[2]
        seen.add((len(told.parts) > 1, *sorted({part.name for part in told.parts})))
    assert {(False, "keep"), (True, "keep")} <= seen
    assert budget is None or (False, "recompute") in seen


def test_the_accumulator_of_parts_counts():
    """One part where E takes no more than the sums of parts would."""
    head = Head("triton", HALF, 128256, 4096)
    told = asked(head, 8192, None, train_weight=True, groups=[512] * 16)
    assert [part.rows for part in told.parts] == [8192]
    assert told.peak_bytes < 1.5 * 2 * 8192 * head.V
    # a named budget bounds them together: no room for dW in fp32, and so no parts
    named = asked(head, 8192, 2 * 8192 * head.V - 1, train_weight=True, groups=[512] * 16)
    assert [part.name for part in named.parts] == ["recompute"]
    tall = asked(head, 32768, None, train_weight=True, groups=[512] * 64)
    assert {part.name for part in tall.parts} == {"keep"} and len(tall.parts) == 4
    assert tall.peak_bytes > head.sums_over_parts() + 2 * 8192 * head.V


def test_spans_of_e():
    """Of a frozen head on Triton, as large as 256 MiB: plan.CHUNK_BYTES."""
    assert plan_module.CHUNK_BYTES == 256 * MIB
    told = asked(Head("triton", HALF, 151936, 896), 4096, None, train_weight=False)
    assert (told.chunks, told.width) == (5, 30720) and 2 * 4096 * told.width <= 256 * MIB
