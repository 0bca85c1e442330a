"""`linear_dpo`: the preference loss straight from hidden states and the lm_head.

Its gradients are made in the forward, while a part's rows are at hand: 4MVD with a frozen head, 6MVD
with a trained one, where log-probs that serve any loss must keep [V, M] or pay 8MVD.

Letters: M scored rows, D hidden, V vocab, R responses, P pairs, r the LoRA rank.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch

from .checks import check_head, check_pair_values, check_pairs, check_softcap, check_target_values, told
from .head import Head
from .head_pass import Gradients, backend_for
from .ops import empty, exact_on, scale_
from .pair_losses import LOSSES, PairLoss, groups_of
from .plan import plan
from .reference import DPOStats
from .tiles import backend_of


def linear_dpo(
    hidden: torch.Tensor,  # [M, D]
    weight: torch.Tensor,  # [V, D]
    target: torch.Tensor,  # i64[M]
    cu_resp: torch.Tensor,  # i[R+1]
    pairs: torch.Tensor,  # i[P, 2]
    ref_token_logp: torch.Tensor | None = None,  # [M]
    *,
    loss: str | Callable[[torch.Tensor], torch.Tensor] = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    offset: torch.Tensor | None = None,  # [P]
    pair_weight: torch.Tensor | None = None,  # [P]
    token_weight: torch.Tensor | None = None,  # [M]
    bias: torch.Tensor | None = None,  # [V]
    scale: float = 1.0,
    softcap: float | None = None,
    lora: tuple[torch.Tensor, torch.Tensor, float] | None = None,  # (A [r, D], B [V, r], s)
    groups: Sequence[int] | torch.Tensor | None = None,
    memory_budget: int | None = None,
) -> tuple[torch.Tensor, DPOStats]:
    """(sum over pairs of pair_weight x loss(margin), DPOStats): divide by your own number of pairs.

    Rows [cu_resp[i], cu_resp[i+1]) are response i's; pairs hold (winner, loser) response numbers.
    margin = beta * (log-ratio of the winner - of the loser) - offset (DPO, Rafailov et al. 2023, eq. 7;
    offset: Amini et al. 2024, eq. 6), a log-ratio being the response's sum of token_weight * (logp -
    ref_token_logp). loss is "sigmoid" (label_smoothing: Mitchell 2023, eq. 3), "hinge" (Liu et al. 2023),
    "ipo" (Azar et al. 2023, eq. 17, log-ratios divided by their rows as in TRL) or a function of margins
    [P] to losses [P]. hidden and head share a float dtype; logits and results are float32 (float64 for
    float64). `reference.linear_dpo` is the definition.

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
    a, b, lora_scale = (None, None, 1.0) if lora is None else lora
    check_head("linear_dpo", hidden, weight, target, bias, a, b)
    by_row = {"ref_token_logp": ref_token_logp, "token_weight": token_weight}
    check_pairs(hidden, cu_resp, pairs, by_row, {"offset": offset, "pair_weight": pair_weight})
    _check_options(loss, beta, label_smoothing, softcap)
    target, bias = target.contiguous(), None if bias is None else bias.contiguous()
    leaves = (hidden, weight, bias, a, b)
    need = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in leaves]
    train_head = any(t is not None and t.requires_grad for t in leaves[1:])
    tensors = (target, cu_resp, pairs, ref_token_logp, offset, pair_weight, token_weight, _as_tensor(groups))
    head_options = (lora_scale, float(scale), None if softcap is None else float(softcap))
    options = (loss, beta, label_smoothing, *head_options, memory_budget, train_head, need)
    total, *stats = _op(loss)(*leaves, *tensors, *options)
    return total, DPOStats(*stats)


def _op(loss):
    if callable(loss) and torch.compiler.is_compiling():
        return torch.compiler.disable(_LinearDPO.apply)  # the caller's function is not for an opaque op
    return _LinearDPO.apply


class _LinearDPO(torch.autograd.Function):
    """Gradients come out of the forward as saved tensors, for a loss whose upstream gradient is 1."""

    @staticmethod
    def forward(ctx, *args):
        # the compiler sees one opaque op; without it nothing stands between autograd and the work
        run = compiled_forward if torch.compiler.is_compiling() else forward_and_gradients
        total, token_logp, logratio, margin, *grads = run(*args)
        ctx.need, ctx.inputs = args[-1], len(args)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(token_logp, logratio, margin)
        ctx.set_materialize_grads(False)
        return total, token_logp, logratio, margin

    @staticmethod
    def backward(ctx, d_total, *d_stats):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError("linear_dpo is differentiable once: no create_graph=True over it")
        if d_total is None:
            return (None,) * ctx.inputs
        # in place, so that no second [V, D] is made; autograd refuses a later use of what was saved
        grads = iter([scale_(grad, d_total) for grad in ctx.saved_tensors])
        return *(next(grads) if need else None for need in ctx.need), *(None,) * (ctx.inputs - 5)


def forward_and_gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor | None,
    b: torch.Tensor | None,
    target: torch.Tensor,
    cu_resp: torch.Tensor,
    pairs: torch.Tensor,
    ref_token_logp: torch.Tensor | None,
    offset: torch.Tensor | None,
    pair_weight: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    groups: torch.Tensor | None,
    loss: str,
    beta: float,
    label_smoothing: float,
    lora_scale: float,
    scale: float,
    softcap: float | None,
    memory_budget: int | None,
    train_head: bool,
    need: list[bool],
) -> list[torch.Tensor]:
    """[loss, token_logp [M], logratio [R], margin [P], then the gradients of hidden, weight, bias, A and B
    that are in need]."""
    groups = _groups(groups, target, cu_resp, pairs, len(weight))
    sizes = (len(hidden), len(weight), hidden.shape[1])
    how = plan(
        *sizes,
        dtype=hidden.dtype,
        train_weight=train_head,
        groups=groups,
        memory_budget=memory_budget,
        need_grad=any(need),
        backend=backend_of(hidden, weight, a is not None),
    )
    parts = how.parts or (how,)
    pair_loss = PairLoss(
        *(cu_resp, pairs, len(hidden)),
        ref_token_logp=ref_token_logp,
        loss=loss,
        beta=beta,
        label_smoothing=label_smoothing,
        offset=offset,
        pair_weight=pair_weight,
        token_weight=token_weight,
    )
    head = Head(weight, bias, a, b, lora_scale, scale, softcap)
    with exact_on(hidden):
        run = _Parts(head, hidden, target, pair_loss, parts, need)
        for part in parts:
            run.step(part)
        logratio, margin = pair_loss.margins(run.token_logp)
        total = pair_loss.total(margin) * run.poison
        return [total, run.token_logp, logratio, margin, *run.gradients()]


compiled_forward = torch.library.custom_op("fastdpo::linear_dpo", forward_and_gradients, mutates_args=())


@compiled_forward.register_fake
def _(hidden, weight, bias, a, b, target, cu_resp, pairs, *rest):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    new = lambda *shape: hidden.new_empty(shape, dtype=wide)
    stats = new(len(hidden)), new(cu_resp.shape[0] - 1), new(len(pairs))
    leaves = (hidden, weight, bias, a, b)
    return [new(), *stats, *(t.new_empty(t.shape) for t, need in zip(leaves, rest[-1]) if need)]


class _Parts:
    """What grows while the parts of the rows go by: log-probs, and gradients of the whole."""

    def __init__(self, head, hidden, target, pair_loss, parts, need):
        self.head, self.hidden, self.target, self.pair_loss = head, hidden, target, pair_loss
        self.need, self.several, self.done = Gradients(*need), len(parts) > 1, 0
        wide = torch.promote_types(hidden.dtype, torch.float32)
        # where no row has come by yet, the reference itself: log-ratio 0
        self.token_logp = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        if pair_loss.ref_token_logp is not None:
            self.token_logp.copy_(pair_loss.ref_token_logp)
        self.params = None
        self.d_hidden = None
        if self.several and self.need.hidden:
            self.d_hidden = empty(*hidden.shape, dtype=hidden.dtype, device=hidden.device)
        stops = list(accumulate(part.rows for part in parts[:-1]))
        self.poison = 1.0
        if hidden.device.type != "cpu":
            self.poison = torch.where(pair_loss.unsound(stops), torch.nan, 1.0)

    def step(self, part):
        """The next part.rows rows. What it keeps of width V is gone when it returns."""
        rows = slice(self.done, self.done + part.rows)
        self.done = rows.stop
        of_part = (self.head, self.hidden[rows], self.target[rows], part)
        run = backend_for(self.head, self.hidden)
        state, _ = run.forward(*of_part)
        self.token_logp[rows] = state.logp
        if part.name == "forward":
            return
        d_logp = self.pair_loss.token_slope(self.token_logp)[rows] * self.poison
        self.params = run.gradients(*of_part, state, self.need, d_logp, into=self.params, wide=self.several)
        d_hidden, self.params.hidden = self.params.hidden, None
        if d_hidden is None:
            return
        if self.several:
            self.d_hidden[rows] = d_hidden
        else:
            self.d_hidden = d_hidden.to(self.hidden.dtype)

    def gradients(self):
        """Those somebody needs, in the dtypes of their tensors."""
        if self.params is None:
            return []
        out = [self.d_hidden] if self.need.hidden else []
        for name in ("weight", "bias", "lora_a", "lora_b"):
            if getattr(self.need, name):
                out.append(getattr(self.params, name).to(getattr(self.head, name).dtype))
                setattr(self.params, name, None)  # its accumulator may go before the next is rounded
        return out


def _as_tensor(groups):
    if groups is None or (isinstance(groups, torch.Tensor) and groups.device.type == "cpu"):
        return groups
    if isinstance(groups, torch.Tensor):
        raise ValueError(f"groups must be Python ints or a CPU tensor, got {told(groups=groups)}")
    return torch.tensor(groups, dtype=torch.int64, device="cpu")


def _groups(groups, target, cu_resp, pairs, V):
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


def _check_options(loss, beta, label_smoothing, softcap):
    if not callable(loss) and loss not in LOSSES:
        raise ValueError(f"linear_dpo has the losses {', '.join(LOSSES)}, or takes a function, got {loss!r}")
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if label_smoothing and loss != "sigmoid":
        raise ValueError(f"label_smoothing is part of the sigmoid loss only, got loss={loss!r}")
    check_softcap(softcap)
