"""The gate's half about the head: linear_logp by every plan, linear_dpo with every loss, against fp64.

Letters: M scored rows, D hidden, V vocab, R responses, P pairs.
"""

from dataclasses import dataclass

import torch
from fastdpo_kernels import backend, linear_dpo, linear_logp, plan, reference

from fastdpo.doctor.head_problem import HeadCase, head_case, parts_budget, run_dpo, run_logp

LOSSES = {
    "sigmoid": dict(loss="sigmoid", label_smoothing=0.1),
    "hinge": dict(loss="hinge"),
    "ipo": dict(loss="ipo"),
    "a function": dict(loss=lambda margin: (1 - torch.tanh(margin)) ** 2),
}


@dataclass(frozen=True)
class Bounds:
    """How far from the truth a right result may be."""

    nats: float  # a token's log-prob from that of fp64 over the same inputs
    gradient: float  # ||got - truth|| / ||truth||, of the head
    model_nats: float  # a token's log-prob from fp32's, through a model
    model: float  # gradients of the whole model, and losses, relative
    update: float  # weights after two optimizer steps, relative to how far they moved


# bf16: E or dZ is rounded once and the gradient again, each by 2^-9 at most. Adam's first steps are near
# the gradient's sign, so that gradients near 0 move weights by as much as others.
BOUNDS = {
    torch.float32: Bounds(2e-5, 2e-5, 5e-5, 1e-4, 1e-3),
    torch.bfloat16: Bounds(1e-4, 8e-3, 0.1, 5e-2, 0.25),
}


def head_failures(device: str, dtype: torch.dtype) -> list[str]:
    """Every plan and every loss, on shapes that no tile divides."""
    lengths = [5, 1, 9, 7, 12, 3, 1, 2, 1]
    cases = {
        "": head_case(device, dtype, lengths, 1501, 33 if dtype.itemsize == 4 else 40),
        ", softcap and bias": head_case(device, dtype, lengths, 777, 48, softcap=4.0, bias=True),
        ", many rows": head_case(device, dtype, [61, 3, 90, 17, 44, 58], 515, 64),
    }
    found = []
    for name, c in cases.items():
        found += logp_failures(c, dtype, name) + dpo_failures(c, dtype, name)
    return found


def logp_failures(c: HeadCase, dtype, where: str) -> list[str]:
    """linear_logp without gradient, with a frozen head, and with a trained one by either plan."""
    truth = run_logp(reference.linear_logp, c, torch.float64, True)
    found = []
    for name, budget in budgets(c, dtype).items():
        train = name in ("keep", "recompute")
        M, D = c.hidden.shape
        how = plan(
            *(M, len(c.weight), D),
            dtype=dtype,
            train_weight=train,
            need_grad=name != "forward",
            memory_budget=budget,
            backend=backend(c.hidden.device, dtype),
        )
        if how.name != name:
            found.append(f"linear_logp, {name}{where}: {budget} bytes choose the plan {how.name}")
        got = run_logp(linear_logp, c, dtype, train, name != "forward", memory_budget=budget)
        found += differences(f"linear_logp, {name}{where}", got, truth, c, BOUNDS[dtype])
    return found


def budgets(c: HeadCase, dtype) -> dict[str, int]:
    """memory_budget in bytes that gives each plan, in several chunks where it is on a CPU."""
    kept = c.hidden.shape[0] * len(c.weight) * dtype.itemsize
    roomy = kept * (2 if dtype.itemsize == 4 and c.hidden.device.type == "cpu" else 1 << 10)
    return {"forward": kept, "frozen": kept, "keep": roomy, "recompute": kept // 2}


def dpo_failures(c: HeadCase, dtype, where: str) -> list[str]:
    """linear_dpo with every loss: a frozen head, a trained one, and by parts of whole groups."""
    found = []
    M, V = len(c.hidden), len(c.weight)
    wide = M * V * dtype.itemsize
    ways = {
        "frozen": (False, dict(memory_budget=wide)),
        "trained": (True, dict(memory_budget=1 << 30)),
        "grouped": (True, dict(memory_budget=parts_budget(c, dtype), groups=c.groups)),
    }
    for loss, options in LOSSES.items():
        truth = run_dpo(reference.linear_dpo, c, torch.float64, True, options)
        for way, (train, more) in ways.items():
            got = run_dpo(linear_dpo, c, dtype, train, options | more)
            found += differences(f"linear_dpo, {loss}, {way}{where}", got, truth, c, BOUNDS[dtype])
    return found


def differences(where: str, got: dict, truth: dict, c: HeadCase, bounds: Bounds) -> list[str]:
    """What in `got` is further from the truth than the bounds allow, in words."""
    found = []
    for name, value in got.items():
        if name == "logp":
            nats = (value.double() - truth[name]).abs().max().item()
            if not nats <= bounds.nats:
                found.append(f"{where}: log-probs off by {nats:.1e} nats (bound {bounds.nats:.0e})")
            continue
        error = relative(value, truth[name])
        if not error <= bounds.gradient:
            what = "the loss" if name == "loss" else _part(name, value, truth[name], c, bounds.gradient)
            found.append(f"{where}: {what} off by {error:.1e} (bound {bounds.gradient:.0e})")
    return found


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||."""
    return ((got.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-30)).item()


def _part(name: str, got: torch.Tensor, truth: torch.Tensor, c: HeadCase, bound: float) -> str:
    """Which part of a gradient is wrong: where all but the targets' own part, which goes another way, is
    right, that one."""
    if name == "hidden":
        along = torch.nn.functional.normalize(c.weight[c.target], dim=1)
        others = lambda t: t - (t * along).sum(1, keepdim=True) * along
    else:
        rest = torch.ones(len(truth), dtype=torch.bool, device=truth.device)
        rest[c.target] = False
        others = lambda t: t[rest]
    only = relative(others(got.double()), others(truth)) <= bound
    return f"the targets' part of the gradient of {name}" if only else f"the gradient of {name}"
