"""Shared-prompt attention by each of its ways against the dense fp64 one: output and gradients."""

import importlib.util
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from fastdpo.data.packing import pack
from fastdpo.doctor import machine
from fastdpo.doctor.measuring import Measured, NotHere, all_beside, short
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
    ids = lambda n: np.ones(n, np.int64)
    response = lambda n: Response(ids(n), ids(n) > 0)
    groups = [(ids(prompt), tuple(map(response, responses))) for prompt, responses in shapes]
    layout = pack([PreferenceGroup(row, *group, ()) for row, group in enumerate(groups)]).layout
    assert layout is not None
    return layout


def inputs(case: Case, tokens: int, device: str, dtype) -> tuple[torch.Tensor, ...]:
    """q [T, H, D], k and v [T, Hk, D] that want gradients."""
    draw = torch.Generator().manual_seed(0)
    make = lambda heads: torch.randn(tokens, heads, case.size, generator=draw).to(device, dtype)
    return tuple(make(h).requires_grad_() for h in (case.heads, case.key_heads, case.key_heads))


def _case(case: Case, device: str, rung: str, dtype) -> list[Measured]:
    layout = layout_of(SHAPES).to(device)
    how = {"window": case.window, "softcap": case.softcap}
    by, dense = (partial(attention.attend, layout=layout, backend=way, **how) for way in (rung, "dense"))
    names = [f"{name} ({short(dtype)}, {case})" for name in ("output", "dq", "dk", "dv")]
    leaves = inputs(case, len(layout.seen_until), device, dtype)
    return all_beside(names, leaves, by, dense, dense, dtype)
