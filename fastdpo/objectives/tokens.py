"""What is done with the tokens before a pair loss sees their sums: LD-DPO, weighted DPO, WPO's weights."""

from dataclasses import replace

import torch
from torch import Tensor

from fastdpo.objectives.options import ShareOrNone, Switch
from fastdpo.records import ResponseLogps


def transformed(
    logps: ResponseLogps, *, ld_alpha: ShareOrNone = None, gamma: ShareOrNone = None
) -> ResponseLogps:
    """With the token weights of weighted DPO and LD-DPO in the log-probs; None leaves either out."""
    if gamma is not None:
        logps = relevance_weighted(logps, gamma)
    if ld_alpha is not None:
        logps = length_desensitised(logps, ld_alpha)
    return logps


def relevance_weighted(logps: ResponseLogps, gamma: float) -> ResponseLogps:
    """Weighted DPO: relevant tokens count fully, the others gamma times, in policy and reference alike.

    f(y) = sum_t (r_t + gamma (1 - r_t)) log pi(y_t | x, y_<t) with r_t in [0, 1] the row's token weight;
    not divided by the sum of the weights. Banerjee et al. 2024, arXiv 2406.06496, eq. 2 and 3, where r_t is
    0 or 1. gamma = 1 is the loss without weights, gamma = 0 skips what is not relevant. Lengths still
    count every token.
    """
    if logps.token_weight is None:
        raise ValueError("gamma needs token weights, and the batch carries none")
    relevant = logps.token_weight.to(logps.token_logp.dtype)
    weight = relevant + gamma * (1 - relevant)
    return _times(logps, weight)


def length_desensitised(logps: ResponseLogps, ld_alpha: float) -> ResponseLogps:
    """LD-DPO: tokens past the length of the pair's shorter response count ld_alpha times, in policy and
    reference alike.

    f(y) = sum_{t <= l} log pi(y_t) + ld_alpha sum_{t > l} log pi(y_t), l = min(|y_w|, |y_l|).
    Liu et al. 2024, arXiv 2409.06411. ld_alpha = 1 is the loss without it. What "shorter" is
    depends on the pair, so each pair gets two responses of its own.
    """
    own = apart(logps)
    place = torch.arange(len(own.token_logp), device=own.cu_resp.device) - own.per_token(own.cu_resp[:-1])
    shorter = own.lengths.view(-1, 2).amin(1).repeat_interleave(2)
    weight = torch.ones_like(own.token_logp, requires_grad=False)
    return _times(own, weight.masked_fill(place >= own.per_token(shorter), ld_alpha))


def apart(logps: ResponseLogps) -> ResponseLogps:
    """The same pairs, each with two responses that no other pair has: winner, loser, winner, loser, ..."""
    order = logps.pairs.flatten()
    lengths = logps.lengths[order]
    cu_resp = torch.cat([logps.cu_resp[:1], lengths.cumsum(0)])
    moved = logps.cu_resp[:-1][order] - cu_resp[:-1]
    # its size is known on the host: cu_resp[-1] would make it wait for the device
    index = torch.arange(logps.paired_tokens, device=order.device)
    index = index + moved.repeat_interleave(lengths, output_size=len(index))
    pairs = torch.arange(len(order), device=order.device).view(-1, 2)
    pick = lambda values: None if values is None else values[index]
    return replace(
        logps,
        token_logp=logps.token_logp[index],
        ref_token_logp=pick(logps.ref_token_logp),
        old_token_logp=pick(logps.old_token_logp),
        cu_resp=cu_resp,
        group=logps.group[order],
        pairs=pairs,
        chosen=pairs[:, 0],
        desirable=pairs[:, 0],
        undesirable=pairs[:, 1],
        score=logps.score[order],
        token_weight=pick(logps.token_weight),
        token_stats={name: values[index] for name, values in logps.token_stats.items()},
    )


def on_policy_weight(logps: ResponseLogps, *, clamp_weights: Switch = False) -> Tensor:
    """WPO's weight of each pair, f32[P], without gradient: how likely the policy is to write both responses.

    w(y) = exp(1/|y| sum_t [log pi(y_t) - log sum_v pi(v)^2]), and a pair weighs w(y_w) w(y_l).
    Zhou et al. 2024, arXiv 2406.11827, eq. 2, with the sampled alignment (as TRL). The authors' code clamps
    the product at 1 (clamp_weights); TRL does not. Always of the plain log-probs: ld_alpha and gamma do not
    change what the policy would write.
    """
    aligned = logps.token_logp.detach() - logps.token_stats["log_sum_sq_probs"]
    mean = logps.per_response(aligned) / logps.lengths
    weight = (mean[logps.winner] + mean[logps.loser]).exp()
    return weight.clamp(max=1) if clamp_weights else weight


def _times(logps: ResponseLogps, weight: Tensor) -> ResponseLogps:
    ref = logps.ref_token_logp
    return replace(
        logps,
        token_logp=logps.token_logp * weight,
        ref_token_logp=None if ref is None else ref * weight.to(ref.dtype),
    )
