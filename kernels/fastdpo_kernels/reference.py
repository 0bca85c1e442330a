"""The definition of `linear_logp` and `linear_dpo`, in plain torch and any float dtype. In float64
it is the truth.

Letters: M scored rows, D hidden, V vocab, R responses, P pairs, r the LoRA rank.
"""

from collections.abc import Callable
from typing import NamedTuple, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor


class DPOStats(NamedTuple):
    token_logp: Tensor  # [M]
    logratio: Tensor  # [R] policy minus reference, summed over the response with token_weight
    margin: Tensor  # [P] what the loss sees: beta * (winner's - loser's log-ratio) - offset


class Options(TypedDict, total=False):
    scale: float
    softcap: float | None
    lora: tuple[Tensor, Tensor, float] | None
    ignore_index: int


class HeadOptions(Options, total=False):
    bias: Tensor | None


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
def linear_logp(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, *, scale: float = 1.0,
    softcap: float | None = None, lora: tuple[Tensor, Tensor, float] | None = None,
    stats: tuple[str, ...] = (), ignore_index: int = -100,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """logp[t] = log softmax(z[t])[target[t]], z = softcap(scale * (h W^T + bias + s (h A^T) B^T)).

    hidden [..., D], weight [V, D], target i64[...], bias [V], lora = (A [r, D], B [V, r], s), in one
    float dtype. Returns logp [...], or (logp, {name: [...]}) when stats are named, 0 where target is
    ignore_index.
    """
    ignored = target == ignore_index
    target = target.masked_fill(ignored, 0)
    z = hidden @ weight.T
    if bias is not None:
        z = z + bias
    if lora is not None:
        a, b, s = lora
        z = z + s * (hidden @ a.T) @ b.T
    z = z * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    logps = torch.log_softmax(z, -1)
    logp = logps.gather(-1, target[..., None])[..., 0].masked_fill(ignored, 0.0)
    if not stats:
        return logp
    finite = logps.clamp(min=torch.finfo(z.dtype).min)  # a vocab entry masked by -inf: 0 log 0 = 0
    every = {
        "entropy": lambda: -(logps.exp() * finite).sum(-1),
        "log_sum_sq_probs": lambda: torch.logsumexp(2 * logps, -1),
        "mean_logit": lambda: z.mean(-1),
        # a tie for the top counts: no other token is more probable
        "is_top1": lambda: (z.gather(-1, target[..., None])[..., 0] >= z.amax(-1)).to(z.dtype),
    }
    return logp, {name: every[name]().masked_fill(ignored, 0.0) for name in stats}


def linear_dpo(
    hidden: Tensor, weight: Tensor, target: Tensor, cu_resp: Tensor, pairs: Tensor,
    ref_token_logp: Tensor | None = None, *, loss: str | Callable[[Tensor], Tensor] = "sigmoid",
    beta: float = 0.1, label_smoothing: float = 0.0, offset: Tensor | None = None,
    pair_weight: Tensor | None = None, token_weight: Tensor | None = None, **head: Unpack[HeadOptions]
) -> tuple[Tensor, DPOStats]:  # fmt: skip
    """The SUM over pairs of pair_weight x loss(margin); the caller divides by its own pair count.

    cu_resp i[R+1] bounds each response's rows, pairs i[P, 2] holds (winner, loser) response
    numbers; ref_token_logp, token_weight [M]; offset, pair_weight [P]; `head` is bias, scale,
    softcap, lora, ignore_index (such a row is in no sum and no number of rows).
    margin = beta * (logratio_winner - logratio_loser) - offset, and per pair
        sigmoid   -(1 - e) log sigmoid(margin) - e log sigmoid(-margin), e = label_smoothing
        hinge     relu(1 - margin)
        ipo       (margin / beta - 1 / (2 beta))^2, each log-ratio divided by its number of rows
                  (TRL's convention; eric-mitchell's code uses the plain sums)
        callable  loss(margin [P]) -> [P]
    Returns (loss, DPOStats). Raises ValueError for label_smoothing with any loss but sigmoid.
    """
    if label_smoothing and loss != "sigmoid":
        raise ValueError(f"label_smoothing is part of the sigmoid loss only, got loss={loss!r}")
    logp = linear_logp(hidden, weight, target, **head)
    ratio = logp if ref_token_logp is None else logp - ref_token_logp
    if token_weight is not None:
        ratio = ratio * token_weight
    counted = target != head.get("ignore_index", -100)
    ratio = ratio.where(counted, 0.0)
    lengths = cu_resp.diff().long()
    row_resp = torch.repeat_interleave(torch.arange(len(lengths), device=ratio.device), lengths)
    logratio = ratio.new_zeros(len(lengths)).index_add(0, row_resp, ratio)
    number = logratio.new_zeros(len(lengths)).index_add(0, row_resp, counted.to(ratio.dtype))
    per_resp = logratio / number if loss == "ipo" else logratio
    winner, loser = pairs.long().unbind(-1)
    margin = beta * (per_resp[winner] - per_resp[loser])
    if offset is not None:
        margin = margin - offset
    if callable(loss):
        each = loss(margin)
    else:
        e = label_smoothing
        each = {
            "sigmoid": lambda: -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin),
            "hinge": lambda: torch.relu(1 - margin),
            "ipo": lambda: (margin / beta - 1 / (2 * beta)) ** 2,
        }[loss]()
    if pair_weight is not None:
        each = each * pair_weight
    return each.sum(), DPOStats(logp, logratio, margin)
