"""Logistic regression, as scikit-learn's LogisticRegression has it, and how strongly it is held back."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdpo.errors import DataError, ModelError

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # C, the strongest penalty first
_FOLDS = 4


@torch.no_grad()
def fit(features: Tensor, labels: Tensor, C: float = 1.0, max_iter: int = 100) -> tuple[Tensor, float]:
    """(w f64[D], b) that minimise |w|^2 / 2 + C sum_i log(1 + exp(-y_i (w . x_i + b))), y = 1 of label 1 and
    -1 of label 0: scikit-learn's LogisticRegression, its intercept not penalised. features: [n, D], of any
    float dtype; labels: [n], 0 or 1. Raises DataError for features that are not finite numbers and where a
    label is missing, ModelError where it does not converge.

    By Newton's method with a line search (Boyd and Vandenberghe 2004, Convex Optimization, algorithm 9.5), in
    float64. Unlike L-BFGS its steps do not depend on the scale of a feature, and hidden states have a few
    that are hundreds of times the others. w lies in the span of the rows, so at most n + 1 unknowns.
    """
    x, y = _checked(features, labels)
    basis = None
    if len(x) < x.shape[1]:
        basis, r = torch.linalg.qr(x.T)  # x = r^T basis^T; the objective is the same in the basis
        x = r.T
    rows = torch.cat([x, x.new_ones(len(x), 1)], 1)
    ridge = torch.ones(rows.shape[1], dtype=x.dtype, device=x.device)
    ridge[-1] = 0
    value = lambda v: float(
        (ridge * v * v).sum() / 2 + C * torch.nn.functional.softplus(-y * (rows @ v)).sum()
    )
    at = torch.zeros_like(ridge)
    for _ in range(max_iter):
        wrong = torch.sigmoid(-y * (rows @ at))
        gradient = ridge * at - C * (rows.T @ (y * wrong))
        curvature = wrong * (1 - wrong)
        hessian = C * (rows.T * curvature) @ rows + torch.diag(ridge)
        hessian.diagonal().add_(1e-14 * hessian.diagonal().mean())  # of the intercept, where nothing is wrong
        step = -torch.linalg.solve(hessian, gradient)
        decrement = -float(gradient @ step)
        now = value(at)
        if not math.isfinite(decrement):
            break
        if decrement <= 1e-13 * (1 + now):
            at = at + step
            w = at[:-1] if basis is None else basis @ at[:-1]
            return w.cpu(), float(at[-1])
        length = 1.0
        while value(at + length * step) > now - 0.25 * length * decrement and length > 1e-9:
            length /= 2
        at = at + length * step
    raise ModelError(
        f"probe: {len(x)} rows of {features.shape[1]} features did not converge in {max_iter} steps; "
        "give more rows, or a direction as --probe vector.safetensors"
    )


def _checked(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(f64[n, D], y f64[n] of 1 and -1)"""
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        shapes = f"features of {tuple(features.shape)}, labels of {tuple(labels.shape)}"
        raise DataError(f"probe: {shapes}; a row of features for each label is needed")
    x = features.double()
    if not bool(x.isfinite().all()):
        row = int((~x.isfinite().all(1)).nonzero()[0])
        raise DataError(f"probe: the features of row {row} are not finite numbers; check the model's states")
    counts = [int((labels == one).sum()) for one in (0, 1)]
    if sum(counts) != len(labels) or not all(counts):
        text = f"{counts[0]} rows of label 0, {counts[1]} of label 1, {len(labels) - sum(counts)} of others"
        raise DataError(f"probe: {text}; rows of both labels are needed, and of no other")
    return x, labels.to(x.device).double() * 2 - 1


def best_strength(
    fold: Tensor,
    fitted: Callable[[Tensor, float], tuple[Tensor, float]],
    right: Callable[[tuple[Tensor, float], Tensor], float],
) -> float:
    """Which of STRENGTHS tells most of what it was not fitted on, by cross-validation (as scikit-learn's
    LogisticRegressionCV): with C = 1, as many states as they have features are told by what they happen to
    be. fold: i64[n], of `dealt`, all 0 for C = 1; fitted(bool[n], C): the regression of those items;
    right(that, bool[n]): the share of these items that it tells. Of equal ones the strongest penalty."""
    folds = range(int(fold.max()) + 1)
    if len(folds) == 1:
        return STRENGTHS[-1]
    told = [sum(right(fitted(fold != k, C), fold == k) for k in folds) for C in STRENGTHS]
    return STRENGTHS[int(np.argmax(told))]


def dealt(n: int, draw: np.random.Generator) -> Tensor:
    """i64[n]: a fold of each of n things; all 0 of too few."""
    return torch.from_numpy(draw.permutation(n) % (_FOLDS if n >= 2 * _FOLDS else 1))
