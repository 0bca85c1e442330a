"""How strongly the probe is held back: chosen by what it was not fitted on."""

import numpy as np
import torch

from fastdpo.explanation.logistic import STRENGTHS, best_strength, dealt, fit


def noisy(n, D, signal, seed=0):
    """Two labels that differ along the first feature, the largest, not by enough; in many of noise."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    x = torch.randn(n, D, generator=draw, dtype=torch.float64)
    x[:, 0] = 10 * (x[:, 0] + signal * (2 * labels - 1))
    return x, labels


def chosen(x, labels, seed=0):
    right = lambda found, some: float(((x[some] @ found[0] + found[1] > 0) == labels[some]).double().mean())
    fold = dealt(len(x), np.random.default_rng(seed))
    return best_strength(fold, lambda some, C: fit(x[some], labels[some], C), right)


def test_a_few_rows_of_many_noisy_features_are_held_back():
    x, labels = noisy(80, 300, 1.0)
    C = chosen(x, labels)
    new, theirs = noisy(4000, 300, 1.0, seed=1)
    right = lambda found: float(((new @ found[0] + found[1] > 0) == theirs).double().mean())
    assert C < 1 and right(fit(x, labels, C)) >= right(fit(x, labels, 1.0))


def test_equal_ones_take_the_strongest_penalty_and_few_rows_none():
    calls = []
    told = best_strength(dealt(16, np.random.default_rng(0)), lambda some, C: calls.append(C), lambda *_: 0.5)
    assert told == STRENGTHS[0] and sorted(set(calls)) == list(STRENGTHS)
    assert best_strength(dealt(7, np.random.default_rng(0)), None, None) == 1.0  # nothing is fitted


def test_what_is_judged_was_not_fitted_on():
    fold = dealt(20, np.random.default_rng(3))
    seen = []
    best_strength(fold, lambda some, C: some, lambda fitted, some: seen.append((fitted, some)) or 0.0)
    for fitted, judged in seen:
        assert torch.equal(fitted, ~judged) and judged.any()
    assert torch.stack([judged for _, judged in seen[:4]]).sum(0).eq(1).all()
