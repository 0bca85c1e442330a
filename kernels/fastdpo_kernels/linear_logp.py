"""`linear_logp`: log-probabilities of target tokens straight from hidden states and the lm_head.

Letters: M scored rows, D hidden, V vocab, r the LoRA rank.
"""

import torch

from .checks import check_head, check_softcap, check_target_values
from .chunked import STATS
from .logp_ops import backward_pass, compiled_backward, compiled_forward, forward_pass
from .plan import plan
from .tiles import backend_of


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

    hidden, weight, bias, A and B share one float dtype and device; autocast and TF32 are ignored. Logits
    are formed and reduced in float32 (float64 for float64), and the results are of that dtype: logp
    [M], or (logp, {name: [M]}) when stats are named: "entropy", "log_sum_sq_probs" (log of sum_v
    p_v^2), "mean_logit" (over the vocabulary), "is_top1" (1.0 where no token is more probable).
    Differentiable once in hidden and every head parameter, through logp and entropy; only the
    gradients somebody needs are computed, and the same inputs give the same bits. `plan` tells what
    a call costs; memory_budget (bytes, plan.MEMORY_BUDGET when None) picks between keeping and
    recomputing logits when the head is trained. A gradient through entropy recomputes them in any
    plan, so naming it for its value alone is free.

    NaN or inf in a row of hidden stays in that row of the results and of hidden's gradient; the
    head's gradients sum over rows, so they are lost. A bias of -inf masks a token out.

    `backend` tells what runs it: Triton kernels for bfloat16 on the GPUs of tiles.TILES (not with a
    LoRA or a weight whose rows are strided), cuBLAS and row kernels on other CUDA tensors, plain torch
    elsewhere, with the same plans and accuracy.
    torch.compile takes a call as one operator.

    Raises ValueError for shapes, dtypes or devices that do not fit, an unknown stat, softcap <= 0,
    and, on CPU tensors only (a device would have to be waited for), a target outside [0, V), which is
    NaN on a GPU, or where gradients take its row of weight by torch, a device assertion.
    """
    a, b, lora_scale = (None, None, 1.0) if lora is None else lora
    check_head("linear_logp", hidden, weight, target, bias, a, b)
    if target.device.type == "cpu" and not torch.compiler.is_compiling():
        check_target_values(target, len(weight))
    unknown = [name for name in stats if name not in STATS]
    if unknown:
        raise ValueError(f"linear_logp has the stats {', '.join(STATS)}, got {unknown}")
    check_softcap(softcap)
    target, bias = target.contiguous(), None if bias is None else bias.contiguous()
    parameters = [p for p in (weight, bias, a, b) if p is not None]
    train_weight = any(p.requires_grad for p in parameters)
    how = plan(
        *(len(hidden), len(weight), hidden.shape[1]),
        dtype=hidden.dtype,
        train_weight=train_weight,
        need_grad=torch.is_grad_enabled() and (train_weight or hidden.requires_grad),
        memory_budget=memory_budget,
        backend=backend_of(hidden, weight, a is not None),
    )
    options = (float(lora_scale), float(scale), None if softcap is None else float(softcap), ",".join(stats))
    logp, *values = _LinearLogp.apply(hidden, weight, bias, a, b, target, *options, how.name, how.chunks)
    return (logp, dict(zip(stats, values))) if stats else logp


class _LinearLogp(torch.autograd.Function):
    """Runs a Plan by name: gradients of logp and entropy in hidden and the head's parameters."""

    @staticmethod
    def forward(ctx, *args):
        # the compiler sees one opaque op; without it nothing stands between autograd and the work
        run = compiled_forward if torch.compiler.is_compiling() else forward_pass
        *inputs, lora_scale, scale, softcap, stats, name, chunks = args
        logp, *rest = run(*args)
        stats = stats.split(",") if stats else []
        values, saved = rest[: len(stats)], rest[len(stats) :]
        if name == "forward":
            return logp, *values
        ctx.options, ctx.how, ctx.stats = (lora_scale, scale, softcap), (name, chunks), stats
        entropy = values[stats.index("entropy")] if "entropy" in stats else None
        # frozen needs nothing but its rows, unless a gradient comes through entropy
        if name == "frozen" and entropy is None:
            inputs, saved = (None,) * 6, saved[-1:]
        ctx.save_for_backward(*inputs, logp, entropy, *saved)
        ctx.mark_non_differentiable(*(v for stat, v in zip(stats, values) if stat != "entropy"))
        ctx.set_materialize_grads(False)
        return logp, *values

    @staticmethod
    def backward(ctx, d_logp, *d_stats):
        compiling = torch.compiler.is_compiling()
        if torch.is_grad_enabled() and not compiling:
            raise RuntimeError("linear_logp is differentiable once: no create_graph=True over it")
        d_entropy = dict(zip(ctx.stats, d_stats)).get("entropy")
        *inputs, logp, entropy = ctx.saved_tensors[:8]
        saved = list(ctx.saved_tensors[8:])
        nothing = (None,) * 7
        if d_logp is None and d_entropy is None:
            return None, None, None, None, None, *nothing
        if ctx.how[0] == "frozen" and d_entropy is None:
            row_grad = saved[-1]
            return (row_grad * d_logp[:, None]).to(row_grad.dtype), None, None, None, None, *nothing
        run, need = (compiled_backward if compiling else backward_pass), list(ctx.needs_input_grad[:5])
        grads = iter(run(d_logp, d_entropy, *inputs, logp, entropy, saved, *ctx.options, *ctx.how, need))
        return *(next(grads) if wanted else None for wanted in need), *nothing
