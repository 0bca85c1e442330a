"""One pass of a model over rows: means of its neurons and of what enters its residual stream, and what the
pass gives for each scored token. Sums are fp64, and only over rows that predict a scored token."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from rich.console import Console
from torch import Tensor

from fastdpo.console.progress import make_progress
from fastdpo.data.packing import in_row_order
from fastdpo.errors import ModelError
from fastdpo.explanation.hooks import FINAL, hooks
from fastdpo.explanation.norms import Affine, affine_of
from fastdpo.explanation.places import Layer, Places, last_bias
from fastdpo.model.policy import Policy
from fastdpo.records import Groups, PackedGroups

_ROWS = 1024  # that are fp64 at once


@dataclass(frozen=True, eq=False)
class Neurons:
    """The means of a layer's N neurons over M scored rows, f64[N] each, on the CPU."""

    mean: Tensor  # of the activation m
    through: Tensor  # of m / rms of the MLP's output where a norm follows the MLP, or else `mean` itself
    size: Tensor  # of |m|
    firing: Tensor  # the share of rows where m > 0


@dataclass(frozen=True, eq=False)
class Captured:
    """Means over the scored rows, f64 on the CPU. final = embedding + the sums of attention and of mlp; of a
    dense layer mlp = through @ value_vectors + bias."""

    neurons: list[Neurons] | None  # a layer each; None: some layer is a mixture of experts
    embedding: Tensor  # [D]
    attention: Tensor  # [L, D]
    mlp: Tensor  # [L, D]
    bias: Tensor  # [L, D]: the part of mlp that no neuron writes; 0 where there is no bias
    final: Tensor  # [D]: the residual that enters the final norm
    rows: int  # M


@dataclass(frozen=True, eq=False)
class Seen:
    """What the model gave for the scored tokens, on the CPU."""

    hidden: Tensor  # [M, D] in the model's dtype: final states, normed
    residual: Tensor  # f32[R, D]: of each response the mean state that enters the final norm
    state: Tensor  # f32[R, D]: of each response the mean of hidden
    token_logp: Tensor  # f32[M]
    cu_resp: Tensor  # i64[R + 1]: bounds of the responses in M


@torch.no_grad()
def capture(
    policy: Policy,
    places: Places,
    groups: Groups,
    *,
    max_tokens: int = 8192,
    console: Console | None = None,
    label: str = "activations",
) -> tuple[Captured, Seen]:
    """The means and what was seen, in one pass over groups in packs of at most `max_tokens` tokens; responses
    in the groups' order. Memory: the model, three f64 a neuron, and the scored tokens' states on the CPU.

    Raises ModelError where there are no groups, where activations are no numbers, and where a part
    has not as many rows as the pack.
    """
    if not len(groups):
        raise ModelError(f"{type(policy.core).__name__}: there are no rows to look at; give some")
    sums, seen = Sums(policy, places), []
    parts = in_row_order(groups, max_tokens, policy.share)
    with capturing(places, sums), make_progress(console or Console(quiet=True)) as bar:
        task = bar.add_task(label, total=len(parts), unit="packs", info="")
        for part in parts:
            batch = policy.pack(part).to(policy.device)
            sums.begin(batch)
            seen.append(see(policy, places, batch))
            sums.end(batch)
            bar.update(task, advance=1)
    return sums.means(), joined(seen)


@torch.no_grad()
def see(policy: Policy, places: Places, batch: PackedGroups) -> Seen:
    """What a model gives for one pack on its device, under whatever patches are on."""
    final: list[Tensor] = []

    def forward() -> tuple[Tensor, Tensor]:
        hidden = policy.hidden(batch)[batch.score_row].to(policy.dtype)
        return hidden, policy.head_logp(hidden, batch.target)

    with hooks() as on:
        on.before(places.norm, FINAL, lambda x: final.append(x[batch.score_row]))
        hidden, logp = policy.inside(forward)
    mean = partial(_response_means, cu_resp=batch.cu_resp)
    on_cpu = (hidden, mean(final[-1]), mean(hidden), logp, batch.cu_resp)
    return Seen(*(some.cpu() for some in on_cpu))


def _response_means(rows: Tensor, cu_resp: Tensor) -> Tensor:
    """f32[R, D]: the means of each response's rows."""
    out = [torch.segment_reduce(some.double(), "sum", offsets=cu_resp) for some in rows.split(1024, 1)]
    return (torch.cat(out, 1) / cu_resp.diff().clamp(min=1)[:, None]).float()


def joined(seen: Sequence[Seen]) -> Seen:
    """Several packs' as one."""
    hidden, residual, state, logp = (
        torch.cat([getattr(one, name) for one in seen])
        for name in ("hidden", "residual", "state", "token_logp")
    )
    counts = torch.cat([one.cu_resp.diff() for one in seen])
    return Seen(hidden, residual, state, logp, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))


@contextmanager
def capturing(places: Places, sums: "Sums") -> Iterator[None]:
    """Inside, every forward adds to `sums`, between its begin and end. Off again whatever happens."""
    with hooks() as on:
        on.before(places.first, "layer 0", partial(sums.add, "embedding", 0))
        for number, layer in enumerate(places.layers):
            where = f"layer {number}: the"
            on.after(layer.attention, f"{where} attention", partial(sums.add, "attention", number))
            if not places.experts and layer.last is not None:
                on.before(layer.last, f"{where} neurons", partial(sums.add_neurons, number))
                if layer.post_norm is not None:
                    on.before(layer.post_norm, f"{where} norm", partial(sums.take_output, number))
            on.after(layer.mlp, f"{where} MLP", partial(sums.add_mlp, number))
        on.before(places.norm, FINAL, partial(sums.add, "final", 0))
        yield


class Sums:
    """Sums over the scored rows of the packs so far, f64 on the model's device."""

    def __init__(self, policy: Policy, places: Places) -> None:
        self.places, self.device, self.name = places, policy.device, type(policy.core).__name__
        self.count = 0
        self._totals: dict[tuple[str, int], Tensor] = {}  # (what, layer): f64[D] or f64[N]
        self._batch: dict[tuple[str, int], Tensor] = {}  # likewise, of the pack that is going on
        self._m: Tensor | None = None  # of the MLP that is going on, where a norm follows it
        self._out: Tensor | None = None
        D = policy.head_size[1]
        self._norms: list[Affine | None] = [self._affine(layer, D) for layer in places.layers]

    def _affine(self, layer: Layer, D: int) -> Affine | None:
        if layer.post_norm is None or self.places.experts:
            return None
        found = affine_of(layer.post_norm, D)
        return Affine(found.factor.to(self.device), found.bias.to(self.device), found.centred)

    def begin(self, batch: PackedGroups) -> None:
        """Before a pack's forward."""
        self._rows, self._width = batch.score_row, batch.input_ids.numel()

    def end(self, batch: PackedGroups) -> None:
        """After it. Raises ModelError where what was summed is not finite; its sums are then left out."""
        found = list(self._batch)
        bad = torch.stack([self._batch[key].isfinite().all() for key in found]).logical_not().tolist()
        if any(bad):  # in the order of the forward: the first is the cause
            what, layer = found[bad.index(True)]
            where = what if what in ("embedding", "final") else f"layer {layer}: {what}"
            raise ModelError(
                f"{self.name}: {where}: activations are not finite (rows {batch.some_rows}); the weights may "
                "be broken, or try dtype: fp32"
            )
        for key, value in self._batch.items():
            self._totals[key] = self._totals[key] + value if key in self._totals else value
        self.count += len(batch.score_row)

    def _taken(self, x: Tensor, what: str, layer: int) -> Tensor:
        if len(x) != self._width:
            raise ModelError(
                f"{self.name}: layer {layer}: {what} has {len(x)} rows in a pack of {self._width} tokens; "
                "use a smaller max_tokens, or leave tiled_mlp out"
            )
        return x[self._rows]

    def add(self, what: str, layer: int, x: Tensor) -> None:
        """A part's output [T, D]."""
        scale = self.places.scale if what in ("attention", "mlp") else 1.0
        self._batch[what, layer] = scale * _sum(self._taken(x, what, layer), lambda rows: rows)

    def add_neurons(self, layer: int, x: Tensor) -> None:
        """What enters the last projection [T, N]."""
        m = self._taken(x, "neurons", layer)
        self._batch["neurons", layer] = _sum(m, lambda rows: rows)
        self._batch["size", layer] = _sum(m, lambda rows: rows.abs())
        self._batch["firing", layer] = _sum(m, lambda rows: rows > 0)
        if self.places.layers[layer].post_norm is not None:
            self._m = m

    def take_output(self, layer: int, x: Tensor) -> None:
        """What enters the norm after the MLP [T, D]."""
        self._out = self._taken(x, "the MLP's output", layer)

    def add_mlp(self, layer: int, x: Tensor) -> None:
        """What the MLP adds [T, D]; of one before a norm its neurons by each token's rms too."""
        self.add("mlp", layer, x)
        norm = self._norms[layer]
        if norm is None:
            return
        assert self._m is not None and self._out is not None
        inverse = _inverse_rms(norm, self._out, self._taken(x, "mlp", layer))
        total = self._m.new_zeros(self._m.shape[1], dtype=torch.float64)
        for rows, each in zip(self._m.split(_ROWS), inverse.split(_ROWS)):
            total += each @ rows.double()
        self._batch["through", layer], self._batch["rms", layer] = total, inverse.sum()
        self._m = self._out = None

    def means(self) -> Captured:
        """Over all packs so far."""
        L = len(self.places.layers)
        mean = lambda what, layer=0: (self._totals[what, layer] / self.count).cpu()
        stacked = lambda what: torch.stack([mean(what, layer) for layer in range(L)])
        neurons = None
        if not self.places.experts:
            neurons = [self._neurons(mean, layer) for layer in range(L)]
        bias = torch.stack([self._bias(mean, layer) for layer in range(L)])
        parts = (mean("embedding"), stacked("attention"), stacked("mlp"), bias, mean("final"))
        return Captured(neurons, *parts, self.count)

    def _neurons(self, mean: Callable[..., Tensor], layer: int) -> Neurons:
        m = mean("neurons", layer)
        through = mean("through", layer) if ("through", layer) in self._totals else m
        return Neurons(m, through, mean("size", layer), mean("firing", layer))

    def _bias(self, mean: Callable[..., Tensor], number: int) -> Tensor:
        """f64[D]"""
        layer, scale, norm = self.places.layers[number], self.places.scale, self._norms[number]
        bias = None if layer.last is None else last_bias(layer, scale)
        if bias is None:
            bias = torch.zeros_like(mean("mlp", number))
        return bias if norm is None else mean("rms", number) * bias + scale * norm.bias.cpu()


def _sum(rows: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """f64[width]: the sum of a function of rows [M, width], some rows at a time: it makes a copy of them."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for some in rows.split(_ROWS):
        total += of(some).sum(0, dtype=torch.float64)
    return total


def _inverse_rms(norm: Affine, entering: Tensor, leaving: Tensor) -> Tensor:
    """f64[M]: what the norm multiplied each token by, 1 / sqrt(mean(y^2) + its epsilon), by least squares
    between factor * y and what it gave: no epsilon to know, and as much rounding as the model had. 0 where
    the norm got nothing but 0."""
    out = []
    for y, given in zip(entering.split(_ROWS), leaving.split(_ROWS)):
        y = y.double()
        y = norm.factor * (y - y.mean(-1, keepdim=True) if norm.centred else y)
        length = y.square().sum(-1)
        found = (y * (given.double() - norm.bias)).sum(-1) / length
        out.append(torch.where(length == 0, 0.0, found))
    return torch.cat(out)
