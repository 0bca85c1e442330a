"""Losses of responses that the policy itself wrote and something scored: no pairs are looked at."""

import torch
from torch import Tensor

from fastdpo.objectives.options import NotBelow0
from fastdpo.records import ResponseLogps


def rloo(logps: ResponseLogps, *, clip: NotBelow0 = 0.2, kl_coef: NotBelow0 = 0.05) -> Tensor:
    """RLOO: REINFORCE, each sample's reward against the mean of the others' in its group, f32[R].

    R = score - kl_coef (log pi - log pi_ref) of the response, without gradient; A = `advantages(R)`.
    clip 0: -A log pi(y). Else PPO's surrogate, summed over the response's tokens:
    -min(r A, clamp(r, 1 - clip, 1 + clip) A), r = pi / pi_old of the token, where pi_old is the policy that
    sampled (old_token_logp, or the reference where there is none): at r = 1 its gradient is clip 0's. r's
    exponent is clamped at 80, short of where fp32 overflows.

    Ahmadian et al. 2024, arXiv 2402.14740, eq. 8, and Kool et al. 2019 ("Buy 4 REINFORCE samples, get a
    baseline for free!"); the clip: Schulman et al. 2017, arXiv 1707.06347, eq. 7. On samples that begin
    inside of a known response it is the policy step of DR-PO, Chang et al. 2024, arXiv 2404.08495, without a
    critic: all samples of a group continue one state. Each response needs a score, each group two responses.
    """
    reward = logps.score.double() - kl_coef * logps.log_ratio.detach().double()
    advantage = advantages(reward, logps.group).to(logps.token_logp.dtype)
    if not clip:
        return -advantage * logps.logp
    assert logps.ref_token_logp is not None  # or log_ratio has said so
    old = logps.ref_token_logp if logps.old_token_logp is None else logps.old_token_logp
    ratio, gain = (logps.token_logp - old).clamp(max=80).exp(), logps.per_token(advantage)
    return -logps.per_response(torch.minimum(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain))


def advantages(reward: Tensor, group: Tensor) -> Tensor:
    """Each reward minus the mean of the others' of its group, [R]; NaN in a group of one. `group`: i64[R],
    rising. Differences come first, so that equal rewards give exactly 0."""
    start, end = torch.searchsorted(group, group), torch.searchsorted(group, group, right=True)
    above = reward - reward[start]  # the group's first
    # one sum a group, at its first response: the segments of the others are empty
    total = torch.segment_reduce(above, "sum", offsets=torch.cat([start[:1], end]))
    size = end - start
    return (size * above - total[start]) / (size - 1)
