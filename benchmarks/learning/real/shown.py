"""Plots of a grid's record."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.frontiers import Points, pareto
from benchmarks.learning.plots import Curve, lines
from benchmarks.tables.learning_blocks import BY_REWARD, by_share, points_of


def draw(stem: str, record: dict, folder: Path) -> list[Path]:
    """The frontiers, and accuracy over the share of flipped pairs."""
    paths = []
    for study, title in BY_REWARD.items():
        points = points_of(record, study)
        if points:
            parts = (f"{stem}_{study}", f"Reward and KL: {title}", "KL(policy || start), nats an answer")
            curves = [_frontier(arm, by_seed) for arm, by_seed in points.items()]
            paths += lines(*parts, "VADER's compound score", curves, folder)
    for source in ("sentiment", "hh"):
        if arms := by_share(record, source):
            curves = [_over_shares(arm, of) for arm, of in arms.items()]
            parts = (f"{stem}_noise_{source}", f"Clean held-out pairs of {source}", "pairs flipped, %")
            paths += lines(*parts, "accuracy", curves, folder)
    return paths


def _frontier(arm: str, by_seed: dict[int, Points]) -> Curve:
    """Over the KLs that all seeds reach."""
    x = np.linspace(0, min(max(kl for kl, _ in points) for points in by_seed.values()), 60)
    return Curve(arm, x, np.array([np.interp(x, *zip(*pareto(points))) for points in by_seed.values()]))


def _over_shares(arm: str, of: dict[str, list[float]]) -> Curve:
    seeds = min(map(len, of.values()))
    percent: Callable[[str], float] = lambda share: float(share.removesuffix("%"))
    return Curve(arm, [percent(s) for s in of], np.array([values[:seeds] for values in of.values()]).T)
