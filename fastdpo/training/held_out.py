"""How sure the held-out numbers are: what each held-out prompt adds to them, kept beside their means.

A number is a mean over pairs (or tokens), and pairs of one prompt are alike: a ranked row's share responses,
rows of the same prompt share what it asks. So a prompt is what counts as drawn at random. Of a ratio
r = sum(S_p) / sum(n_p) over P prompts, to first order r differs from its expectation by the mean over p of
P (S_p - r n_p) / N, N = sum(n_p) (Cochran 1977, Sampling Techniques, section 6). With

    v_p = r + P (S_p - r n_p) / N

mean(v) is r and std(v) / sqrt(P) its standard error, clustered by prompt (as Miller 2024, "Adding error bars
to evals", arXiv 2411.00640, section 2.2). Of two runs on the same rows the same of v - v' is that of their
difference, in pairs (section 4.2 there), far smaller, as most of what rows differ by is common to both.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.store.stored import facts_of
from fastdpo.moving import to_device
from fastdpo.objectives.seam import UNITS, Decomposable, Objective
from fastdpo.records import Groups, ResponseLogps
from fastdpo.training.metrics import Sums, add_kl, add_metrics

_OF_PAIRS = ("rewards/accuracies", "rewards/margins", "logps/accuracies", "accuracy", "margin")


class _Values(Sums):
    """What is added stays as it is."""

    def add(self, name: str, values: Tensor | float) -> None:
        assert isinstance(values, Tensor)
        self.tensors[name] = values


class Part(NamedTuple):
    """A mean: of values each of a response, which count as so many units (None: as one)."""

    values: Tensor
    of: Tensor  # i64[n]: the responses
    units: Tensor | None = None
    weight: float = 1.0  # where a number is a sum of several means


@torch.no_grad()
def parts_of(objective: Objective, logps: ResponseLogps, kl: bool) -> dict[str, list[Part]]:
    """{number: the means that it is the sum of}: the loss where it is a sum over pairs, tokens or responses
    (KTO's z0 and BCO's mean count as given; a mixture of experts' balance loss, which is no sum over rows, is
    left out), what pairs say, the KL where it is asked for."""
    values, out = _Values(), dict[str, list[Part]]()
    terms = objective.terms if isinstance(objective, Decomposable) else ()
    wheres = [UNITS[term.unit].responses(logps) for term in terms]
    if terms and all(map(len, wheres)):
        units = [logps.lengths[w] if t.unit == "chosen token" else None for t, w in zip(terms, wheres)]
        out["loss"] = [Part(t.each(logps), w, u, t.weight) for t, w, u in zip(terms, wheres, units)]
    add_metrics(values, objective, logps)
    for name in _OF_PAIRS:
        if name in values.tensors and len(logps.pairs):
            out[name] = [Part(values.tensors[name], logps.winner)]
    if kl:
        add_kl(values, logps)
        everyone = torch.arange(len(logps.lengths), device=logps.lengths.device)
        out["kl"] = [Part(logps.per_response(values.tensors["kl"]), everyone, logps.lengths)]
    return out


def prompts_of(groups: Groups) -> np.ndarray:
    """Of each response the number of its prompt, as they come, from 0; i64[R]."""
    facts, numbers = facts_of(groups), dict[bytes, int]()
    prompts = [numbers.setdefault(key, len(numbers)) for key in facts.prompt_key.tolist()]
    return np.repeat(prompts, facts.responses).astype(np.int64)


@torch.no_grad()
def by_prompt(objective: Objective, logps: ResponseLogps, groups: Groups, kl: bool) -> dict[str, list[float]]:
    """{number: v_p of each different prompt, in the order of the groups}, of the numbers of `parts_of`, where
    `logps` are of these groups."""
    prompt = prompts_of(groups)
    (of,) = to_device([torch.from_numpy(prompt)], logps.token_logp.device)
    count = int(prompt.max(initial=-1)) + 1
    out = {name: shares(parts, of, count) for name, parts in parts_of(objective, logps, kl).items()}
    rounded = lambda column: [float(f"{value:.6g}") for value in column]
    return dict(zip(out, map(rounded, torch.stack(list(out.values())).tolist()))) if out else {}


def shares(parts: list[Part], prompt: Tensor, n_prompts: int) -> Tensor:
    """v_p, f64[P], of a number; prompt: of each response its number, i64[R]."""
    each = [part.weight * _shares(part.values, prompt[part.of], part.units, n_prompts) for part in parts]
    return torch.stack(each).sum(0)


def _shares(values: Tensor, prompt: Tensor, units: Tensor | None, n_prompts: int) -> Tensor:
    units = torch.ones_like(prompt) if units is None else units
    nothing = torch.zeros(n_prompts, dtype=torch.float64, device=prompt.device)
    add = lambda some: nothing.index_add(0, prompt, some)
    total = units.double().sum()
    sums, counts = add(values.double()), add(units.double())
    mean = sums.sum() / total
    return mean + n_prompts * (sums - mean * counts) / total


def standard_error(values: Sequence[float] | np.ndarray) -> float | None:
    """Of the mean of these; None of fewer than two."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None
