"""Pair losses over log pi - log pi_ref, one value a pair: DPO, and other curves and targets of it.

Throughout: a and b are the log-ratios log pi(y) / pi_ref(y) of the winner and the loser, h = a - b,
ls = log sigmoid, sg = sigmoid. A pair's own offset is subtracted from beta * h where a loss is a function of
it. Every function takes ResponseLogps and returns f32[P] (f64[P] of fp64 log-probs); those with **divergence
are f-DPO too, see `scores`.
"""

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.objectives.options import Above0, Number, Smoothing, Switch, one_of
from fastdpo.objectives.tokens import on_policy_weight
from fastdpo.records import ResponseLogps

Divergence = Annotated[str, one_of("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")]


def log_ratios(logps: ResponseLogps) -> tuple[Tensor, Tensor]:
    """(a, b): the winners' and the losers' log-ratios, f32[P] each."""
    ratio = logps.log_ratio
    return ratio[logps.winner], ratio[logps.loser]


def conservative(z: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - eps) ls(z) - eps ls(-z)."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def scores(
    logps: ResponseLogps,
    *,
    f_divergence_type: Divergence = "reverse_kl",
    f_alpha_divergence_coef: Number = 0.5,
) -> tuple[Tensor, Tensor]:
    """f'(pi / pi_ref) of the winners and the losers, f32[P] each: what f-DPO puts in a log-ratio's place.

    Wang et al. 2023, arXiv 2309.16240, with TRL's constants and TRL's alpha (the paper's is 1 minus
    it): reverse_kl r; forward_kl 1 - exp(-r); js_divergence log 2 + ls(r); alpha_divergence
    (exp((alpha - 1) r) - 1) / (alpha - 1), which is r at alpha = 1. As in TRL the exponent of
    alpha_divergence is clamped at 80. TRL clamps nothing for forward_kl, and its gradient is no number
    where a loser's exp(-b) overflows, though the loss is flat there: only the loser's exponent is clamped
    here, where exp still fits the dtype. A winner's that overflows is an infinite loss, as it should be.
    """
    a, b = log_ratios(logps)
    if f_divergence_type == "forward_kl":
        largest = math.log(torch.finfo(b.dtype).max) - 0.01
        return 1 - (-a).exp(), 1 - (-b).clamp(max=largest).exp()
    if f_divergence_type == "js_divergence":
        return math.log(2) + F.logsigmoid(a), math.log(2) + F.logsigmoid(b)
    power = f_alpha_divergence_coef - 1
    if f_divergence_type == "alpha_divergence" and abs(power) >= 1e-6:
        score = lambda r: ((power * r).clamp(max=80).exp() - 1) / power
        return score(a), score(b)
    return a, b


def scaled(logps: ResponseLogps, beta: float, **divergence) -> Tensor:
    """z = beta * (difference of the scores) - offset, f32[P]; beta * h - offset without f-divergence."""
    winner, loser = scores(logps, **divergence)
    return beta * (winner - loser) - logps.offset


def per_token(logps: ResponseLogps, **divergence) -> Tensor:
    """Difference of the scores, each divided by its response's length, f32[P]."""
    winner, loser = scores(logps, **divergence)
    return winner / logps.lengths[logps.winner] - loser / logps.lengths[logps.loser]


def sigmoid(
    logps: ResponseLogps, *, beta: Above0 = 0.1, label_smoothing: Smoothing = 0.0, **divergence
) -> Tensor:
    """DPO: -ls(beta h). Rafailov et al. 2023, arXiv 2305.18290, eq. 7.

    label_smoothing eps > 0 is conservative DPO (Mitchell 2023, eq. 3), -(1 - eps) ls(z) - eps ls(-z), as in
    the DPO authors' code; TRL 1.16 accepts it here and ignores it.
    """
    return conservative(scaled(logps, beta, **divergence), label_smoothing)


def sigmoid_norm(logps: ResponseLogps, *, beta: Above0 = 0.1, **divergence) -> Tensor:
    """Length-normalised DPO: -ls(beta (a/|y_w| - b/|y_l|)).

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, with beta = 5; the default is TRL's.
    """
    return -F.logsigmoid(beta * per_token(logps, **divergence) - logps.offset)


def robust(
    logps: ResponseLogps, *, beta: Above0 = 0.1, label_smoothing: Smoothing = 0.1, **divergence
) -> Tensor:
    """Robust DPO: [-(1 - eps) ls(z) + eps ls(-z)] / (1 - 2 eps), the mean DPO loss of unflipped pairs.

    Chowdhury et al. 2024, arXiv 2403.00409, section 3.1; eps is the share of flipped pairs, and 0 (TRL's
    default) is DPO. The loss may be below 0, and has no lower bound.
    """
    z = scaled(logps, beta, **divergence)
    unbiased = label_smoothing * F.logsigmoid(-z) - (1 - label_smoothing) * F.logsigmoid(z)
    return unbiased / (1 - 2 * label_smoothing)


def hinge(logps: ResponseLogps, *, beta: Above0 = 0.1, **divergence) -> Tensor:
    """Hinge on the log-ratios: max(0, 1 - beta h). Liu et al. 2023 (RSO), arXiv 2309.06657."""
    return torch.relu(1 - scaled(logps, beta, **divergence))


def ipo(logps: ResponseLogps, *, beta: Above0 = 0.1, **divergence) -> Tensor:
    """IPO a token: (a/|y_w| - b/|y_l| - 1/(2 beta))^2. Azar et al. 2023, arXiv 2310.12036, eq. 17.

    beta is the paper's tau. The paper writes summed log-ratios; TRL and HALOs divide by the lengths, as the
    authors told TRL they did. `ipo_sum` is the form as written.
    """
    return (per_token(logps, **divergence) - 1 / (2 * beta)) ** 2


def ipo_sum(logps: ResponseLogps, *, beta: Above0 = 0.1) -> Tensor:
    """IPO of summed log-ratios: (h - 1/(2 beta))^2. Azar et al. 2023, arXiv 2310.12036, eq. 17, and the DPO
    authors' code."""
    a, b = log_ratios(logps)
    return (a - b - 1 / (2 * beta)) ** 2


def exo_pair(
    logps: ResponseLogps, *, beta: Above0 = 0.1, label_smoothing: Smoothing = 1e-3, **divergence
) -> Tensor:
    """EXO: sg(z) (ls(z) - log(1 - eps)) + sg(-z) (ls(-z) - log eps), z = beta h.

    Ji et al. 2024, arXiv 2402.00856, eq. 16: the reverse KL from the smoothed label; eps must be above 0,
    1e-3 is the paper's.
    """
    z = scaled(logps, beta, **divergence)
    winner = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return winner + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))


def nca_pair(logps: ResponseLogps, *, beta: Above0 = 0.1) -> Tensor:
    """NCA of two: -ls(beta a) - ls(-beta a)/2 - ls(-beta b)/2. Chen et al. 2024, arXiv 2402.05369,
    section 4.1."""
    a, b = (beta * ratio for ratio in log_ratios(logps))
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)


def bco_pair(logps: ResponseLogps, *, beta: Above0 = 0.1) -> Tensor:
    """BCO of pairs without its reward shift: -ls(beta a) - ls(-beta b). Jung et al. 2024, arXiv 2404.04656,
    section 4.

    As TRL's DPO trainer; `bco` has the paper's shift.
    """
    a, b = log_ratios(logps)
    return -F.logsigmoid(beta * a) - F.logsigmoid(-beta * b)


def sppo_hard(logps: ResponseLogps, *, beta: Above0 = 0.1) -> Tensor:
    """SPPO with a certain winner: (a - 1/(2 beta))^2 + (b + 1/(2 beta))^2.

    Wu et al. 2024, arXiv 2405.00675, eq. 4.7 with P = 1 and 0; beta = 1/eta, 0.001 in the paper. The paper's
    soft probabilities come from a judge that the rows do not carry.
    """
    a, b = log_ratios(logps)
    return (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2


def apo_zero(logps: ResponseLogps, *, beta: Above0 = 0.1) -> Tensor:
    """APO-zero: 1 - sg(beta a) + sg(beta b), winner up and loser down. D'Oosterlinck et al. 2024, arXiv
    2408.06266, eq. 7."""
    a, b = log_ratios(logps)
    return 1 - torch.sigmoid(beta * a) + torch.sigmoid(beta * b)


def apo_down(logps: ResponseLogps, *, beta: Above0 = 0.1) -> Tensor:
    """APO-down: sg(beta a) + 1 - sg(beta h), both down and the loser further. D'Oosterlinck et al. 2024,
    arXiv 2408.06266, eq. 8."""
    a, b = log_ratios(logps)
    return torch.sigmoid(beta * a) + 1 - torch.sigmoid(beta * (a - b))


def discopop(
    logps: ResponseLogps, *, beta: Above0 = 0.1, discopop_tau: Above0 = 0.05, **divergence
) -> Tensor:
    """DiscoPOP, log-ratio modulated: (1 - m) (-ls(z)) + m exp(-z), z = beta h, m = sg(z / tau).

    Lu et al. 2024, arXiv 2406.08414, eq. 5; the paper's beta is 0.05. Not monotone: at tau 0.05 its slope at
    equal models (z = 0) is +0.78, so training first makes the margin smaller. m exp(-z) is computed as
    exp(ls(z / tau) - z), whose two factors cannot overflow apart.
    """
    z = scaled(logps, beta, **divergence)
    logistic = torch.sigmoid(-z / discopop_tau) * -F.logsigmoid(z)
    return logistic + (F.logsigmoid(z / discopop_tau) - z).exp()


def wpo(logps: ResponseLogps, *, beta: Above0 = 0.1, clamp_weights: Switch = True) -> Tensor:
    """WPO as its authors run it: DPO's loss times how likely the policy is to write both responses.

    Zhou et al. 2024, arXiv 2406.11827, eq. 2; the weight, clamped at 1 unless told otherwise, is
    `tokens.on_policy_weight`. `use_weighting` gives any pair loss the same weight (unclamped, as TRL).
    """
    return on_policy_weight(logps, clamp_weights=clamp_weights) * sigmoid(logps, beta=beta)
