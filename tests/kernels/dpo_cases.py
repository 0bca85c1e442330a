"""Random batches of preference groups for linear_dpo, and how its tests compare."""

import random
import re
from dataclasses import dataclass, field

import torch
from fastdpo_kernels import linear_dpo, plan, reference

from .cases import NAMES, Case, case, error

UPSTREAM = 0.37
FUNCTION = lambda margin: torch.relu(1 - margin) ** 3  # an "any loss"
LOSSES = (
    {},
    {"label_smoothing": 0.2, "beta": 0.3},
    {"loss": "hinge", "beta": 0.05},
    {"loss": "ipo", "beta": 0.4},
    {"loss": FUNCTION},
)
named = lambda options: re.sub(r" at 0x\w+", "", str(options))  # the same id in every process


@dataclass
class Batch:
    """A head with rows of some groups; groups are rows of each."""

    head: Case
    cu_resp: torch.Tensor
    pairs: torch.Tensor
    groups: list[int]
    extras: dict = field(default_factory=dict)  # ref_token_logp, offset, pair_weight, token_weight

    def run(self, function, wanted=NAMES, dtype=torch.float64, **options):
        """{name: value} of the loss, the stats, and the gradient of each wanted tensor, times UPSTREAM."""
        head = self.head.to(dtype)
        leaves = {n: getattr(head, n) for n in NAMES if getattr(head, n) is not None}
        leaves = {n: t.detach().clone().requires_grad_(n in wanted) for n, t in leaves.items()}
        lora = (leaves["a"], leaves["b"], 0.5) if head.a is not None else None
        head_options = dict(bias=leaves.get("bias"), scale=head.scale, softcap=head.softcap, lora=lora)
        args = (leaves["hidden"], leaves["weight"], head.target, self.cu_resp, self.pairs)
        total, stats = function(*args, **self.extras, **head_options, **options)
        if any(t.requires_grad for t in leaves.values()):
            (UPSTREAM * total).backward()
        got = {"loss": total, **stats._asdict()} | {f"d_{n}": t.grad for n, t in leaves.items()}
        return {n: None if t is None else t.detach() for n, t in got.items()}


def batch(seed=0, n_groups=6, V=257, D=33, most=9, extras=True, **head):
    """Groups of 1 to 4 responses of 1 to `most` rows, each with some of its possible pairs. The first is a
    single response without a pair, the last has 4 responses and all pairs."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    lengths, pairs, groups = [], [], []
    for i in range(n_groups):
        N = {0: 1, n_groups - 1: 4}.get(i) or draw.randint(1, 4)
        first = len(lengths)
        possible = [(first + w, first + l) for w in range(N) for l in range(N) if w < l]
        possible = [pair if draw.random() < 0.5 else pair[::-1] for pair in possible]
        pairs += possible if i == n_groups - 1 else [p for p in possible if draw.random() < 0.7]
        rows = [draw.randint(1, most) for _ in range(N)]
        lengths += rows
        groups.append(sum(rows))
    M, P = sum(lengths), len(pairs)
    made = Batch(
        case(M, V, D, **head),
        torch.tensor([0, *lengths]).cumsum(0).int(),
        torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2),
        groups,
    )
    if extras:
        uniform = lambda n: torch.rand(n, dtype=torch.float64)
        ref = reference.linear_logp(made.head.hidden, made.head.weight, made.head.target)
        made.extras = dict(ref_token_logp=ref + 0.3 * torch.randn_like(ref), token_weight=uniform(M))
        made.extras |= dict(offset=uniform(P) - 0.5, pair_weight=uniform(P) + 0.5)
    return made


def parts(b, budget, dtype=torch.float64):
    """What the plan makes of the batch's trained head: [(name, rows)]."""
    M, D = b.head.hidden.shape
    sizes = (M, len(b.head.weight), D)
    told = plan(*sizes, dtype=dtype, train_weight=True, groups=b.groups, memory_budget=budget)
    assert told.name == "grouped"
    return [(part.name, part.rows) for part in told.parts]


def parts_budget(b, rows, dtype):
    """A budget at which parts of fewer rows keep their matrix, beside what dW is added up in."""
    return budget_for(b, rows, dtype) - 1 + (4 * b.head.weight.numel() if dtype.itemsize < 4 else 0)


def budget_for(b, rows, dtype=torch.float64):
    """The least budget at which this many rows keep their matrix."""
    V, D = b.head.weight.shape
    keeps = lambda budget: (
        plan(rows, V, D, dtype=dtype, train_weight=True, memory_budget=budget).name == "keep"
    )
    low, high = 1, 1 << 40
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle + 1, high)
    return low


def assert_as_good(b, dtype, wanted=NAMES, **options):
    """Every result of linear_dpo errs at most twice as much as plain torch's in `dtype`."""
    budget, given = options.pop("memory_budget", None), options.pop("groups", None)
    b.head = b.head.to(dtype).to(torch.float64)  # the values that `dtype` can hold
    truth = b.run(reference.linear_dpo, wanted, **options)
    plain = b.run(reference.linear_dpo, wanted, dtype, **options)
    got = b.run(linear_dpo, wanted, dtype, memory_budget=budget, groups=given, **options)
    wide = torch.promote_types(dtype, torch.float32)
    for name, value in truth.items():
        if value is None:
            assert got[name] is None, f"{name}: nobody asked for it"
            continue
        is_gradient = name.startswith("d_")
        assert got[name].dtype == (dtype if is_gradient else wide), name
        assert got[name].shape == value.shape, name
        if not value.numel():
            continue
        # the gradient in half is rounded once as the forward makes it, and once as it is scaled; for others
        # see cases.assert_as_good (31 units at most, in float64, with MKL's kernels for AVX2)
        roundings = 2 if is_gradient and dtype.itemsize == 2 else 32 if dtype.itemsize < 8 else 256
        eps = roundings * torch.finfo(got[name].dtype).eps
        ours, theirs = error(got[name], value), error(plain[name], value)
        assert ours <= 2 * theirs + eps, f"{name}: {ours:.2e}, plain torch {theirs:.2e}"
