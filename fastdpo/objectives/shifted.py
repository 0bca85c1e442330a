"""DPO with a margin or a term of its own: ODPO, DPOP, R-DPO, RPO, reward-aware RPO. Letters as dpo.py."""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor

from fastdpo.objectives.dpo import log_ratios, scaled
from fastdpo.objectives.options import Above0, NotBelow0, one_of
from fastdpo.objectives.reference_free import nll_per_token
from fastdpo.records import ResponseLogps

Scaling = Annotated[str, one_of("log", "linear", "log_difference")]


def odpo(
    logps: ResponseLogps, *, beta: Above0 = 0.1, alpha: NotBelow0 = 1.0, scaling: Scaling = "log"
) -> Tensor:
    """ODPO: -ls(beta h - alpha f(score_w - score_l)), a wider margin for a better winner.

    Amini et al. 2024, arXiv 2402.10571. scaling: log f = log(s_w - s_l), linear s_w - s_l,
    log_difference log s_w - log s_l (scores above 0). alpha is not scaled by beta; 0 is DPO. With log a gap
    under 1 RELAXES the margin, and a tie (gap 0) has loss 0 and no gradient; scores that contradict a pair
    (gap < 0) are refused before training.
    """
    z = scaled(logps, beta)
    if alpha:
        z = z - alpha * score_gap(logps, scaling)
    return -F.logsigmoid(z)


def score_gap(logps: ResponseLogps, scaling: str) -> Tensor:
    """ODPO's f of each pair's scores, [P]; -inf for a tie in log scaling."""
    good, bad = logps.score[logps.winner], logps.score[logps.loser]
    if scaling == "log_difference":
        return good.log() - bad.log()
    return (good - bad).log() if scaling == "log" else good - bad


def dpop(logps: ResponseLogps, *, beta: Above0 = 0.1, dpop_lambda: NotBelow0 = 5.0) -> Tensor:
    """DPO-Positive: -ls(beta (h - lambda max(0, -a))), to keep the winner as likely as the reference does.

    Pal et al. 2024 (Smaug), arXiv 2402.13228.
    """
    a, _ = log_ratios(logps)
    return -F.logsigmoid(scaled(logps, beta) - beta * dpop_lambda * F.relu(-a))


def rdpo(logps: ResponseLogps, *, beta: Above0 = 0.1, length_alpha: NotBelow0 = 0.01) -> Tensor:
    """Length-regularised DPO: -ls(beta h + alpha (|y_w| - |y_l|)), less to learn from a longer winner.

    Park et al. 2024 (R-DPO), arXiv 2403.19159.
    """
    longer = logps.lengths[logps.winner] - logps.lengths[logps.loser]
    return -F.logsigmoid(scaled(logps, beta) + length_alpha * longer)


def rpo(logps: ResponseLogps, *, beta: Above0 = 0.1, rpo_alpha: NotBelow0 = 1.0) -> Tensor:
    """Iterative RPO: -ls(beta h) - alpha log pi(y_w) / |y_w|.

    Pang et al. 2024, arXiv 2404.19733: each winner's mean over its own tokens; the mapping
    {sigmoid: 1, sft: alpha} is TRL's form, a mean over all winners' tokens.
    """
    return -F.logsigmoid(scaled(logps, beta)) + rpo_alpha * nll_per_token(logps)


def reward_rpo(logps: ResponseLogps, *, beta: Above0 = 0.1, eta: Above0 = 1.0) -> Tensor:
    """Reward-aware RPO: KL(p || q) of two coins, p = sg(eta (score_w - score_l)) and q = sg(beta h).

    Adler et al. 2024 (Nemotron-4 340B), arXiv 2406.11704, and Sun et al. 2025, arXiv
    2502.00203: the margin is to match the gap of the scores, not to grow without end.
    """
    gap = eta * (logps.score[logps.winner] - logps.score[logps.loser])
    z = scaled(logps, beta)
    wins = gap.sigmoid() * (F.logsigmoid(gap) - F.logsigmoid(z))
    return wins + (-gap).sigmoid() * (F.logsigmoid(-gap) - F.logsigmoid(-z))
