"""Reward against KL, and a number over seeds: what tables and plots of learning are made of."""

from statistics import mean, stdev

import numpy as np

Points = list[tuple[float, float]]  # (KL, reward)


def pareto(points: Points) -> Points:
    """The points that no other beats in reward at a lower or equal KL, by KL."""
    best, kept = -np.inf, []
    for kl, reward in sorted(points, key=lambda p: (p[0], -p[1])):
        if reward > best:
            best = reward
            kept.append((kl, reward))
    return kept


def reward_at(points: Points, kl: float) -> float | None:
    """The most reward for at most this KL, between the frontier's points by a straight line, which mixtures
    of the two models reach (KL is convex); None below the lowest and above the highest KL of all points."""
    x, y = zip(*pareto(points))
    return float(np.interp(kl, x, y)) if x[0] <= kl <= max(p[0] for p in points) else None


def spread(values: list[float], sign: bool = False) -> str:
    """Mean, standard deviation over seeds and how many of them there are."""
    if not values:
        return "-"
    head = f"{mean(values):+.3f}" if sign else f"{mean(values):.3f}"
    return f"{head} ± {stdev(values) if len(values) > 1 else 0:.3f} ({len(values)})"
