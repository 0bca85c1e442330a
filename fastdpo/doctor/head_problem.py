"""A small lm_head with rows, targets and pairs, and what linear_logp and linear_dpo make of it.

Letters: M scored rows, D hidden, V vocab, R responses, P pairs, r the LoRA rank.
"""

from dataclasses import dataclass

import torch
from fastdpo_kernels import reference
from torch import Tensor

LORA_RANK, LORA_SCALE = 3, 0.5


@dataclass(frozen=True)
class HeadCase:
    """A head on random rows: responses of unequal lengths, three to a prompt, in fp64."""

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    a: Tensor | None  # [r, D]
    b: Tensor | None  # [V, r]
    target: Tensor  # i64[M]
    cu_resp: Tensor  # i64[R+1]
    pairs: Tensor  # i64[P, 2]
    groups: list[int]  # rows of each prompt's responses
    rows: dict  # ref_token_logp, token_weight [M]; offset, pair_weight [P]
    d_logp: Tensor  # [M] upstream
    scale: float
    softcap: float | None

    def leaves(self, dtype, train_weight: bool, train_hidden: bool = True) -> dict[str, Tensor]:
        """The head's tensors that are there, in dtype, with requires_grad flags and no gradient."""
        leaf = lambda t, train: t.detach().to(dtype, copy=True).requires_grad_(train)
        parts = {name: getattr(self, name) for name in ("weight", "bias", "a", "b")}
        parts = {name: leaf(t, train_weight) for name, t in parts.items() if t is not None}
        return {"hidden": leaf(self.hidden, train_hidden), **parts}

    def options(self, leaves: dict[str, Tensor]) -> dict:
        """What linear_logp and linear_dpo are told beside hidden, weight and target."""
        lora = (leaves["a"], leaves["b"], LORA_SCALE) if "a" in leaves else None
        return {"bias": leaves.get("bias"), "lora": lora, "scale": self.scale, "softcap": self.softcap}


def head_case(device, dtype, lengths, V, D, *, softcap=None, bias=False, lora=False) -> HeadCase:
    """lengths: rows of each response; every third begins a new prompt. Rounded to dtype, so that the
    truth is about the same numbers."""
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw).to(dtype).double().to(device)
    M, R = sum(lengths), len(lengths)
    pairs = [(first + i, first + j) for first in range(0, R, 3) for i, j in ((0, 1), (0, 2), (2, 1))]
    target = torch.randint(0, V, (M,), generator=draw).to(device)
    target[:2] = torch.tensor([0, V - 1])[: len(target[:2])]
    weight = (2 * normal(V, D) / D**0.5).to(dtype).double()
    rows = {"ref_token_logp": normal(M) - 6, "token_weight": normal(M).abs()}
    rows |= {"offset": normal(len(pairs)), "pair_weight": normal(len(pairs)).abs()}
    return HeadCase(
        hidden=normal(M, D),
        weight=weight,
        bias=normal(V) if bias else None,
        target=target,
        cu_resp=torch.tensor([0, *lengths], device=device).cumsum(0),
        pairs=torch.tensor(pairs, device=device),
        groups=[sum(lengths[i : i + 3]) for i in range(0, R, 3)],
        rows=rows,
        d_logp=normal(M),
        a=(normal(LORA_RANK, D) / D**0.5).to(dtype).double() if lora else None,
        b=normal(V, LORA_RANK) if lora else None,
        scale=0.7 if bias else 1.0,
        softcap=softcap,
    )


def parts_budget(c: HeadCase, dtype) -> int:
    """memory_budget in bytes by which linear_dpo goes by parts, where there are rows enough: room for half
    of E, and beside it for the fp32 dW of parts of a half head, but not for all of E."""
    kept, dw = len(c.hidden) * len(c.weight) * dtype.itemsize, 4 * c.weight.numel()
    return min(kept - 1, kept // 2 + (dw if dtype.itemsize < 4 else 0))


def run_logp(function, c: HeadCase, dtype, train_weight, train_hidden=True, **options) -> dict[str, Tensor]:
    """{"logp", each stat that options name, the gradients that there are by their tensor's name}."""
    leaves = c.leaves(dtype, train_weight, train_hidden)
    out = function(leaves["hidden"], leaves["weight"], c.target, **c.options(leaves), **options)
    logp, stats = out if options.get("stats") else (out, {})
    if logp.requires_grad:
        (logp * c.d_logp.to(logp.dtype)).sum().backward()
    return {"logp": logp.detach(), **stats} | _gradients(leaves)


def run_dpo(function, c: HeadCase, dtype, train_weight, options) -> dict[str, Tensor]:
    """{"logp", "loss", the gradients that there are by their tensor's name}."""
    leaves = c.leaves(dtype, train_weight)
    by_row = {k: t.to(torch.promote_types(dtype, torch.float32)) for k, t in c.rows.items()}
    args = (leaves["hidden"], leaves["weight"], c.target, c.cu_resp, c.pairs)
    loss, stats = function(*args, **(by_row | options | c.options(leaves)))
    loss.backward()
    return {"logp": stats.token_logp.detach(), "loss": loss.detach()} | _gradients(leaves)


def dpo_slopes(c: HeadCase) -> Tensor:
    """d linear_dpo's loss / d each log-prob, f64[M]."""
    leaves = c.leaves(torch.float64, True)
    args = (leaves["hidden"], leaves["weight"], c.target, c.cu_resp, c.pairs)
    loss, stats = reference.linear_dpo(*args, **(c.rows | c.options(leaves)))
    return torch.autograd.grad(loss, stats.token_logp)[0]


def _gradients(leaves: dict) -> dict[str, Tensor]:
    return {name: t.grad for name, t in leaves.items() if t.grad is not None}


def rounded_once(c: HeadCase, dtype, d_logp: Tensor) -> dict[str, Tensor]:
    """The gradients of sum(d_logp * logp) where the logits' gradient is rounded to dtype, and each result:
    what a fused head in half can do at best. d_logp f64[M]."""
    leaves = c.leaves(torch.float64, True)
    z = leaves["hidden"] @ leaves["weight"].T
    if c.bias is not None:
        z = z + leaves["bias"]
    if c.a is not None:
        z = z + LORA_SCALE * (leaves["hidden"] @ leaves["a"].T) @ leaves["b"].T
    at = z.detach().requires_grad_()
    final = c.scale * at
    if c.softcap is not None:
        final = c.softcap * torch.tanh(final / c.softcap)
    logp = final.log_softmax(-1).gather(-1, c.target[:, None])[:, 0]
    (dz,) = torch.autograd.grad((logp * d_logp).sum(), at)
    grads = torch.autograd.grad(z, list(leaves.values()), dz.to(dtype).double())
    return {name: grad.to(dtype) for name, grad in zip(leaves, grads)}
