"""`linear_logp`: log-probabilities of target tokens straight from hidden states and the lm_head.

Letters: M scored rows, D hidden, V vocab, r the LoRA rank.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Unpack, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.library import custom_op

from . import reference
from ._ops import add_op_namespace_prefix
from .checks import check_grad_into, check_softcap, check_target_values, operands
from .head import Head
from .head_pass import Gradients, State, backend_for
from .ops import aligned_rows, exact_on
from .parallel import VocabGroup
from .plan import Plan, plan
from .tiles import backend_of

STATS = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
ROWS = ("peak", "total", "target_logit")
# What the backward needs of a forward's State beside logp and entropy, by the plan's name. Triton's kernels
# have no peaks.
SAVED = {"forward": (), "frozen": ROWS, "keep": (*ROWS, "kept", "peaks"), "recompute": ROWS}


class Options(reference.Options, total=False):
    memory_budget: int | None
    grad_into: Tensor | None
    process_group: ProcessGroup | None
    vocab_start: int | None


@overload
def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    stats: tuple[()] = (), **options: Unpack[Options]
) -> Tensor: ...  # fmt: skip
@overload
def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    stats: tuple[str, *tuple[str, ...]], **options: Unpack[Options]
) -> tuple[Tensor, dict[str, Tensor]]: ...  # fmt: skip
@overload
def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *,
    stats: tuple[str, ...], **options: Unpack[Options]
) -> Tensor | tuple[Tensor, dict[str, Tensor]]: ...  # fmt: skip
def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor,  # [..., D], [V, D], i64[...]
    bias: Tensor | None = None,  # [V]
    *, scale: float = 1.0, softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,  # (A [r, D], B [V, r], s)
    stats: tuple[str, ...] = (), memory_budget: int | None = None, ignore_index: int = -100,
    grad_into: Tensor | None = None,  # f32[V, D], f64 where weight is
    process_group: ProcessGroup | None = None, vocab_start: int | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """log softmax(z)[target] for every row, z = softcap(scale * (h W^T + bias + s (h A^T) B^T)),
    without [M, V] logits.

    hidden, weight, bias, A and B share one float dtype and device; under autocast they are cast to its
    dtype, all but float64, as torch's linear does it. TF32 is ignored. Logits are formed and reduced in
    float32 (float64 for float64), and the results are of that dtype and of target's shape: logp, or
    (logp, {name: values}) when stats are named: "entropy", "log_sum_sq_probs" (log of sum_v p_v^2),
    "mean_logit" (over the vocabulary), "is_top1" (1.0 where no token is more probable).
    Differentiable once in hidden and every head parameter, through logp and entropy; only the
    gradients somebody needs are computed, and the same inputs give the same bits. `plan` tells what
    a call costs; memory_budget (bytes, `default_budget` when None) picks between keeping and
    recomputing logits when the head is trained. A gradient through entropy recomputes them in any
    plan, so naming it for its value alone is free.

    grad_into: each backward over the call (a second one too) adds weight's gradient to this contiguous
    tensor by the GEMM that makes it, and brings weight, which counts as trained, none: a main gradient
    over microbatches, as of Megatron-LM's fused weight gradient. Hooks of weight see nothing of it.

    Where target is ignore_index, the results and gradients are 0, with no wait for the device. Such a
    row's work is done all the same: leave them out where they are many. NaN or inf in a row of hidden stays
    in that row of the results, and of hidden's gradient also where it is ignored; the head's gradients sum
    over rows, so they are lost. A bias of -inf masks a token out.

    `backend` tells what runs it: Triton kernels for bfloat16 on the GPUs of tiles.TILES (not with a
    LoRA or a weight whose rows are strided), cuBLAS and row kernels on other CUDA tensors, plain torch
    elsewhere, with the same plans and accuracy. torch.compile takes a call as one operator, and
    leaves one with grad_into out of its graph. A DTensor of a frozen head is gathered, but not in a graph.

    process_group: V is spread over its ranks, weight, bias and B hold the rows from vocab_start on (None:
    rank * V), and the rest is alike on all; parallel.py says more.

    Raises ValueError for tensors whose shape, dtype, device or kind does not fit, an unknown stat, softcap
    <= 0, and, on CPU tensors only (a device would have to be waited for), another target outside [0, V),
    which is NaN on a GPU, or where gradients take its row of weight by torch, a device assertion.
    """
    unknown = [name for name in stats if name not in STATS]
    if unknown:
        raise ValueError(f"linear_logp has the stats {', '.join(STATS)}, got {unknown}")
    options = (1.0 if lora is None else float(lora[2]), float(scale), check_softcap(softcap), ",".join(stats))
    hidden, target, *head = operands("linear_logp", hidden, target, weight, bias, lora, process_group is None)
    if process_group is None and vocab_start is not None:
        raise ValueError(f"vocab_start={vocab_start} is of a slice: it needs process_group")
    shape, ignored = target.shape, target == ignore_index
    target = target.masked_fill(ignored, 0).reshape(-1)
    hidden = hidden.reshape(target.shape[0], hidden.shape[-1])  # len() would fix M in torch.export
    out = _of_rows(hidden, head, target, options, memory_budget, grad_into, process_group, vocab_start)
    logp, *values = [t.reshape(shape).masked_fill(ignored, 0.0) for t in out[: 1 + len(stats)]]
    return (logp, dict(zip(stats, values))) if stats else logp


def _of_rows(
    hidden: Tensor, head: list[Any], target: Tensor, options: Any, memory_budget: int | None,
    into: Tensor | None, process_group: ProcessGroup | None, vocab_start: int | None
) -> Any:  # fmt: skip
    """[logp [M], the stats in order, ...] of hidden [M, D], by the plan that fits."""
    if into is not None:
        check_grad_into(head[0], into)
        head[0] = head[0].detach()
    weight, train_weight = head[0], into is not None or any(p is not None and p.requires_grad for p in head)
    group = None if process_group is None else process_group.group_name
    if process_group is not None:
        target = target - (process_group.rank() * len(weight) if vocab_start is None else vocab_start)
    elif target.device.type == "cpu" and not torch.compiler.is_compiling():
        check_target_values(target, len(weight))
    how = plan(
        hidden.shape[0], *weight.shape, dtype=hidden.dtype, train_weight=train_weight,
        need_grad=torch.is_grad_enabled() and (train_weight or hidden.requires_grad),
        memory_budget=memory_budget, backend=backend_of(hidden, weight, head[-1] is not None)
    )  # fmt: skip
    # the compiler sees one opaque op; without it nothing stands between autograd and the work
    run: Callable[..., Any] = partial(_run, into)
    if torch.compiler.is_compiling():  # an operator's backward changes no tensor
        run = operator if into is None else torch.compiler.disable(run)
    return run(hidden, *head, target, *options, how.name, how.width, group)


def _run(grad_into: Tensor | None, *args: Any) -> Any:
    # a leaf of its own: there is a backward whatever else is trained
    return _LinearLogp.apply(*args, None if grad_into is None else grad_into.detach().requires_grad_())


class _LinearLogp(torch.autograd.Function):
    """`operator` without a dispatcher, whose outputs are the results alone."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *inputs, ctx.grad_into = args  # not saved: it changes between forward and backward
        out = forward_pass(*inputs)
        _setup(ctx, inputs, out)
        return tuple(out[: 1 + len(ctx.stats)])

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> tuple[Tensor | None, ...]:
        return *_gradients(ctx, upstream, partial(_backward, ctx.grad_into)), None


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    """Keeps for `_gradients` what a plan's backward needs of a forward_pass's arguments and results."""
    *tensors, lora_scale, scale, softcap, stats, name, width, group = inputs
    ctx.stats = stats.split(",") if stats else []
    logp, values, saved = output[0], output[1 : 1 + len(ctx.stats)], list(output[1 + len(ctx.stats) :])
    ctx.options = (lora_scale, scale, softcap, name, width, group)
    ctx.set_materialize_grads(False)
    entropy = dict(zip(ctx.stats, values)).get("entropy")
    ctx.mark_non_differentiable(*(t for t in output[1:] if t is not entropy))
    unit = saved.pop() if name == "frozen" else None
    # frozen needs nothing but its unit, unless a gradient comes through entropy
    again = () if unit is not None and entropy is None else (*tensors, logp, entropy, *saved)
    ctx.save_for_backward(unit, *again)


def _gradients(ctx: Any, upstream: Any, run: Callable[..., list[Tensor]]) -> tuple[Tensor | None, ...]:
    """Of hidden, weight, bias, A and B, and None for the other arguments; run: backward_pass, or as an
    operator."""
    if torch.is_grad_enabled():
        raise RuntimeError("linear_logp is differentiable once: no create_graph=True over it")
    d_logp, d_entropy = upstream[0], dict(zip(ctx.stats, upstream[1:])).get("entropy")
    unit, *again = ctx.saved_tensors
    need, nothing = list(ctx.needs_input_grad[:5]), (None,) * 8
    if d_logp is None and d_entropy is None:
        return *(None,) * 5, *nothing
    if unit is not None and d_entropy is None:
        return (unit * d_logp[:, None]).to(unit.dtype), *(None,) * 4, *nothing
    (*inputs, logp, entropy), saved = again[:8], again[8:]
    d_logp = torch.zeros_like(logp) if d_logp is None else d_logp
    grads = iter(run(d_logp, d_entropy, *inputs, logp, entropy, saved, *ctx.options, need))
    return *(next(grads) if wanted else None for wanted in need), *nothing


def forward_pass(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, target: Tensor,
    lora_scale: float, scale: float, softcap: float | None, stats: str, name: str, width: int,
    group: str | None
) -> list[Tensor]:  # fmt: skip
    """[logp [M], the stats in order, the tensors of SAVED[name] that there are, and if frozen the unit
    gradient, d logp / d hidden [M, D]]. stats: their names with a comma between (an operator takes no list of
    names). group: the name of a process group."""
    names = tuple(stats.split(",")) if stats else ()
    slices = VocabGroup(group, weight, name == "frozen") if group else None
    head = Head(weight, bias, a, b, lora_scale, scale, softcap, slices)
    how = Plan(name, 0, 0, 0, len(hidden), width)
    run = backend_for(head, hidden)
    with exact_on(hidden):
        state, values = run.forward(head, hidden, target, how, names)
        out = [state.logp, *(values[stat] for stat in names)]
        out += [getattr(state, field) for field in SAVED[name]]
        if name == "frozen":
            unit = run.gradients(head, hidden, target, how, state, Gradients(hidden=True), 1.0)
            # Rounded to hidden's dtype like the gradient it becomes: one more rounding of the size of that
            # one, for half the memory.
            out.append(unit.hidden.to(hidden.dtype))
    return [t for t in out if t is not None]


def backward_pass(
    d_logp: Tensor, d_entropy: Tensor | None, hidden: Tensor, weight: Tensor, bias: Tensor | None,
    a: Tensor | None, b: Tensor | None, target: Tensor, logp: Tensor, entropy: Tensor | None,
    saved: list[Tensor], lora_scale: float, scale: float, softcap: float | None, name: str, width: int,
    group: str | None, need: list[bool]
) -> list[Tensor]:  # fmt: skip
    """The gradients of hidden, weight, bias, A and B that are in need; saved: what forward_pass returned of
    SAVED[name]."""
    inputs = (hidden, weight, bias, a, b, target, logp, entropy, saved)
    return _backward(None, d_logp, d_entropy, *inputs, lora_scale, scale, softcap, name, width, group, need)


def _backward(grad_into: Tensor | None, d_logp: Tensor, d_entropy: Tensor | None, *rest: Any) -> list[Tensor]:
    """`backward_pass`, which adds weight's gradient to grad_into where that is given; no operator may."""
    hidden, weight, bias, a, b, target, logp, entropy, saved, *ends, name, width, group, need = rest
    head = replace(Head(weight, bias, a, b, *ends), group=VocabGroup(group, weight) if group else None)
    how = Plan(name, 0, 0, 0, len(hidden), width)
    state = State(logp=logp, entropy=entropy, **dict(zip(SAVED[name], saved)))
    with exact_on(hidden):
        run, wants, into = backend_for(head, hidden), Gradients(*need), Gradients(weight=grad_into)
        wants.weight = need[1] or grad_into is not None
        out = run.gradients(head, hidden, target, how, state, wants, d_logp, d_entropy, into)
    return [gradient.to(hidden.dtype) for gradient, wanted in zip(vars(out).values(), need) if wanted]


operator = custom_op(add_op_namespace_prefix("linear_logp"), forward_pass, mutates_args=())
backward_operator = custom_op(add_op_namespace_prefix("linear_logp_backward"), backward_pass, mutates_args=())


@operator.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, a: Any, *rest: Any) -> list[Tensor]:
    *_, stats, name, width, _ = rest
    wide = torch.promote_types(hidden.dtype, torch.float32)
    M, V = hidden.shape[0], weight.shape[0]  # len() would fix a size that the compiler leaves open
    new = lambda *shape, dtype=wide: hidden.new_empty(shape, dtype=dtype)
    out = [new(M) for _ in range(1 + len(stats.split(",")) if stats else 1)]
    if name != "forward":
        out += [new(M) for _ in ROWS]
    if name == "keep":
        backend = backend_of(hidden, weight, a is not None)
        out.append(new(V, M, dtype=hidden.dtype) if backend == "torch" else aligned_rows(M, V, like=hidden))
        if backend != "triton":
            out.append(new(-(-V // width), M))
    elif name == "frozen":
        out.append(new(*hidden.shape, dtype=hidden.dtype))
    return out


@backward_operator.register_fake
def _(d_logp: Tensor, d_entropy: Any, *rest: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t, wanted in zip(rest[:5], rest[-1]) if wanted]


operator.register_autograd(
    lambda ctx, upstream: _gradients(ctx, upstream, backward_operator), setup_context=_setup
)
