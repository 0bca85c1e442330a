"""`linear_logp`: log-probabilities of target tokens straight from hidden states and the lm_head.

Letters: M scored rows, D hidden, V vocab, r the LoRA rank.
"""

import torch

from .chunked import STATS, Gradients, Rows, gradients, scan, target_coefficient
from .head import Head, HiddenGrad
from .ops import empty, operand
from .plan import plan, spans


def linear_logp(
    hidden: torch.Tensor,  # [M, D]
    weight: torch.Tensor,  # [V, D]
    target: torch.Tensor,  # i64[M]
    bias: torch.Tensor | None = None,  # [V]
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,  # (A [r, D], B [V, r], s)
    stats: tuple[str, ...] = (),
    memory_budget: int | None = None,
):
    """log softmax(z)[target] for every row, z = softcap(scale * (h W^T + bias + s (h A^T) B^T)),
    without [M, V] logits.

    hidden, weight, bias, A and B share one float dtype and device; autocast is ignored. Logits are
    formed and reduced in float32 (float64 for float64), and the results are of that dtype: logp
    [M], or (logp, {name: [M]}) when stats are named: "entropy", "log_sum_sq_probs" (log of sum_v
    p_v^2), "mean_logit" (over the vocabulary), "is_top1" (1.0 where no token is more probable).
    Differentiable once in hidden and every head parameter, through logp and entropy; only the
    gradients somebody needs are computed, and the same inputs give the same bits. `plan` tells what
    a call costs; memory_budget (bytes, plan.MEMORY_BUDGET when None) picks between keeping and
    recomputing logits when the head is trained. A gradient through entropy recomputes them in any
    plan, so naming it for its value alone is free.

    NaN or inf in a row of hidden stays in that row of the results and of hidden's gradient; the
    head's gradients sum over rows, so they are lost. A bias of -inf masks a token out.

    Raises ValueError for shapes, dtypes or devices that do not fit, an unknown stat, softcap <= 0,
    and, on CPU tensors only (a device would have to be waited for), a target outside [0, V).
    """
    a, b, lora_scale = (None, None, 1.0) if lora is None else lora
    _check_tensors(hidden, weight, bias, a, b)
    _check_target(hidden, weight, target)
    unknown = [name for name in stats if name not in STATS]
    if unknown:
        raise ValueError(f"linear_logp has the stats {', '.join(STATS)}, got {unknown}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be positive (or None), got {softcap}")
    parameters = [p for p in (weight, bias, a, b) if p is not None]
    train_weight = any(p.requires_grad for p in parameters)
    how = plan(
        *(len(hidden), len(weight), hidden.shape[1]),
        dtype=hidden.dtype,
        train_weight=train_weight,
        need_grad=torch.is_grad_enabled() and (train_weight or hidden.requires_grad),
        memory_budget=memory_budget,
    )
    # CUDA tensors take this path too, until triton/ exists: dispatch on hidden.is_cuda here.
    options = (lora_scale, scale, softcap, tuple(stats), how)
    with torch.autocast(hidden.device.type, enabled=False):
        logp, *values = _LinearLogp.apply(hidden, weight, bias, a, b, target, *options)
    return (logp, dict(zip(stats, values))) if stats else logp


class _LinearLogp(torch.autograd.Function):
    """Runs a Plan: `scan` and `gradients` are the passes, `plan` says which of them happen."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, a, b, target, lora_scale, scale, softcap, stats, how):
        head = Head(weight, bias, a, b, lora_scale, scale, softcap)
        x = operand(hidden.contiguous())
        cuts = spans(len(weight), how.chunks)
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        kept = row_grad = None
        if how.name == "keep":
            kept = empty(len(weight), len(x), dtype=hidden.dtype, device=hidden.device)
        elif how.name == "frozen":
            row_grad = HiddenGrad(head, x, accumulate)
        rows, values, peaks = scan(
            *(head, x, target, cuts),
            accumulate=accumulate,
            stats=stats,
            kept=kept,
            hidden_grad=row_grad,
        )
        values = [values[name] for name in stats]
        if how.name == "forward":
            return rows.logp, *values
        if row_grad is not None:
            row_grad.rescale(-scale / rows.total)
            row_grad.add_target(target_coefficient(head, rows, torch.ones_like(rows.logp)), target)
            # Rounded to hidden's dtype like the gradient it becomes: one more rounding of the size
            # of that one, for half the memory.
            row_grad = row_grad.merged().to(hidden.dtype)
        ctx.options, ctx.stats, ctx.cuts = (lora_scale, scale, softcap), stats, cuts
        # frozen needs nothing but its rows, unless a gradient comes through entropy
        again = (
            (hidden, weight, bias, a, b, target) if row_grad is None or "entropy" in stats else (None,) * 6
        )
        peaks = torch.stack(peaks) if peaks else None
        ctx.save_for_backward(
            *again,
            rows.peak,
            rows.total,
            rows.target_logit,
            rows.logp,
            rows.entropy,
            kept,
            peaks,
            row_grad,
        )
        ctx.mark_non_differentiable(*(v for name, v in zip(stats, values) if name != "entropy"))
        ctx.set_materialize_grads(False)
        return rows.logp, *values

    @staticmethod
    def backward(ctx, d_logp, *d_stats):
        if torch.is_grad_enabled():
            raise RuntimeError("linear_logp is differentiable once: no create_graph=True over it")
        d_entropy = dict(zip(ctx.stats, d_stats)).get("entropy")
        hidden, weight, bias, a, b, target, *rows, kept, peaks, row_grad = ctx.saved_tensors
        nothing = (None,) * 6
        if d_logp is None and d_entropy is None:
            return None, None, None, None, None, *nothing
        if row_grad is not None and d_entropy is None:
            return (row_grad * d_logp[:, None]).to(row_grad.dtype), None, None, None, None, *nothing
        head = Head(weight, bias, a, b, *ctx.options)
        with torch.autocast(hidden.device.type, enabled=False):
            out = gradients(
                *(head, operand(hidden.contiguous()), target, ctx.cuts, Rows(*rows)),
                Gradients(*ctx.needs_input_grad[:5]),
                d_logp=d_logp,
                d_entropy=d_entropy,
                kept=kept,
                peaks=peaks,
            )
        d_hidden = None if out.hidden is None else out.hidden.to(hidden.dtype)
        return d_hidden, out.weight, out.bias, out.lora_a, out.lora_b, *nothing


def _check_tensors(hidden, weight, bias, a, b):
    named = {"hidden": hidden, "weight": weight, "bias": bias, "lora A": a, "lora B": b}
    named = {name: t for name, t in named.items() if t is not None}
    got = ", ".join(f"{name} {tuple(t.shape)} {t.dtype} {t.device}" for name, t in named.items())
    shapes_fit = (
        hidden.ndim == weight.ndim == 2
        and len(weight) > 0
        and hidden.shape[1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and (a is None or (a.ndim == b.ndim == 2 and len(a) == b.shape[1]))
        and (a is None or (a.shape[1] == weight.shape[1] and len(b) == len(weight)))
    )
    if not shapes_fit:
        wanted = "hidden [M, D], weight [V, D], bias [V], lora A [r, D], lora B [V, r]"
        raise ValueError(f"linear_logp needs {wanted}, got {got}")
    if not hidden.dtype.is_floating_point or any(t.dtype != hidden.dtype for t in named.values()):
        raise ValueError(f"linear_logp needs one float dtype: cast hidden or the head first, got {got}")
    if any(t.device != hidden.device for t in named.values()):
        raise ValueError(f"linear_logp needs one device, got {got}")


def _check_target(hidden, weight, target):
    got = f"{tuple(target.shape)} {target.dtype} {target.device}"
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be int64 [{len(hidden)}], one per row of hidden, got {got}")
    if target.device != hidden.device:
        raise ValueError(f"target must be on {hidden.device} with hidden, got {got}")
    if target.device.type == "cpu" and len(target):
        low, high = target.min().item(), target.max().item()
        if low < 0 or high >= len(weight):
            raise ValueError(
                f"target must be in [0, {len(weight)}), unscored rows dropped: got {low} to {high}"
            )
