"""Losses that look at the policy alone: no reference is computed. lp = log pi(y | x), A = lp / |y|."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.objectives.dpo import conservative
from fastdpo.objectives.options import Above0, NotBelow0, Smoothing
from fastdpo.records import ResponseLogps


def sft(logps: ResponseLogps) -> Tensor:
    """Negative log-likelihood of each chosen response, summed over its tokens, f32[C].

    The step's loss is the mean over all their tokens, as TRL's `sft` loss.
    """
    return -logps.logp[logps.chosen]


def average_logp(logps: ResponseLogps) -> Tensor:
    """A of each response, f32[R]."""
    return logps.logp / logps.lengths


def nll_per_token(logps: ResponseLogps) -> Tensor:
    """-log pi(y_w) / |y_w| of each pair's winner, f32[P]."""
    return -average_logp(logps)[logps.winner]


def _gap(logps: ResponseLogps) -> Tensor:
    """lp_w - lp_l, f32[P]; subtracted in fp64, for both may be thousands."""
    logp = logps.per_response(logps.token_logp.double())
    return (logp[logps.winner] - logp[logps.loser]).to(logps.token_logp.dtype)


def simpo(
    logps: ResponseLogps,
    *,
    beta: Above0 = 2.0,
    simpo_gamma: NotBelow0 = 0.5,
    label_smoothing: Smoothing = 0.0,
) -> Tensor:
    """SimPO: -ls(beta (A_w - A_l) - gamma). Meng et al. 2024, arXiv 2405.14734.

    beta 2 to 10 and gamma / beta 0.3 to 0.5 in the paper; TRL's default beta is 0.1, its gamma 0.5, and it
    adds CPO's likelihood unless told not to ({simpo: 1, sft: 1} here). label_smoothing as in TRL's CPO.
    """
    average = average_logp(logps)
    z = beta * (average[logps.winner] - average[logps.loser]) - simpo_gamma - logps.offset
    return conservative(z, label_smoothing)


def cpo(logps: ResponseLogps, *, beta: Above0 = 0.1, label_smoothing: Smoothing = 0.0) -> Tensor:
    """CPO's preference part: -ls(beta (lp_w - lp_l)). Xu et al. 2024, arXiv 2401.08417, eq. 3.

    The objective `cpo` adds cpo_alpha times the mean negative log-likelihood of the chosen tokens, as the
    authors' code and TRL; the paper sums it over a response.
    """
    return conservative(beta * _gap(logps) - logps.offset, label_smoothing)


def slic(logps: ResponseLogps, *, delta: NotBelow0 = 1.0, slic_lambda: NotBelow0 = 0.1) -> Tensor:
    """SLiC-HF: max(0, delta - lp_w + lp_l) - lambda lp_w. Zhao et al. 2023, arXiv 2305.10425,
    section 2.

    The paper's second term takes the SFT data's own target; here, as without such a column, the winner.
    """
    return torch.relu(delta - _gap(logps)) - slic_lambda * logps.logp[logps.winner]


def orpo(logps: ResponseLogps, *, beta: Above0 = 0.1) -> Tensor:
    """ORPO: -A_w - beta ls(log odds_w - log odds_l), odds(y) = e^A / (1 - e^A).

    Hong et al. 2024, arXiv 2403.07691, eq. 4 and 7; beta is the paper's lambda. The paper's likelihood is of
    the response; TRL's runs over the prompt's tokens too, and is a mean over the whole batch.
    """
    average = average_logp(logps)
    log_odds = average - log1mexp(average)
    return -average[logps.winner] - beta * F.logsigmoid(log_odds[logps.winner] - log_odds[logps.loser])


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) of x <= 0, by the form that loses no digits (Maechler 2012); at 0, where every token of a
    response has probability 1, of the next number below, without gradient."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931471805599453
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))
