"""Shared-prompt attention by each of its ways against the dense fp64 one: output and gradients."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from fastdpo.data.packing import pack
from fastdpo.doctor import machine
from fastdpo.doctor.measuring import Measured, NotHere, beside, short
from fastdpo.model import attention
from fastdpo.records import PreferenceGroup, PrefixLayout, Response

# (prompt, responses) in tokens: segments of no and of one query, keys by the block, prompts beyond a window
SHAPES = ((40, (17, 1, 64)), (1, (9, 2)), (130, (5,)), (300, (3, 140)))
CAP = 4.0  # of scores that are a few units wide


@dataclass(frozen=True)
class Case:
    heads: int
    key_heads: int
    size: int
    window: int | None = None
    softcap: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.heads} heads on {self.key_heads} of {self.size}"]
        parts += [f"window {self.window}"] if self.window else []
        return ", ".join(parts + (["softcap"] if self.softcap else []))


PLAIN = (Case(4, 2, 64), Case(4, 4, 64, window=7), Case(6, 2, 128, window=64))
CAPPED = (Case(4, 2, 64, softcap=CAP), Case(4, 2, 64, window=7, softcap=CAP))


def check_bf16(device: str, rung: str) -> list[Measured]:
    """bf16, no softcap: what a run takes by default on a GPU. Raises NotHere."""
    _refuse_missing(device, rung)
    return [m for case in PLAIN for m in _case(case, device, rung, torch.bfloat16)]


def check_others(device: str, rung: str) -> list[Measured]:
    """fp32, which flash-attn does not take, and softcaps. Raises NotHere."""
    _refuse_missing(device, rung)
    cases = [(case, torch.bfloat16) for case in CAPPED if machine.has_bf16(device)]
    if rung == "segments":
        cases += [(case, torch.float32) for case in PLAIN + CAPPED]
    return [m for case, dtype in cases for m in _case(case, device, rung, dtype)]


def _refuse_missing(device: str, rung: str) -> None:
    if rung == "segments":
        return
    if torch.device(device).type != "cuda":
        raise NotHere("no GPU")
    if rung == "flash_attn" and importlib.util.find_spec("flash_attn") is None:
        raise NotHere("flash-attn is not installed")
    if not machine.has_bf16(device):
        raise NotHere("this chip has no bf16")


def layout_of(shapes) -> PrefixLayout:
    """The layout of groups of (prompt, responses) tokens, on the CPU."""
    return pack([_group(row, *shape) for row, shape in enumerate(shapes)]).layout


def _group(row: int, prompt: int, responses: tuple[int, ...]) -> PreferenceGroup:
    ids = lambda n: np.ones(n, np.int64)
    return PreferenceGroup(row, ids(prompt), tuple(Response(ids(n), ids(n) > 0) for n in responses), ())


def inputs(case: Case, tokens: int, device: str, dtype) -> tuple[torch.Tensor, ...]:
    """q [T, H, D], k and v [T, Hk, D] that want gradients."""
    draw = torch.Generator().manual_seed(0)
    make = lambda heads: torch.randn(tokens, heads, case.size, generator=draw).to(device, dtype)
    return tuple(make(h).requires_grad_() for h in (case.heads, case.key_heads, case.key_heads))


def _case(case: Case, device: str, rung: str, dtype) -> Iterator[Measured]:
    layout = layout_of(SHAPES).to(device)
    leaves = inputs(case, len(layout.seen_until), device, dtype)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = _run(case, layout, wide, "dense")
    baseline, got = (_run(case, layout, leaves, backend) for backend in ("dense", rung))
    for name, o, t, b in zip(("output", "dq", "dk", "dv"), got, truth, baseline):
        yield beside(f"{name} ({short(dtype)}, {case})", o, t, b, dtype)


def _run(case: Case, layout, leaves, backend: str) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of sum(sin(output))."""
    out = attention.attend(*leaves, layout, window=case.window, softcap=case.softcap, backend=backend)
    wide = torch.promote_types(out.dtype, torch.float32)
    return out.detach(), *torch.autograd.grad(out.to(wide).sin().sum(), leaves)
