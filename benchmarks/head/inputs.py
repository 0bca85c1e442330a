"""What the head benchmark runs on, and the truth about it in fp64.

Letters: M scored rows, D hidden, V vocab, R responses, P pairs.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

BETA = 0.1


@dataclass(frozen=True)
class Shape:
    M: int
    D: int
    V: int
    response: int  # rows of each response; a group is a pair of them
    softcap: float | None = None
    budget: int | None = None  # memory_budget of those of ours that are not told to keep all

    def __str__(self):
        return f"{self.M} x {self.D} x {self.V}" + (" softcap" if self.softcap else "")


@dataclass(frozen=True)
class Inputs:
    """M rows of equally long responses, winner and loser side by side, on random data."""

    shape: Shape
    hidden: torch.Tensor  # [M, D]
    weight: torch.Tensor  # [V, D]
    target: torch.Tensor  # i64[M]
    cu_resp: torch.Tensor  # i64[R+1]
    pairs: torch.Tensor  # i64[P, 2]
    ref: torch.Tensor  # f32[M]

    @classmethod
    def make(cls, shape: Shape, dtype: torch.dtype, device: str) -> "Inputs":
        """Logits a few nats wide, half of the targets likely under the head and half drawn freely."""
        M, D, V = shape.M, shape.D, shape.V
        draw = torch.Generator(device).manual_seed(0)
        normal = lambda *size: torch.randn(*size, generator=draw, device=device)
        weight = normal(V, D) / D**0.5
        target = torch.randint(0, V, (M,), generator=draw, device=device)
        likely = (torch.arange(M, device=device) % 2 == 0).float()[:, None]
        hidden = 2 * normal(M, D) + 8 * likely * weight[target]
        responses = torch.arange(M // shape.response, device=device)
        return cls(
            shape,
            hidden.to(dtype),
            weight.to(dtype),
            target,
            torch.arange(0, M + 1, shape.response, device=device),
            responses.view(-1, 2),
            normal(M) * 0.1 - 8,
        )

    @property
    def groups(self) -> list[int]:
        return [2 * self.shape.response] * (self.shape.M // (2 * self.shape.response))

    def leaves(self, mode: str) -> "Inputs":
        """With the requires_grad flags of a mode and no gradient yet."""
        leaf = lambda t, wanted: t.detach().requires_grad_(wanted)
        trained = mode == "trained"
        return replace(self, hidden=leaf(self.hidden, mode != "forward"), weight=leaf(self.weight, trained))

    def loss_of(self, logp: torch.Tensor) -> torch.Tensor:
        """DPO's sum over the pairs, from token log-probs [M]: what a trainer does after the head."""
        ratio = (logp - self.ref).view(-1, self.shape.response).sum(1)
        return -F.logsigmoid(BETA * (ratio[self.pairs[:, 0]] - ratio[self.pairs[:, 1]])).sum()


class Truth:
    """fp64 log-probs and gradients, and what one rounding of dZ to the inputs' dtype does to them."""

    def __init__(self, inputs: Inputs, rows: int = 512):
        self.inputs, self.rows = inputs, rows
        weight = inputs.weight.double()
        cuts = [slice(i, i + rows) for i in range(0, inputs.shape.M, rows)]
        self.logp = torch.cat([self._logps(cut, weight)[1] for cut in cuts]).requires_grad_()
        (slope,) = torch.autograd.grad(inputs.loss_of(self.logp), self.logp)
        self.logp = self.logp.detach()
        self.d_hidden, d_weight, rounded = [], torch.zeros_like(weight), []
        for cut in cuts:
            dz = self._d_logits(cut, weight, slope[cut])
            self.d_hidden.append(dz @ weight)
            d_weight.addmm_(dz.t(), inputs.hidden[cut].double())
            rounded.append(dz.to(inputs.weight.dtype))
        self.d_hidden, self.d_weight = torch.cat(self.d_hidden), d_weight
        rounded = torch.cat(rounded)
        self.one_rounding = {
            "hidden": relative(rounded @ inputs.weight, self.d_hidden),
            "weight": relative(rounded.t() @ inputs.hidden, self.d_weight),
        }

    def _logps(self, cut, weight):
        z, cap = self.inputs.hidden[cut].double() @ weight.t(), self.inputs.shape.softcap
        z = z if cap is None else cap * torch.tanh(z / cap)
        return z, z.log_softmax(1).gather(1, self.inputs.target[cut, None])[:, 0]

    def _d_logits(self, cut, weight, slope):
        z, _ = self._logps(cut, weight)
        cap = self.inputs.shape.softcap
        cap_slope = 1.0 if cap is None else 1 - (z / cap) ** 2
        dz = -z.softmax(1)
        dz.scatter_add_(1, self.inputs.target[cut, None], torch.ones_like(dz[:, :1]))
        return dz.mul_(slope[:, None]).mul_(cap_slope)

    def errors(self, logp, leaves: Inputs) -> dict:
        """Nats of the log-probs, and errors of the gradients in units of one rounding of dZ."""
        out = {}
        if logp is not None:
            nats = (logp.detach().double() - self.logp).abs()
            out |= {"nats_max": nats.max().item(), "nats_median": nats.median().item()}
        for name, truth in (("hidden", self.d_hidden), ("weight", self.d_weight)):
            grad = getattr(leaves, name).grad
            if grad is not None:
                out[f"d_{name}"] = relative(grad, truth)
                out[f"d_{name}_roundings"] = out[f"d_{name}"] / max(self.one_rounding[name], 1e-30)
        return out


def relative(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth||."""
    return ((got.double() - truth).norm() / truth.norm()).item()


class Gemms:
    """The three products a head cannot do without, on random data: the ceiling."""

    def __init__(self, inputs: Inputs):
        self.inputs = inputs

    @cached_property
    def products(self):
        """{name: a call of one product}; dz is [M, V]."""
        hidden, weight = self.inputs.hidden, self.inputs.weight
        dz = torch.randn(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
        return {
            "logits": lambda: hidden @ weight.t(),
            "d_hidden": lambda: dz @ weight,
            "d_weight": lambda: dz.t() @ hidden,
        }
