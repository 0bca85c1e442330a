"""What the attention benchmark runs on, in the three forms that trainers give it, and the truth in fp64.

One set of random q, k, v on shared-prompt rows is the source; separate and padded rows hold copies of it,
so that every contender computes the same numbers and can be held against the same truth. Letters: T rows
of the shared form, H heads, Hk key/value heads, d a head's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from benchmarks.flops import USEFUL, How, work
from benchmarks.inputs import groups_of, random_rows
from benchmarks.lengths import PairLengths
from fastdpo.data.packing import pack
from fastdpo.records import PrefixLayout

PADDED_PAIRS = 8  # a batch of the padded form, in order
FORMS = ("shared", "separate", "padded")


@dataclass(frozen=True)
class Heads:
    query: int
    key: int
    size: int

    def __str__(self):
        return f"{self.query}/{self.key} heads of {self.size}"


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """The q, k, v and output gradient of one layer and microbatch, and where each form keeps its rows."""

    lengths: Sequence[PairLengths]
    heads: Heads
    source: dict[str, Tensor]  # "q", "grad" [T, H, d]; "k", "v" [T, Hk, d]
    shared: PrefixLayout
    separate: PrefixLayout  # one segment a row, nothing gathered
    copy_of: Tensor  # i64[rows of the separate form]: the shared row each one is
    padded_at: Tensor  # i64[as many]: its place in the padded form
    batches: tuple[tuple[int, int], ...]  # of the padded form: (rows, width)

    @classmethod
    def make(cls, lengths: Sequence[PairLengths], heads: Heads, dtype: torch.dtype, device: str):
        """Normal numbers; the gradient of a shared row is split evenly among its copies."""
        groups = groups_of(random_rows(lengths, 100))
        shared = pack(groups).to(device)
        alone = [one for group in groups for one in _apart(group)]
        draw = torch.Generator(device).manual_seed(0)
        normal = lambda n: torch.randn(
            shared.input_tokens, n, heads.size, generator=draw, device=device, dtype=dtype
        )
        source = dict(q=normal(heads.query), k=normal(heads.key), v=normal(heads.key))
        batches, padded_at = _padded(lengths)
        return cls(
            lengths=lengths,
            heads=heads,
            source=source | {"grad": normal(heads.query)},
            shared=shared.layout,
            separate=pack(alone).to(device).layout,
            copy_of=torch.from_numpy(_copies(lengths)).to(device),
            padded_at=torch.from_numpy(padded_at).to(device),
            batches=batches,
        )

    def form(self, name: str) -> dict[str, Tensor]:
        """q, k, v and grad in one of FORMS: flat rows, padding is 0."""
        if name == "shared":
            return self.source
        copies = torch.bincount(self.copy_of)[self.copy_of]
        out = {key: rows[self.copy_of] for key, rows in self.source.items()}
        out["grad"] = out["grad"] / copies[:, None, None].to(out["grad"].dtype)
        if name == "separate":
            return out
        size = sum(rows * width for rows, width in self.batches)
        return {
            key: rows.new_zeros(size, *rows.shape[1:]).index_copy(0, self.padded_at, rows)
            for key, rows in out.items()
        }

    def as_separate(self, name: str, rows: Tensor) -> Tensor:
        """Rows of an output or gradient of a form, as the separate form has them (shared: repeated)."""
        if name == "separate":
            return rows
        return rows[self.copy_of if name == "shared" else self.padded_at]

    def as_shared(self, name: str, grad: Tensor) -> Tensor:
        """An input's gradient, fp64 and summed over the copies of each row: [T, ...]."""
        if name == "shared":
            return grad.double()
        rows = self.as_separate(name, grad).double()
        return rows.new_zeros(len(self.source["q"]), *rows.shape[1:]).index_add_(0, self.copy_of, rows)

    @cached_property
    def flops(self) -> int:
        """Of a forward of the shared form: 4 d H a (query, key) pair; the backward takes twice as many."""
        return 4 * self.heads.size * self.heads.query * work(self.lengths, USEFUL).attended

    @cached_property
    def flops_of_separate(self) -> int:
        """The same of separate rows, without their last tokens as here."""
        shorter = [PairLengths(P, C - 1, R - 1) for P, C, R in self.lengths]
        return 4 * self.heads.size * self.heads.query * work(shorter, How(shared_prompt=False)).attended

    def least_bytes(self, mode: str) -> int:
        """What any attention on shared rows must move: q, k, v in and out's rows out; with a backward
        q, k, v, out and its gradient in, and three gradients out."""
        T, size = len(self.source["q"]), self.source["q"].element_size()
        query, key = T * self.heads.query * self.heads.size, T * self.heads.key * self.heads.size
        forward = 2 * query + 2 * key
        backward = (3 * query + 2 * key) + (query + 2 * key)
        return size * (forward if mode == "forward" else forward + backward)


def _apart(group):
    """A group's responses as groups of their own."""
    return [replace(group, responses=(r,), pairs=()) for r in group.responses]


def _copies(lengths) -> np.ndarray:
    """For each row of the separate form (prompt, response, prompt, response, ...) its shared row."""
    out, base = [], 0
    for P, *responses in lengths:
        prompt, start = np.arange(base, base + P), base + P
        for R in responses:
            out += [prompt, np.arange(start, start + R - 1)]
            start += R - 1
        base = start
    return np.concatenate(out)


def _padded(lengths) -> tuple[tuple, np.ndarray]:
    """((rows, width) of each batch, the place of each row of the separate form)."""
    batches, places, base = [], [], 0
    for i in range(0, len(lengths), PADDED_PAIRS):
        widths = [P + R - 1 for P, *responses in lengths[i : i + PADDED_PAIRS] for R in responses]
        batches.append((len(widths), max(widths)))
        for n in widths:
            places.append(np.arange(base, base + n))
            base += max(widths)
    return tuple(batches), np.concatenate(places)


class Truth:
    """The output and the gradients of q, k, v in fp64, row by row as attention is defined."""

    def __init__(self, inputs: AttentionInputs):
        self.inputs = inputs
        leaves = [inputs.source[key].double().requires_grad_() for key in "qkv"]
        grad = inputs.form("separate")["grad"].double()
        self.out = torch.cat([self._row(at, g, leaves) for at, g in self._rows(grad)])
        self.grads = dict(zip("qkv", (leaf.grad for leaf in leaves)))

    def _rows(self, grad):
        sizes = [P + R - 1 for P, *responses in self.inputs.lengths for R in responses]
        return zip(self.inputs.copy_of.split(sizes), grad.split(sizes))

    def _row(self, at, grad, leaves):
        """softmax(q k' / sqrt(d)) v of one row, and its share of the gradients."""
        group = self.inputs.heads.query // self.inputs.heads.key
        q, k, v = (leaf[at] for leaf in leaves)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / self.inputs.heads.size**0.5
        future = torch.ones(len(at), len(at), dtype=torch.bool, device=at.device).triu(1)
        out = torch.einsum("hij,jhd->ihd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
        out.backward(grad)
        return out.detach()

    def errors(self, form: str, out: Tensor, leaves: dict[str, Tensor]) -> dict[str, float]:
        """||got - truth|| / ||truth|| of the output and, where there are any, of the gradients."""
        relative = lambda got, truth: ((got.double() - truth).norm() / truth.norm()).item()
        found = {"out": relative(self.inputs.as_separate(form, out), self.out)}
        for key, truth in self.grads.items():
            if leaves[key].grad is not None:
                found[f"d_{key}"] = relative(self.inputs.as_shared(form, leaves[key].grad), truth)
        return found
