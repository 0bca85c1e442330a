"""`linear_dpo`: the preference loss straight from hidden states and the lm_head.

Its gradients are made in the forward, while a part's rows are at hand: 4MVD with a frozen head, 6MVD
with a trained one, where log-probs that serve any loss must keep [V, M] or pay 8MVD.

Letters: M scored rows, D hidden, V vocab, R responses, P pairs, r the LoRA rank.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from ._ops import add_op_namespace_prefix
from .checks import check_pair_values, check_pairs, check_softcap, check_target_values, operands, told
from .head import Head
from .head_pass import NONE, Gradients, backend_for
from .ops import empty, exact_on, scale_
from .pair_losses import LOSSES, PairLoss, groups_of
from .plan import Plan, plan
from .reference import DPOStats
from .tiles import backend_of


def linear_dpo(
    hidden: Tensor, weight: Tensor, target: Tensor,  # [M, D], [V, D], i64[M]
    cu_resp: Tensor, pairs: Tensor,  # i[R+1], i[P, 2]
    ref_token_logp: Tensor | None = None,  # [M]
    *, loss: str | Callable[[Tensor], Tensor] = "sigmoid", beta: float = 0.1, label_smoothing: float = 0.0,
    offset: Tensor | None = None, pair_weight: Tensor | None = None,  # [P] each
    token_weight: Tensor | None = None,  # [M]
    bias: Tensor | None = None,  # [V]
    scale: float = 1.0, softcap: float | None = None,
    lora: tuple[Tensor, Tensor, float] | None = None,  # (A [r, D], B [V, r], s)
    groups: Sequence[int] | Tensor | None = None, memory_budget: int | None = None, ignore_index: int = -100,
) -> tuple[Tensor, DPOStats]:  # fmt: skip
    """(sum over pairs of pair_weight x loss(margin), DPOStats): divide by your own number of pairs.

    Rows [cu_resp[i], cu_resp[i+1]) are response i's; pairs hold (winner, loser) response numbers.
    margin = beta * (log-ratio of the winner - of the loser) - offset (DPO, Rafailov et al. 2023, eq. 7;
    offset: Amini et al. 2024, eq. 6), a log-ratio being the response's sum of token_weight * (logp -
    ref_token_logp). loss is "sigmoid" (label_smoothing: Mitchell 2023, eq. 3), "hinge" (Liu et al. 2023),
    "ipo" (Azar et al. 2023, eq. 17, log-ratios divided by their rows as in TRL) or a function of margins
    [P] to losses [P]. A row whose target is ignore_index has log-prob and gradient 0, and counts in no
    log-ratio and no number of rows. Dtypes, autocast and DTensors are as in `linear_logp`.
    `reference.linear_dpo` is the definition.

    Differentiable once in hidden, weight, bias, A and B; the stats, and what a loss function captures,
    carry no gradient. The forward makes the gradients somebody needs, the backward scales them in place:
    a second backward over the same call raises. Since they are made before the backward brings its
    factor, a float16 loss scale belongs into pair_weight.

    A trained head goes by parts of whole groups (`plan`). groups: the rows of each, in order, as Python
    ints or a CPU tensor; a pair lies in one group. None: on a CPU the smallest blocks of neighbouring
    responses that no pair leaves; on a device, where looking would wait for it, all rows. A loss function
    must be a sum over groups: each part calls it with the margins of all pairs, those of later parts
    with log-ratios of 0. Whatever couples groups gets wrong gradients: use linear_logp for it.

    Raises ValueError for shapes, dtypes, devices or options that do not fit, and, on a CPU only, for
    targets, cu_resp, pairs or groups that do not hold together. On a device, a cu_resp that does not rise
    from 0 to M and groups that cut a pair or response apart give NaN.
    """
    hidden, target, *head = operands("linear_dpo", hidden, target, weight, bias, lora)
    by_row = {"ref_token_logp": ref_token_logp, "token_weight": token_weight}
    check_pairs(hidden, cu_resp, pairs, by_row, {"offset": offset, "pair_weight": pair_weight})
    _check_options(loss, beta, label_smoothing)
    leaves, lora_scale = (hidden, *head), 1.0 if lora is None else float(lora[2])
    need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in leaves]
    train_head = any(t is not None and t.requires_grad for t in leaves[1:])
    tensors = (target, cu_resp, pairs, ref_token_logp, offset, pair_weight, token_weight, _as_tensor(groups))
    of_head = (lora_scale, float(scale), check_softcap(softcap))
    options = (loss, beta, label_smoothing, *of_head, memory_budget, ignore_index)
    run: Any = _LinearDPO.apply  # nothing stands between autograd and the work
    if torch.compiler.is_compiling():  # sees one opaque op, which the caller's function is not for
        run = torch.compiler.disable(run) if callable(loss) else operator
    total, *stats = run(*leaves, *tensors, *options, train_head, need)[:4]
    return total, DPOStats(*stats)


class _LinearDPO(torch.autograd.Function):
    """`operator` without a dispatcher, whose outputs are the results alone."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        out = forward_and_gradients(*args)
        _setup(ctx, args, out)
        return tuple(out[:4])

    @staticmethod
    def backward(ctx: Any, d_total: Any, *d_stats: Any) -> Any:
        # in place, so that no second [V, D] is made; autograd refuses a later use of what was saved
        return _gradients(ctx, d_total, scale_)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    """The gradients came out of the forward, for a loss whose upstream gradient is 1."""
    ctx.need, ctx.inputs = inputs[-1], len(inputs)
    ctx.save_for_backward(*output[4:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, d_total: Any, scaled: Callable[[Tensor, Tensor], Tensor]) -> Any:
    if torch.is_grad_enabled():
        raise RuntimeError("linear_dpo is differentiable once: no create_graph=True over it")
    if d_total is None:
        return (None,) * ctx.inputs
    grads = iter([scaled(grad, d_total) for grad in ctx.saved_tensors])
    return *(next(grads) if need else None for need in ctx.need), *(None,) * (ctx.inputs - 5)


def forward_and_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, target: Tensor,
    cu_resp: Tensor, pairs: Tensor, ref_token_logp: Tensor | None, offset: Tensor | None,
    pair_weight: Tensor | None, token_weight: Tensor | None, groups: Tensor | None,
    loss: str, beta: float, label_smoothing: float, lora_scale: float, scale: float, softcap: float | None,
    memory_budget: int | None, ignore_index: int, train_head: bool, need: list[bool]
) -> list[Tensor]:  # fmt: skip
    """[loss, token_logp [M], logratio [R], margin [P], then the gradients of hidden, weight, bias, A and B
    that are in need]. loss is a function too, but for an operator."""
    ignored = target == ignore_index
    target = target.masked_fill(ignored, 0)
    how = plan(
        len(hidden), *weight.shape, dtype=hidden.dtype, train_weight=train_head,
        groups=_groups(groups, target, cu_resp, pairs, len(weight)), memory_budget=memory_budget,
        need_grad=any(need), backend=backend_of(hidden, weight, a is not None)
    )  # fmt: skip
    by_pair = (offset, pair_weight, token_weight, loss, beta, label_smoothing)
    pair_loss = PairLoss(cu_resp, pairs, ignored, ref_token_logp, *by_pair)
    head = Head(weight, bias, a, b, lora_scale, scale, softcap)
    with exact_on(hidden):
        parts = how.parts or (how,)
        token_logp, poison, grads = _by_parts(head, hidden, target, pair_loss, parts, Gradients(*need))
        logratio, margin = pair_loss.margins(token_logp)
        return [pair_loss.total(margin) * poison, token_logp, logratio, margin, *grads]


operator = custom_op(add_op_namespace_prefix("linear_dpo"), forward_and_gradients, mutates_args=())


@operator.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Any, a: Any, b: Any, target: Tensor, cu_resp: Tensor,
    pairs: Tensor, *rest: Any
) -> list[Tensor]:  # fmt: skip
    wide = torch.promote_types(hidden.dtype, torch.float32)
    new = lambda *shape: hidden.new_empty(shape, dtype=wide)
    stats = new(hidden.shape[0]), new(cu_resp.shape[0] - 1), new(pairs.shape[0])
    leaves = (hidden, weight, bias, a, b)
    return [new(), *stats, *(t.new_empty(t.shape) for t, need in zip(leaves, rest[-1]) if need)]


# what the operator gave is not the backward's to scale in place
operator.register_autograd(
    lambda ctx, upstream: _gradients(ctx, upstream[0], lambda grad, d_total: scale_(grad.clone(), d_total)),
    setup_context=_setup,
)


def _by_parts(
    head: Head, hidden: Tensor, target: Tensor, pair_loss: PairLoss, parts: Sequence[Plan],
    need: Gradients[bool]
) -> tuple[Tensor, Tensor | float, list[Tensor]]:  # fmt: skip
    """(log-probs [M], a factor of the loss: NaN where the parts cut what belongs together, the gradients of
    what is in need, in hidden's dtype)."""
    several, run = len(parts) > 1, backend_for(head, hidden)
    stops = list(accumulate(part.rows for part in parts))
    poison: Tensor | float = 1.0
    if hidden.device.type != "cpu":
        poison = torch.where(pair_loss.unsound(stops[:-1]), torch.nan, 1.0)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    # where no row has come by yet, the reference itself: log-ratio 0
    token_logp = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
    if pair_loss.ref_token_logp is not None:
        token_logp.copy_(pair_loss.ref_token_logp)
    out: Any = NONE
    new = lambda: empty(*hidden.shape, dtype=hidden.dtype, device=hidden.device)
    d_hidden = new() if several and need.hidden else None
    for part, stop in zip(parts, stops):
        rows = slice(stop - part.rows, stop)
        of_part = (head, hidden[rows], target[rows], part)
        state, _ = run.forward(*of_part)
        token_logp[rows] = state.logp.masked_fill(pair_loss.ignored[rows], 0.0)
        if part.name != "forward":
            d_logp = pair_loss.token_slope(token_logp)[rows] * poison
            out = run.gradients(*of_part, state, need, d_logp, into=out, wide=several)
            if d_hidden is not None:
                d_hidden[rows], out.hidden = out.hidden, None
        del state  # what it keeps of width V goes before the next part comes
    if d_hidden is not None:
        out.hidden = d_hidden
    grads = []
    for name, wanted in vars(need).items():
        if wanted:
            grads.append(getattr(out, name).to(hidden.dtype))
            setattr(out, name, None)  # its accumulator may go before the next is rounded
    return token_logp, poison, grads


def _as_tensor(groups: Sequence[int] | Tensor | None) -> Tensor | None:
    if groups is None or (isinstance(groups, Tensor) and groups.device.type == "cpu"):
        return groups
    if isinstance(groups, Tensor):
        raise ValueError(f"groups must be Python ints or a CPU tensor, got {told(groups=groups)}")
    return torch.tensor(groups, dtype=torch.int64, device="cpu")


def _groups(groups: Tensor | None, target: Tensor, cu_resp: Tensor, pairs: Tensor, V: int) -> list[int]:
    """Rows of each group as a list. On a CPU checks every value first."""
    M = len(target)
    given = None if groups is None else groups.tolist()
    if target.device.type != "cpu":
        return given or [M]
    check_target_values(target, V)
    check_pair_values(M, cu_resp, pairs)
    smallest = groups_of(cu_resp, pairs)
    if given is None:
        return smallest
    bounds = lambda sizes: set(accumulate(sizes, initial=0))
    inside = sorted(bounds(given) - bounds(smallest))
    if inside and sum(given) == M:  # another sum is refused by plan
        raise ValueError(f"groups end inside a response or between the responses of a pair, at rows {inside}")
    return given


def _check_options(loss: str | Callable[[Tensor], Tensor], beta: float, label_smoothing: float) -> None:
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"linear_dpo has the losses {', '.join(LOSSES)}, or takes a function, got {loss!r}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if label_smoothing and loss != "sigmoid":
        raise ValueError(f"label_smoothing is part of the sigmoid loss only, got loss={loss!r}")
