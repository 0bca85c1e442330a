"""Liger's fused DPO loss, by linear_logp: the same constructor, arguments, results and values.

    from fastdpo.integrations.liger import FusedLinearDPOLoss as LigerFusedLinearDPOLoss

Only scored rows meet the lm_head, their logits stay fp32, and the reference may be given as log-probs
computed once, in place of its hidden states and weights. Needs no liger-kernel; written against 0.8.5.

Shapes: B pairs, T tokens of a row, H hidden, V vocabulary. The first B rows are chosen, then B rejected.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo.integrations.head import token_logp


def _robust(d: Tensor, e: float) -> Tensor:
    return (-(1 - e) * F.logsigmoid(d) + e * F.logsigmoid(-d)) / (1 - 2 * e)


def _exo(d: Tensor, e: float) -> Tensor:
    log_p = torch.tensor([1 - e, e], device=d.device).log()
    return d.sigmoid() * (F.logsigmoid(d) - log_p[0]) + (-d).sigmoid() * (F.logsigmoid(-d) - log_p[1])


def _discopop(d: Tensor, tau: float) -> Tensor:
    m = torch.sigmoid(d / tau)
    return -F.logsigmoid(d) * (1 - m) + torch.exp(-d) * m


# of the rewards c and r (beta times the log ratios), f32[B]; o: the loss module with its settings
_LOSSES = {
    "sigmoid": lambda c, r, o: -F.logsigmoid(c - r),
    "hinge": lambda c, r, o: torch.relu(1 - (c - r)),
    "exo_pair": lambda c, r, o: _exo(c - r, o.label_smoothing),
    "nca_pair": lambda c, r, o: -F.logsigmoid(c) - 0.5 * F.logsigmoid(-c) - 0.5 * F.logsigmoid(-r),
    "robust": lambda c, r, o: _robust(c - r, o.label_smoothing),
    "bco_pair": lambda c, r, o: -F.logsigmoid(c) - F.logsigmoid(-r),
    "sppo_hard": lambda c, r, o: ((c - 0.5) / o.beta) ** 2 + ((r + 0.5) / o.beta) ** 2,
    "apo_zero": lambda c, r, o: 1 - c.sigmoid() + r.sigmoid(),
    "apo_down": lambda c, r, o: c.sigmoid() + 1 - (c - r).sigmoid(),
    "discopop": lambda c, r, o: _discopop(c - r, o.discopop_tau),
}


class FusedLinearDPOLoss(nn.Module):
    """LigerFusedLinearDPOLoss. `compiled` and `chunk_size` are taken and not needed."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ):
        super().__init__()
        self.ignore_index, self.beta, self.alpha = ignore_index, beta, alpha
        self.compute_nll_loss, self.use_ref_model = compute_nll_loss, use_ref_model
        self.average_log_prob, self.loss_type = average_log_prob, loss_type
        self.compiled, self.chunk_size = compiled, chunk_size
        self.label_smoothing, self.discopop_tau = label_smoothing, discopop_tau
        if loss_type not in _LOSSES:
            raise ValueError(f"loss_type is one of {', '.join(_LOSSES)}, got {loss_type!r}")
        if loss_type == "exo_pair" and not label_smoothing > 0:
            raise ValueError("loss_type exo_pair needs label_smoothing > 0; its paper recommends 1e-3")
        if loss_type == "robust" and not 0 <= label_smoothing < 0.5:
            raise ValueError(f"loss_type robust needs label_smoothing in [0, 0.5), got {label_smoothing}")

    def forward(
        self,
        lin_weight: Tensor,  # [V, H]
        _input: Tensor,  # [2B, T, H]: hidden states, one per entry of target
        target: Tensor,  # i64[2B, T]: the next tokens, ignore_index where none is scored
        bias: Tensor | None = None,  # [V]
        ref_input: Tensor | None = None,  # [2B, T, H]
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        ref_chosen_logps: Tensor | None = None,  # f32[B]: the reference's, in place of the three above;
        ref_rejected_logps: Tensor | None = None,  # averages over tokens where average_log_prob is set
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (chosen_logps [B], rejected_logps [B], chosen_logits_mean, rejected_logits_mean, nll_loss,
        chosen_rewards [B], rejected_rewards [B])). Only the loss has a gradient."""
        logp = self._row_sums(_input, lin_weight, bias, target)
        counts = (target != self.ignore_index).sum(1)
        n_pairs = len(target) // 2
        nll = logp.new_zeros(())
        if self.compute_nll_loss:
            nll = -logp[:n_pairs].sum() / counts[:n_pairs].sum()
        if self.average_log_prob:
            logp = logp / counts
        reference = torch.zeros_like(logp)
        if self.use_ref_model:
            given = (ref_chosen_logps, ref_rejected_logps)
            reference = self._reference(ref_input, ref_weight, ref_bias, target, given)
        chosen, rejected = (self.beta * (logp - reference)).split(n_pairs)
        pair_losses = _LOSSES[self.loss_type](chosen, rejected, self)
        loss = self.alpha * nll + pair_losses.sum() / n_pairs
        means = self._mean_logits(_input, lin_weight, bias)
        stats = (*logp.split(n_pairs), *means, nll, chosen, rejected)
        return loss, tuple(stat.detach() for stat in stats)

    def _row_sums(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        """log pi of each row's scored tokens, f32[2B]."""
        scored = target != self.ignore_index
        logp, _ = token_logp(hidden[scored], weight, bias, target[scored])
        return logp.new_zeros(target.shape).masked_scatter(scored, logp).sum(1)

    @torch.no_grad()
    def _reference(
        self,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        target: Tensor,
        given: tuple[Any, Any],
    ) -> Tensor:
        if all(logps is not None for logps in given):
            return torch.cat(given)
        if hidden is None or weight is None:
            raise ValueError(
                "use_ref_model needs ref_input and ref_weight, or ref_chosen_logps and ref_rejected_logps"
            )
        logp = self._row_sums(hidden, weight, bias, target)
        return logp / (target != self.ignore_index).sum(1) if self.average_log_prob else logp

    @torch.no_grad()
    def _mean_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """The mean of all logits of the chosen rows and of the rejected ones, padding included as Liger's:
        the mean hidden state meets the mean row of the head, with no logits made."""
        means = hidden.unflatten(0, (2, -1)).mean((1, 2), dtype=torch.float32)
        out = means @ weight.mean(0, dtype=torch.float32)
        return tuple(out if bias is None else out + bias.mean(dtype=torch.float32))
