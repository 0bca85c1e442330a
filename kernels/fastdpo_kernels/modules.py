"""Cross-entropy as nn.Modules with the call shapes of CCE and Liger, by linear_logp."""

from torch import Tensor, nn

from .linear_logp import Options, linear_logp


class _CrossEntropy(nn.Module):
    def __init__(
        self, *, ignore_index: int = -100, softcap: float | None = None, reduction: str = "mean",
        scale: float = 1.0
    ):  # fmt: skip
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")
        self.ignore_index, self.softcap, self.reduction, self.scale = ignore_index, softcap, reduction, scale

    def _loss(self, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
        options: Options = dict(scale=self.scale, softcap=self.softcap, ignore_index=self.ignore_index)
        each = -linear_logp(hidden, weight, target, bias, **options)
        if self.reduction == "mean":
            return each.sum() / (target != self.ignore_index).sum()
        return each if self.reduction == "none" else each.sum()


class LinearCrossEntropy(_CrossEntropy):
    """F.cross_entropy(softcap(scale * (e c^T + bias)), targets) in float32: the mean over targets that are
    not ignore_index, the sum, or "none". shift: a position tells the target so many later, and the last ones
    tell nothing; the first targets, which nothing tells, are 0 of "none". Called like cut_cross_entropy's
    (Wijmans et al. 2024); other options of it are refused."""

    def __init__(
        self, ignore_index: int = -100, softcap: float | None = None, reduction: str = "mean",
        shift: bool | int = 0, *, scale: float = 1.0
    ):  # fmt: skip
        super().__init__(ignore_index=ignore_index, softcap=softcap, reduction=reduction, scale=scale)
        self.shift = int(shift)

    def forward(self, e: Tensor, c: Tensor, targets: Tensor, bias: Tensor | None = None) -> Tensor:
        """Of e [..., T, D], c [V, D], targets i64[..., T] and bias [V]; without a shift e is any [..., D]."""
        if self.shift:
            if not 0 < self.shift < targets.shape[-1]:
                raise ValueError(f"shift must be in [0, {targets.shape[-1]}), got {self.shift}")
            e, targets = e[..., : -self.shift, :], targets[..., self.shift :]
        loss = self._loss(e, c, targets, bias)
        return nn.functional.pad(loss, (self.shift, 0)) if self.reduction == "none" else loss


class FusedLinearCrossEntropyLoss(_CrossEntropy):
    """The same without a shift, called like Liger's, with options by name."""

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Of lin_weight [V, D], _input [..., D], target i64[...] and bias [V]."""
        return self._loss(_input, lin_weight, target, bias)
