"""The rows in columns: which responses are pairs, what tokens are scored, where in a response each stands."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.store.stored import facts_of
from fastdpo.evaluation.estimates import Estimate, estimate
from fastdpo.records import Groups
from fastdpo.training.held_out import Part, prompts_of


@dataclass(frozen=True)
class Rows:
    """Of groups with pairs. Responses and scored tokens are in the order of the groups."""

    groups: Groups

    @cached_property
    def pairs(self) -> Tensor:
        """i64[P, 2]: (chosen, rejected), as indices of responses."""
        return torch.from_numpy(np.stack(facts_of(self.groups).of_pairs, 1).astype(np.int64))

    @cached_property
    def prompt(self) -> Tensor:
        """i64[R]: of each response the number of its prompt."""
        return torch.from_numpy(prompts_of(self.groups))

    @cached_property
    def lengths(self) -> Tensor:
        """i64[R]: scored tokens of each response."""
        return torch.from_numpy(facts_of(self.groups).scored.astype(np.int64))

    @cached_property
    def cu_resp(self) -> Tensor:
        """i64[R+1]"""
        return torch.cat([torch.zeros(1, dtype=torch.int64), self.lengths.cumsum(0)])

    @cached_property
    def response(self) -> Tensor:
        """i64[M]: of each scored token its response."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)

    @cached_property
    def position(self) -> Tensor:
        """i64[M]: its place among the scored tokens of its response, from 0."""
        return torch.arange(len(self.response)) - self.cu_resp[self.response]

    @cached_property
    def target(self) -> Tensor:
        """i64[M]: its id."""
        ids = [r.ids[r.target_mask] for group in self.groups for r in group.responses]
        return torch.from_numpy(np.concatenate(ids))

    @cached_property
    def chosen(self) -> Tensor:
        """i64[.]: responses that some pair prefers."""
        return self.pairs[:, 0].unique()

    def sums(self, per_token: Tensor) -> Tensor:
        """f64[R] of [M]."""
        return torch.segment_reduce(per_token.double(), "sum", offsets=self.cu_resp)

    def of_pairs(self, per_response: Tensor) -> Tensor:
        """Chosen less rejected, [P] of [R]."""
        return per_response[self.pairs[:, 0]] - per_response[self.pairs[:, 1]]

    def mean(self, values: Tensor, of: Tensor, units: Tensor | None = None) -> Estimate:
        """Of values each of a response `of`, that count as `units`; its error is clustered by prompt."""
        found = estimate([Part(values.double(), of, units)], self.prompt)
        assert found is not None
        return found

    def mean_of_pairs(self, values: Tensor) -> Estimate:
        """Of [P]."""
        return self.mean(values, self.pairs[:, 0])

    def mean_of_tokens(self, values: Tensor, at: Tensor) -> Estimate:
        """Of [K] values at these scored tokens, i64[K], rising."""
        count = torch.bincount(self.response[at], minlength=len(self.lengths))
        total = torch.zeros(len(count), dtype=torch.float64)
        total.index_add_(0, self.response[at], values.double())
        there = count.nonzero()[:, 0]
        return self.mean(total[there], there, count[there])

    def some_tokens(self, most: int, seed: int) -> Tensor:
        """i64[K]: at most so many scored tokens, drawn from all, rising."""
        total = len(self.response)
        drawn = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:most]
        return drawn.sort().values
