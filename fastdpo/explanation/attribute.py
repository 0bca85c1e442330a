"""Which neurons lower and which raise a model's projection on a direction: arithmetic on their means.

A neuron adds m v to the residual stream: m its activation, v its value vector. On a unit direction u that is
m q, q = v . u. As m alone depends on the token, the mean over tokens needs the mean of m only. Of a change
from (m, q) to (m', q')

    m' q' - m q = (m' - m) (q + q') / 2 + (m + m') / 2 (q' - q)

exactly: a part by the activation and a part by the value vector.

The classes are those of "How Does DPO Reduce Toxicity?" (arXiv 2411.06424, v1 and v3), where the direction is
one that shall fall. Here d, the direction that shall fall, is u where `towards` is "down" and -u where it is
"up". T neurons write along d (before), A neurons against it; P and N have a mean activation of at least 0, or
below it (before); + and - say that m moves away from 0, or towards and past it. A neuron's *reduction* is
what its projection on d falls by. The classes that lower it are TP-, TN+, AP+, AN-; TP+, TN-, AP-, AN+ raise
it. For "up" the letters are R (writes towards the rejected) for T and C (towards the chosen) for A.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fastdpo.errors import ConfigError, ModelError
from fastdpo.explanation.capture import Neurons
from fastdpo.files import durable

TOWARDS, DEFINITIONS = ("down", "up"), ("v1", "v3")
SHARES = (0.5, 0.75, 0.99)
# T or A, P or N, and whether the reduction is (v3), or would be at a fixed value vector (v1), above 0
_CLASSES = {"TP-": (1, 1, 1), "TN+": (1, 0, 1), "AP+": (0, 1, 1), "AN-": (0, 0, 1)}
_CLASSES |= {"TP+": (1, 1, 0), "TN-": (1, 0, 0), "AP-": (0, 1, 0), "AN+": (0, 0, 0)}
_MIRRORED = str.maketrans("TA", "RC")


@dataclass(frozen=True)
class Table:
    """A row a neuron, f64[n] (i64[n] the first two). `before`, `after`: the mean of what multiplies the value
    vector; `raw_*`: of the activation as it is, which patches set (the same but where a norm follows the
    MLP); `size_*`: of its absolute value; `firing_*`: the share of tokens where it is above 0. `q_*`: value
    vector . u; `cos`: of the value vector before with u, 0 where the vector is 0. Raises ModelError for
    columns of different lengths, and for what is not a finite number."""

    layer: np.ndarray
    neuron: np.ndarray
    cos: np.ndarray
    before: np.ndarray
    after: np.ndarray
    q_before: np.ndarray
    q_after: np.ndarray
    size_before: np.ndarray
    size_after: np.ndarray
    firing_before: np.ndarray
    firing_after: np.ndarray
    raw_before: np.ndarray
    raw_after: np.ndarray

    def __post_init__(self) -> None:
        for field in fields(self):
            column = np.asarray(getattr(self, field.name))
            if column.shape != np.shape(self.layer) or column.ndim != 1:
                shapes = f"{column.shape}, layer is of {np.shape(self.layer)}"
                raise ModelError(
                    f"neurons: the column {field.name} is of shape {shapes}; a row a neuron in each"
                )
            if not np.isfinite(column).all():
                at = int(np.flatnonzero(~np.isfinite(column))[0])
                where = f"layer {self.layer[at]}, neuron {self.neuron[at]}"
                raise ModelError(
                    f"neurons: {field.name} of {where} is {column[at]}; check the model's weights"
                )

    def __len__(self) -> int:
        return len(self.layer)

    @property
    def change(self) -> np.ndarray:
        """m' q' - m q: of the projection on u; f64[n]."""
        return self.after * self.q_after - self.before * self.q_before

    @property
    def activation_part(self) -> np.ndarray:
        """(m' - m) (q + q') / 2, f64[n]"""
        return (self.after - self.before) * (self.q_before + self.q_after) / 2

    @property
    def value_part(self) -> np.ndarray:
        """(m + m') / 2 (q' - q), f64[n]"""
        return (self.before + self.after) / 2 * (self.q_after - self.q_before)

    def reduction(self, towards: str) -> np.ndarray:
        """What each neuron's projection on d falls by, f64[n]."""
        return -_sign(towards) * self.change


@dataclass(frozen=True)
class Written:
    """What a layer's neurons write, as far as a unit direction u goes; f64[N] each."""

    q: Tensor  # v . u
    norm: Tensor  # |v|

    @classmethod
    def of(cls, vectors: Tensor, u: Tensor) -> "Written":
        """Of value vectors f64[N, D]."""
        return cls(vectors @ u, vectors.norm(dim=1))


def of_layer(layer: int, before: Neurons, after: Neurons, old: Written, new: Written) -> Table:
    """A layer's rows, of what its neurons did and what they write, before and after. The cosine of a neuron
    that writes nothing is 0. Raises ModelError where they are not as many."""
    columns = {
        "cos": old.q / torch.where(old.norm == 0, 1.0, old.norm),
        "before": before.through, "after": after.through,
        "q_before": old.q, "q_after": new.q,
        "size_before": before.size, "size_after": after.size,
        "firing_before": before.firing, "firing_after": after.firing,
        "raw_before": before.mean, "raw_after": after.mean,
    }  # fmt: skip
    count = len(before.mean)
    numbered = dict(layer=np.full(count, layer), neuron=np.arange(count))
    return Table(**numbered, **{name: _array(value) for name, value in columns.items()})


def _array(values: Tensor) -> np.ndarray:
    return values.detach().double().cpu().numpy()


def joined(tables: Sequence[Table]) -> Table:
    """The rows of all, in order."""
    columns = [field.name for field in fields(Table)]
    return Table(*(np.concatenate([getattr(table, name) for table in tables]) for name in columns))


def _sign(towards: str) -> int:
    """d = sign * u"""
    if towards not in TOWARDS:
        raise ConfigError(f"towards: {towards!r} is not one of {', '.join(TOWARDS)}")
    return 1 if towards == "down" else -1


def class_names(towards: str) -> list[str]:
    """The names of the eight classes: four that lower the projection on d, then four that raise it."""
    return [name if _sign(towards) == 1 else name.translate(_MIRRORED) for name in _CLASSES]


def classes(table: Table, towards: str, definition: str) -> np.ndarray:
    """Of each neuron its place in `class_names`, or -1 where it stood still; i64[n].

    Each definition takes the signs of cos and of m before (m = 0 counts as P, cos = 0 as A). "v1": and the
    sign of the change of m, whatever the value vector did. "v3": and the sign of the reduction itself."""
    if definition not in DEFINITIONS:
        raise ConfigError(f"groups: {definition!r} is not one of {', '.join(DEFINITIONS)}")
    toxic = _sign(towards) * table.cos > 0
    moved = np.where(toxic, table.before - table.after, table.after - table.before)
    lowers = moved if definition == "v1" else table.reduction(towards)
    out = np.full(len(table), -1)
    for number, (along, positive, falls) in enumerate(_CLASSES.values()):
        is_so = (toxic == along) & ((table.before >= 0) == positive)
        out[is_so & ((lowers > 0) if falls else (lowers < 0))] = number
    return out


def grouped(table: Table, towards: str, definition: str) -> list[dict]:
    """The eight classes, those that lower first: each with its `count`; the `sum` of its reductions; which of
    it is by `activation` and which by `value` vectors; its `share` of the gross reduction (of what is raised,
    of a class that raises; 0 where that is 0).

    `gross` is the sum of all reductions above 0 and `raised` of those below, whatever class they are in. In
    v3, and wherever value vectors stand still, that is the sum over the four classes, as in the papers.
    Elsewhere members of v1's classes may go against their class: `against` is what they add to the sum."""
    reduction, of = table.reduction(towards), classes(table, towards, definition)
    gross, raised = _gross_raised(reduction)
    parts = [-_sign(towards) * part for part in (table.activation_part, table.value_part)]
    out = []
    for number, (paper, (along, _, lowers)) in enumerate(_CLASSES.items()):
        mine, whole = reduction[of == number], gross if lowers else raised
        arrow = paper if definition == "v1" else paper[:2] + ("↓" if lowers else "↑")
        one = dict(name=class_names(towards)[number], paper=arrow, lowers=bool(lowers))
        one |= dict(toward="T" if along else "A", count=len(mine), sum=float(mine.sum()))
        one |= dict(share=float(mine.sum() / whole) if whole else 0.0)
        one |= dict(activation=float(parts[0][of == number].sum()), value=float(parts[1][of == number].sum()))
        out.append(one | dict(against=float(mine[(mine < 0) if lowers else (mine > 0)].sum())))
    return out


def _gross_raised(reduction: np.ndarray) -> tuple[float, float]:
    return float(reduction[reduction > 0].sum()), float(reduction[reduction < 0].sum())


def concentration(table: Table, towards: str) -> list[dict]:
    """How few neurons make 50, 75 and 99 % of the gross reduction: those with the largest first."""
    reduction = table.reduction(towards)
    running = np.cumsum(np.sort(reduction[reduction > 0])[::-1])
    enough = lambda share: int(np.searchsorted(running, share * running[-1])) + 1 if len(running) else 0
    return [dict(share=share, neurons=enough(share)) for share in SHARES]


def top(table: Table, towards: str, definition: str, n: int = 20) -> dict[str, list[dict]]:
    """{class: its n neurons that lower (raise) the projection on d the most}. `cos` and `change` are on u, so
    for "up" a neuron that lowers has a change above 0; `tokens` is left to be filled."""
    reduction, of = table.reduction(towards), classes(table, towards, definition)
    out = dict[str, list[dict]]()
    names = ("cos", "before", "after", "change", "firing_before", "firing_after")
    columns = {name: getattr(table, name) for name in names}
    for number, (name, (_, _, lowers)) in enumerate(zip(class_names(towards), _CLASSES.values())):
        mine = np.flatnonzero(of == number)
        first = mine[np.argsort(-reduction[mine] if lowers else reduction[mine], kind="stable")][:n]
        out[name] = [
            dict(layer=int(table.layer[i]), neuron=int(table.neuron[i]))
            | {key: float(column[i]) for key, column in columns.items()}
            | dict(tokens=[])
            for i in first
        ]
    return out


def by_layer(table: Table, towards: str) -> list[dict]:
    """Of each layer the sum of the reductions above 0 and of those below: `gross` and `raised` by layer."""
    reduction, out = table.reduction(towards), []
    for layer in np.unique(table.layer).tolist():
        lowered, raised = _gross_raised(reduction[table.layer == layer])
        out.append(dict(layer=layer, lowered=lowered, raised=raised))
    return out


def summary(table: Table, towards: str, definition: str, n: int = 20, bias: float = 0.0) -> dict:
    """The "neurons" of explain.json, but for the tokens of `top`. bias: the reduction by the last
    projections' bias, which is no neuron: it is in no other number here.
    net = gross + raised = activation + value."""
    reduction, sign = table.reduction(towards), -_sign(towards)
    gross, raised = _gross_raised(reduction)
    out = dict(definition=definition, towards=towards, neurons=len(table), gross=gross, raised=raised)
    out |= dict(lowering=int((reduction > 0).sum()), net=float(reduction.sum()), bias=bias)
    out |= dict(activation=float(sign * table.activation_part.sum()))
    out |= dict(value=float(sign * table.value_part.sum()))
    out |= dict(groups=grouped(table, towards, definition))
    out |= dict(still=int((classes(table, towards, definition) < 0).sum()))
    out |= dict(concentration=concentration(table, towards), top=top(table, towards, definition, n))
    return out | dict(by_layer=by_layer(table, towards))


def to_parquet(table: Table, path: Path, towards: str | None = None, definition: str = "v1") -> None:
    """Writes the whole table, or nothing of it, with each neuron's projections on u, its two parts, and,
    where `towards` says which way, its class ("still" for none). Raises ConfigError where it cannot be
    written."""
    columns = {field.name: getattr(table, field.name) for field in fields(table)}
    columns |= dict(projection_before=table.before * table.q_before)
    columns |= dict(projection_after=table.after * table.q_after)
    columns |= dict(activation_part=table.activation_part, value_part=table.value_part)
    if towards is not None:
        names = np.array([*class_names(towards), "still"])
        columns |= dict(group=names[classes(table, towards, definition)])
    part = durable.part_of(path)
    try:
        pq.write_table(pa.table(columns), part)
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"output: cannot write {path}: {error}; name another folder") from None
    finally:
        part.unlink(missing_ok=True)
