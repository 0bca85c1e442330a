"""What of the training's effect comes back when the model before it is given some of what the model after it
has: neurons ablated, activations patched (by their means, or token by token), parts; and random sets."""

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastdpo.console.formatting import counted, gigabytes
from fastdpo.console.progress import make_progress
from fastdpo.data.packing import in_row_order, sizes_of
from fastdpo.data.store.stored import facts_of
from fastdpo.evaluation.answers import Answers, Sampling, answer
from fastdpo.evaluation.estimates import Estimate
from fastdpo.evaluation.kl import head_of
from fastdpo.explanation.attribute import Table
from fastdpo.explanation.measure import Ends, Pass, measure
from fastdpo.explanation.patch import Patch, patched, record
from fastdpo.explanation.places import Places
from fastdpo.explanation.result import Settings
from fastdpo.explanation.rows import Rows
from fastdpo.model.policy import Policy
from fastdpo.records import Groups, PreferenceGroup
from fastdpo.sampling.scorers import Scorer
from fastdpo.training.run import spread

ABLATED = (100, 200, 1000)  # neurons, as the papers
_MOST_BYTES = 4_000_000_000  # of records on disk
_KL_TOKENS = 512  # at most, of each pass
ALL_FOUR = "all four"
_QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Plan:
    """An intervention, or several alike of which the mean is told."""

    name: str
    what: str  # ablated, constant, token, parts; or random: as many neurons at random
    how: str  # of random ones, which of these the set is a control of; else the same as `what`
    group: str  # the set of neurons; of random ones, the set that they are as many as
    patches: tuple[Patch, ...]
    size: int = 0  # neurons
    ends: bool = False  # with the other model's final norm and lm_head


def plans(table: Table, members: Mapping[str, np.ndarray], sign: int, settings: Settings) -> Iterator[Plan]:
    """members: of each group that lowers what shall fall its neurons, bool[n]; sign: of the direction that
    shall fall, on the table's cosines."""
    total, draw = len(table.cos), np.random.default_rng(settings.seed)
    along = np.argsort(-sign * table.cos, kind="stable")
    along = along[sign * table.cos[along] > 0]
    sizes = sorted({min(k, len(along)) for k in ABLATED} - {0})
    along_what = "the rejected" if settings.towards == "up" else "the direction"  # what shall fall
    sets = [("ablated", f"{k:,} along {along_what}", along[:k]) for k in sizes]
    controlled = {group for _, group, _ in sets} | {next(iter(members)), ALL_FOUR}
    four = np.logical_or.reduce(list(members.values()))
    named = {**members, ALL_FOUR: four, "all neurons": np.ones(total, bool)}
    sets += [
        (how, group, np.flatnonzero(here)) for how in ("constant", "token") for group, here in named.items()
    ]
    for how, group, neurons in sets:
        if not len(neurons):
            continue
        make, suffix = _MAKE[how]
        yield Plan(f"{group}, {suffix}", how, how, group, (make(table, neurons),), len(neurons))
        if group in controlled:
            drawn = [draw.permutation(total)[: len(neurons)] for _ in range(settings.random_sets)]
            patches = tuple(make(table, some) for some in drawn)
            like = f"{len(neurons):,}" if how == "ablated" else f"like {group}"
            name = f"random {like}, {suffix}"
            yield Plan(name, "random", how, group, patches, len(neurons))


def part_plans() -> Iterator[Plan]:
    """Whole parts of all layers, token by token."""
    for name, patch in (("all MLPs", Patch(mlp=True)), ("all attentions", Patch(attention=True))):
        yield Plan(name, "parts", "parts", name, (patch,))
    whole = Patch(embedding=True, attention=True, mlp=True)
    yield Plan("everything", "parts", "parts", "everything", (whole,), ends=True)


def _of_layers(table: Table, neurons: np.ndarray, values: np.ndarray | None) -> Patch:
    neurons = np.sort(neurons)
    layers = range(int(table.layer.max()) + 1)
    cut = [neurons[table.layer[neurons] == layer] for layer in layers]
    which = tuple(torch.from_numpy(table.neuron[some].astype(np.int64)) for some in cut)
    if values is None:
        return Patch(neurons=which)
    return Patch(neurons=which, values=tuple(torch.from_numpy(values[some]) for some in cut))


_MAKE: dict[str, tuple[Callable[[Table, np.ndarray], Patch], str]] = {
    "ablated": (lambda table, some: _of_layers(table, some, np.zeros(len(table.cos))), "off"),
    "constant": (lambda table, some: _of_layers(table, some, table.raw_after), "means"),
    "token": (lambda table, some: _of_layers(table, some, None), "tokens"),
}


def within_room(
    groups: Groups, count: int, each: int, folder: Path, share: bool
) -> tuple[list[PreferenceGroup], str]:
    """(so many groups of different prompts, or as there is room in a folder for records of `each` bytes a
    token; what a reader has to know of that). share: whether packs have each prompt once; else all of their
    rows are as wide as the widest."""
    some = list(spread(groups, count))
    shared, responses, width = sizes_of(facts_of(some))[:, :3].T
    tokens = shared.cumsum() if share else responses.cumsum() * np.maximum.accumulate(width)
    room = min(_MOST_BYTES, shutil.disk_usage(folder).free // 2)
    fits = max(1, int((tokens * each <= room).sum()))
    if fits >= len(some):
        return some, ""
    text = (
        f"values are patched on {counted(fits, 'prompt')} and not {len(some)}: what the model after training "
    )
    return some[:fits], f"{text}does on more of them would take over {gigabytes(room)} of disk"


@dataclass
class Causes:
    """The rows that patches are tried on, and what the model after the training makes of them."""

    rows: Rows
    direction: Tensor  # f64[D]
    folder: Path  # of the records
    tokenizer: Any
    sampling: Sampling | None
    seed: int
    console: Console
    max_tokens: int
    after: Pass | None = None
    records: list[Path] = field(default_factory=list)
    ends: Ends | None = None
    answers: dict[str, Answers] = field(default_factory=dict)

    @property
    def at(self) -> Tensor:
        return self.rows.some_tokens(_KL_TOKENS, self.seed)

    def parts(self, policy: Policy):
        return in_row_order(self.rows.groups, self.max_tokens, policy.share)

    def see_after(self, policy: Policy, places: Places) -> None:
        """Records what the model after the training does on these rows."""
        self.after = measure(policy, places, self.parts(policy), self.direction, self.at)
        self.records = record(policy, places, self.parts(policy), self.folder, self.console, "after")
        self.ends = Ends(copy.deepcopy(places.norm), head_of(policy))
        self._answer("after", policy)

    def run(self, policy: Policy, places: Places, planned: Sequence[Plan]) -> dict[str, list[Pass]]:
        """{"before", "after" and each plan's name: its passes}, of the model before the training."""
        parts, out = self.parts(policy), dict[str, list[Pass]]()
        with make_progress(self.console) as bar:
            total = (1 + sum(len(plan.patches) for plan in planned)) * len(parts)
            task = bar.add_task("patching", total=total, unit="packs", info="")
            how: dict[str, Any] = dict(direction=self.direction, at=self.at)
            how["each"] = lambda: bar.update(task, advance=1)
            out["before"] = [measure(policy, places, parts, **how)]
            for plan in planned:
                ends = self.ends if plan.ends else None
                out[plan.name] = []
                for patch in plan.patches:
                    records = self.records if patch.values is None else ()
                    found = measure(policy, places, parts, **how, patch=patch, records=records, ends=ends)
                    out[plan.name].append(found)
        assert self.after is not None
        self._answer("before", policy)
        for plan in planned if self.sampling is not None else ():
            for number, patch in enumerate(plan.patches):
                if patch.values is not None:  # of recorded tokens there are none while a model answers
                    with patched(places, patch, rows=None, recorded=None):
                        self._answer(f"{plan.name}#{number}", policy)
        return out | {"after": [self.after]}

    def _answer(self, name: str, policy: Policy) -> None:
        if self.sampling is not None:
            self.answers[name] = answer(policy, self.tokenizer, self.sampling, _QUIET, name)[0]

    def judge(self, scorer: Scorer, name: str) -> dict[str, list[Estimate]]:
        """{name of a row: the score of its answers, of each pass}"""
        out: dict[str, list[Estimate]] = {}
        for whose, some in self.answers.items():
            some.judge(scorer, name, self.console, whose.split("#")[0])
            out.setdefault(whose.split("#")[0], []).append(some.numbers()["samples/score"])
        return out
