"""Losses that look at more than one pair at a time, or at judged responses: Dr. DPO, AOT, KTO, BCO.

Letters as dpo.py. A judged response is one a row labels, or, of a pair, its winner (desirable) and its
loser (undesirable); a response in several pairs is judged in each, and pair weights do not count.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.objectives.dpo import conservative, log_ratios
from fastdpo.objectives.options import Above0, NotBelow0, Smoothing
from fastdpo.records import ResponseLogps


def drdpo(losses: Tensor, weight: Tensor, *, beta_prime: Above0 = 1.0) -> Tensor:
    """Dr. DPO of pair losses [P] and pair weights [P], a scalar: -beta' log mean_i exp(-l_i / beta').

    Wu et al. 2024, arXiv 2407.07880, eq. 12: pairs of low loss, the ones to be trusted, count MORE. (It is
    not the worst-case form +beta' log mean exp(+l / beta').) beta' to infinity is the mean, to 0 the
    smallest loss. The authors' code takes the mean of each microbatch alone; `scope` says over how many
    groups, the whole step by default. By logsumexp, where their log of a mean of exp underflows.
    """
    share = (weight.double() / weight.double().sum()).log()
    return -beta_prime * (share - losses.double() / beta_prime).logsumexp(0).to(losses.dtype)


def aot(logps: ResponseLogps, *, beta: Above0 = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """AOT on pairs: the policy's lp_w - lp_l, sorted, against the reference's sorted, f32[P] in that order.

    -ls(beta (sort_i(lp_w - lp_l) - sort_i(ref_w - ref_l))), conservative by label_smoothing.
    Melnyk et al. 2024, arXiv 2406.05882, section 3, with the logistic loss. Sorted over the whole
    step; pair weights are not read, for a sorted place has no pair of its own.
    """
    assert logps.ref_token_logp is not None
    sums = logps.per_response(logps.token_logp.double())
    ref_sums = logps.per_response(logps.ref_token_logp.double())
    policy, reference = (s[logps.winner] - s[logps.loser] for s in (sums, ref_sums))
    apart = policy.sort(stable=True).values - reference.sort(stable=True).values
    return conservative(beta * apart.to(logps.token_logp.dtype), label_smoothing)


def aot_unpaired(logps: ResponseLogps, *, beta: Above0 = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """AOT: the winners' log-ratios, sorted, against the losers' sorted, f32[P] in that order.

    -ls(beta (sort_i(a) - sort_i(b))). Melnyk et al. 2024, arXiv 2406.05882, section 3, with the
    logistic loss. Needs as many winners as losers, so it takes pairs, and forgets who met whom.
    """
    a, b = (ratio.sort(stable=True).values for ratio in log_ratios(logps))
    return conservative(beta * (a - b), label_smoothing)


def judged_ratios(logps: ResponseLogps) -> tuple[Tensor, Tensor]:
    """Log-ratios of the desirable and of the undesirable responses, f32[.] each."""
    ratio = logps.log_ratio
    return ratio[logps.desirable], ratio[logps.undesirable]


def kto(
    logps: ResponseLogps,
    *,
    beta: Above0 = 0.1,
    desirable_weight: NotBelow0 = 1.0,
    undesirable_weight: NotBelow0 = 1.0,
) -> Tensor:
    """KTO: w_d (1 - sg(beta (a - z0))) of desirable and w_u (1 - sg(beta (z0 - b))) of undesirable responses.

    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7. z0 is `kto_z0` of the step, in logps.context. One
    value a judged response, the desirable ones first; the loss is their mean.
    """
    good, bad = judged_ratios(logps)
    z0 = logps.context["z0"]
    desirable = desirable_weight * torch.sigmoid(-beta * (good - z0))
    return torch.cat([desirable, undesirable_weight * torch.sigmoid(-beta * (z0 - bad))])


def kto_z0(logps: ResponseLogps) -> Tensor:
    """KTO's reference point, a scalar without gradient: max(0, mean log-ratio of mismatched responses).

    Ethayarajh et al. 2024, arXiv 2402.01306; `logps` holds each prompt with another row's
    response. The mean of summed log-ratios, as TRL's and HALOs' code.
    """
    return logps.log_ratio.detach().mean().clamp(min=0)


def apo_zero_unpaired(
    logps: ResponseLogps,
    *,
    beta: Above0 = 0.1,
    desirable_weight: NotBelow0 = 1.0,
    undesirable_weight: NotBelow0 = 1.0,
) -> Tensor:
    """APO-zero of judged responses: KTO with z0 = 0. D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7, in
    TRL's form; one value a judged response, the desirable ones first."""
    at_0 = replace(logps, context={"z0": 0.0})
    return kto(at_0, beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)


def bco(logps: ResponseLogps, *, beta: Above0 = 0.1) -> Tensor:
    """BCO: -ls(beta a - delta) of desirable and -ls(-(beta b - delta)) of undesirable responses.

    Jung et al. 2024, arXiv 2404.04656, section 4; delta is the running mean of all rewards so far, this
    step's included, without gradient (`bco_remember`, as TRL). One value a judged response, the
    desirable ones first; the loss is their mean, half of `bco_pair`'s sum over a pair.
    """
    good, bad = judged_ratios(logps)
    count = logps.context.get("count", 0.0)
    delta = logps.context["sum"] / count if count else 0.0
    return torch.cat([-F.logsigmoid(beta * good - delta), -F.logsigmoid(delta - beta * bad)])


def bco_remember(logps: ResponseLogps, memory: dict[str, float], *, beta: Above0 = 0.1) -> dict[str, float]:
    """Sum and count of all rewards seen, after this step: what BCO's delta is the mean of."""
    rewards = [beta * ratios.detach().double() for ratios in judged_ratios(logps)]
    sums = torch.stack([r.sum() for r in rewards]).tolist()  # at once: the host waits for the device
    return {
        "sum": math.fsum([memory.get("sum", 0.0), *sums]),
        "count": memory.get("count", 0.0) + sum(len(r) for r in rewards),
    }
