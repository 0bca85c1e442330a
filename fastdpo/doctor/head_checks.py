"""The lm_head by each of its ways against fp64: every plan, its log-probs and its gradients.

Shapes that no tile divides; rows past the range of E; weights that descriptors cannot take. Letters: M
scored rows, D hidden, V vocab.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from fastdpo_kernels import avoid, linear_dpo, linear_logp, reference, tiles
from torch import Tensor

from fastdpo.doctor import machine
from fastdpo.doctor.head_problem import (
    HeadCase,
    dpo_slopes,
    head_case,
    parts_budget,
    rounded_once,
    run_dpo,
    run_logp,
)
from fastdpo.doctor.measuring import Measured, NotHere, beside, poisoned, short

# A token's log-prob, in nats, from that of fp64 over the same inputs (and a hundred-thousandth of itself):
# logits are formed and reduced in fp32, but tensor cores truncate while they accumulate half products.
NATS = {torch.bfloat16: 1e-4, torch.float32: 2e-5}
STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
LENGTHS = [61, 3, 90, 17, 44, 58]
SHORT = [5, 1, 9, 7, 12, 3, 1, 2, 1]


def check_bf16(device: str, rung: str) -> list[Measured]:
    """A head without a LoRA in bf16. Raises NotHere."""
    _refuse_cpu(device, rung)
    new = partial(head_case, device, torch.bfloat16)
    cases = {
        "": new(LENGTHS, 1501, 64),
        "softcap and bias": new(SHORT, 777, 33, softcap=4.0, bias=True),
        "far tokens": new(LENGTHS, 1501, 64),
        "wide rows": new(LENGTHS[:3], 4099, 512),
    }
    cases["far tokens"].hidden[::2] *= 64  # -95 nats and less, where E would overflow
    return _check(rung, cases, torch.bfloat16)


def check_others(device: str, rung: str) -> list[Measured]:
    """fp32, and where there is bf16 a LoRA in that: what the Triton GEMM does not take. Raises NotHere."""
    _refuse_cpu(device, rung)
    found = []
    for dtype in (torch.float32, torch.bfloat16) if machine.has_bf16(device) else (torch.float32,):
        new = partial(head_case, device, dtype, lora=dtype == torch.bfloat16)
        capped = new(SHORT, 777, 33, softcap=4.0, bias=True)
        found += _check(rung, {"": new(LENGTHS, 1501, 64), "softcap and bias": capped}, dtype)
    return found


def _check(rung: str, cases: dict[str, HeadCase], dtype) -> list[Measured]:
    try:
        avoid(*tiles.RUNGS[: tiles.RUNGS.index(rung)])
        for case in cases.values():
            _refuse_another(rung, case, dtype)
        found = []
        for name, case in cases.items():
            where = ", ".join(filter(None, (short(dtype), "LoRA" if case.a is not None else "", name)))
            found += [m._replace(what=f"{m.what} ({where})") for m in _case(case, dtype)]
        return found
    finally:
        avoid()


def _refuse_cpu(device: str, rung: str) -> None:
    if rung != "torch" and torch.device(device).type != "cuda":
        raise NotHere("no GPU")


def _refuse_another(rung: str, c: HeadCase, dtype) -> None:
    """NotHere where a call of this case would not go by the rung."""
    device = c.hidden.device
    if rung == "torch":
        return
    backend = tiles.backend(device, dtype, lora=c.a is not None)
    if backend != ("cublas" if rung == "cublas" else "triton"):
        raise NotHere(f"no kernel of this kind for {short(dtype)} on this chip: {backend} is taken")
    tile = tiles.tile(device, dtype)
    if rung == "triton" and tile is not None and not tile.descriptors:
        raise NotHere("this chip has no tensor descriptors")


def _case(c: HeadCase, dtype) -> Iterator[Measured]:
    """Without a gradient, with a frozen head, with a trained one that keeps its matrix and one that computes
    it again; and linear_dpo by parts."""
    truth = run_logp(reference.linear_logp, c, torch.float64, True, stats=STATS)
    baseline = _baseline(c, dtype, c.d_logp)
    kept = len(c.hidden) * len(c.weight) * dtype.itemsize
    ways = {
        "forward": (False, False, {"stats": STATS}),
        "frozen": (False, True, {}),
        "keep": (True, True, {"memory_budget": kept << 10}),
        "recompute": (True, True, {"memory_budget": kept // 2}),
    }
    for name, (train_weight, train_hidden, options) in ways.items():
        with poisoned():
            got = run_logp(linear_logp, c, dtype, train_weight, train_hidden, **options)
        yield from _compared(name, got, truth, baseline, dtype)
    truth = run_dpo(reference.linear_dpo, c, torch.float64, True, {})
    with poisoned():
        got = run_dpo(
            linear_dpo, c, dtype, True, {"memory_budget": parts_budget(c, dtype), "groups": c.groups}
        )
    yield from _compared("dpo by parts", got, truth, _baseline(c, dtype, dpo_slopes(c)), dtype)


def _baseline(c: HeadCase, dtype, d_logp: Tensor) -> dict[str, Tensor]:
    """Plain torch's gradients in the same dtype. Of half that is with exact logits: bf16 ones are whole nats
    off where tokens are far."""
    if dtype.itemsize == 2:
        return rounded_once(c, dtype, d_logp)
    return run_logp(reference.linear_logp, replace(c, d_logp=d_logp), dtype, True)


def _compared(name: str, got: dict, truth: dict, baseline: dict, dtype) -> Iterator[Measured]:
    for key, value in got.items():
        far, size = (value.double() - truth[key]).abs(), truth[key].abs()
        if key == "logp":
            yield Measured(f"{name}, log-probs", (far / (1 + size / 10)).max().item(), NATS[dtype])
        elif key in (*STATS, "loss"):  # a loss is bounded by the log-probs', which it sums
            allowed = NATS[dtype] * (len(got["logp"]) if key == "loss" else 1)
            yield Measured(f"{name}, {key}", (far / (1 + size)).max().item(), allowed)
        else:
            yield beside(f"{name}, d {key}", value, truth[key], baseline[key], dtype)
