"""From token log-probs to the loss of pairs and back: everything of linear_dpo that has no width V.

Letters: M scored rows, R responses, P pairs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def sigmoid(margin, beta, e):
    """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin) and its slope. DPO (Rafailov et al. 2023,
    eq. 7), with e > 0 conservative DPO (Mitchell 2023, eq. 3)."""
    value = -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)
    return value, e * torch.sigmoid(margin) - (1 - e) * torch.sigmoid(-margin)


def hinge(margin, beta, e):
    """relu(1 - margin) and its slope. RSO's hinge-norm (Liu et al. 2023), SLiC's loss on log-ratios."""
    return torch.relu(1 - margin), -(margin < 1).to(margin.dtype)


def ipo(margin, beta, e):
    """(margin / beta - 1 / (2 beta))^2 and its slope. IPO (Azar et al. 2023, eq. 17)."""
    gap = margin / beta - 1 / (2 * beta)
    return gap * gap, 2 / beta * gap


LOSSES = {"sigmoid": sigmoid, "hinge": hinge, "ipo": ipo}


@dataclass(eq=False)
class PairLoss:
    """The loss as a function of the token log-probs, with no wait for the device.

    Sums over responses and over pairs are taken in fp64 and in a fixed order: at -5,000 nats an fp32 sum
    is 5e-4 apart from its neighbour. The arguments are linear_dpo's.
    """

    cu_resp: torch.Tensor
    pairs: torch.Tensor
    ignored: torch.Tensor  # bool [M]: rows that are in no sum
    ref_token_logp: torch.Tensor | None
    offset: torch.Tensor | None
    pair_weight: torch.Tensor | None
    token_weight: torch.Tensor | None
    loss: str | Callable[[torch.Tensor], torch.Tensor]
    beta: float
    label_smoothing: float

    def __post_init__(self):
        cu_resp, pairs, rows = self.cu_resp, self.pairs, len(self.ignored)
        self.cu = cu_resp.long().clamp(0, rows)
        self.cu_rises = (cu_resp[0] == 0) & (cu_resp[-1] == rows) & (cu_resp.diff() >= 0).all()
        # a row beyond the last response finds none: check_pair_values refuses that on a CPU, and a
        # device reads a response that exists
        places = torch.arange(rows, device=self.cu.device)
        last = max(len(self.cu) - 2, 0)
        self.row_resp = torch.searchsorted(self.cu[1:], places, right=True).clamp_(max=last)
        self.winner, self.loser = pairs.long().unbind(-1)
        # what log-ratios are divided by
        self.number = _sums((~self.ignored).double(), self.cu) if self.loss == "ipo" else None
        # the pairs' slopes by response: all that win or lose with the first, then with the second, ...
        ends = torch.cat((self.winner, self.loser))
        self.by_resp = ends.argsort(stable=True)
        responses = torch.arange(len(self.cu), device=self.cu.device)
        self.cu_ends = torch.searchsorted(ends[self.by_resp], responses)

    def margins(self, token_logp):
        """(log-ratio [R], margin [P]) in token_logp's dtype, of token_logp [M]."""
        ratio = token_logp if self.ref_token_logp is None else token_logp - self.ref_token_logp
        if self.token_weight is not None:
            ratio = ratio * self.token_weight
        logratio = _sums(ratio.masked_fill(self.ignored, 0.0).double(), self.cu)
        per_resp = logratio if self.number is None else logratio / self.number
        margin = self.beta * (per_resp[self.winner] - per_resp[self.loser])
        if self.offset is not None:
            margin = margin - self.offset
        return logratio.to(token_logp.dtype), margin.to(token_logp.dtype)

    def total(self, margin):
        """The sum over pairs of weight times loss: a scalar of margin's dtype."""
        return self._weighted(self._each(margin)[0]).sum().to(margin.dtype)

    def token_slope(self, token_logp):
        """d total / d token_logp, [M]. The slope of a group's rows needs right log-probs of that group's
        rows only."""
        _, margin = self.margins(token_logp)
        if callable(self.loss):
            with torch.enable_grad():
                margin.requires_grad_()
                slope = torch.autograd.grad(self._weighted(self._each(margin)[0]).sum(), margin)[0]
        else:
            slope = self._weighted(self._each(margin)[1])
        slope = self.beta * slope.double()
        d_resp = _sums(torch.cat((slope, -slope))[self.by_resp], self.cu_ends)
        if self.number is not None:
            d_resp = d_resp / self.number
        d_token = d_resp[self.row_resp] if len(d_resp) else d_resp.new_zeros(len(token_logp))
        if self.token_weight is not None:
            d_token = d_token * self.token_weight
        return d_token.masked_fill(self.ignored, 0.0).to(token_logp.dtype)

    def unsound(self, bounds):
        """Whether cu_resp does not rise from 0 to all rows, a pair names a response below 0 (one above R - 1
        stops the device), or a response, or a pair, has rows on both sides of one of the row bounds: bool
        tensor."""
        starts, stops = self.cu[:-1], self.cu[1:]
        cut = ~self.cu_rises | (self.winner < 0).any() | (self.loser < 0).any()
        for bound in bounds:
            left, right = (starts < bound), (stops > bound)
            before, after = left & ~right, right & ~left
            apart = before[self.winner] & after[self.loser] | after[self.winner] & before[self.loser]
            cut |= (left & right).any() | apart.any()
        return cut

    def _each(self, margin):
        """(The loss of each pair, its slope or None)."""
        if not callable(self.loss):
            return LOSSES[self.loss](margin, self.beta, self.label_smoothing)
        each = self.loss(margin)
        if not isinstance(each, torch.Tensor) or each.shape != margin.shape:
            got = tuple(each.shape) if isinstance(each, torch.Tensor) else type(each).__name__
            raise ValueError(f"loss(margin) must give one value per pair, [{len(margin)}], got {got}")
        return each, None

    def _weighted(self, each):
        return each if self.pair_weight is None else each * self.pair_weight


def _sums(values, cu):
    """Sums of consecutive stretches of values, in order: index_add on a GPU has no order."""
    if len(cu) == 1 or not len(values):
        return values.new_zeros(len(cu) - 1)
    return torch.segment_reduce(values, "sum", offsets=cu, axis=0, unsafe=True)


def groups_of(cu_resp: torch.Tensor, pairs: torch.Tensor) -> list[int]:
    """Rows of the smallest blocks of neighbouring responses that no pair leaves. Waits for the device."""
    cu, ends = cu_resp.long(), pairs.long()
    steps = torch.zeros(len(cu), dtype=torch.int64, device=cu.device)
    one = torch.ones(len(ends), dtype=torch.int64, device=cu.device)
    steps.index_add_(0, ends.amin(1), one).index_add_(0, ends.amax(1), -one)
    closed = steps.cumsum(0)[:-1] == 0  # after this response no pair is open
    return torch.cat((cu[:1], cu[1:][closed])).diff().tolist()
