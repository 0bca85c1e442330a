"""Before and after: which two models, of what run, and one of them at a time with its weights."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers.initialization import no_init_weights

from fastdpo.config.keys import FIELDS, from_values
from fastdpo.config.reading import read_yaml
from fastdpo.data.load import DataSpec, load_data
from fastdpo.data.store.stored import facts_of, taken
from fastdpo.errors import ConfigError, ModelError
from fastdpo.evaluation.evaluate import collect
from fastdpo.evaluation.models import Named, alike, config_of, loaded, named, reference_of
from fastdpo.explanation.result import Settings
from fastdpo.model.adapters import find_start
from fastdpo.model.loading import load_model_config
from fastdpo.model.policy import Policy
from fastdpo.model.source import auto_class
from fastdpo.records import Groups
from fastdpo.training.job import job_of

_DEMO = ".fastdpo-demo"
_WAY_OUT = "name both models, as in `fastdpo explain BEFORE AFTER --data rows.jsonl`"


def named_models(settings: Settings) -> tuple[Named, Named]:
    """(before, after). Raises ConfigError or ModelError where either is not there, where nobody knows what a
    model was trained from, and where their weights are of other shapes."""
    after_name = settings.after
    if (Path(after_name) / _DEMO).exists():
        after_name = str(Path(after_name) / "dpo")
    after = named(after_name, "after", **settings.keys())
    if after.spec.pure_bf16 and load_model_config(after.spec).dtype == torch.float32:
        after = named(
            after_name, "after", **settings.keys(), pure_bf16=False
        )  # or a small change is rounded away
    before = (
        named(settings.before, "before", **alike(after))
        if settings.before
        else reference_of(after, None, "before", _WAY_OUT)
    )
    if before is None:
        raise ConfigError(
            f"before: nothing here says what {after.name} was trained from; name both models, as in "
            f"`fastdpo explain BEFORE {after.name} --data rows.jsonl`"
        )
    if not after.is_on(before):
        _check_shapes(before, after)
    return before, after


def _check_shapes(before: Named, after: Named) -> None:
    """Raises ModelError for the first weight that is not the same in both, by their configs alone."""
    shapes = []
    for one in (before, after):
        with one.told():
            config = load_model_config(one.spec)
        with torch.device("meta"), no_init_weights():
            model = auto_class(config).from_config(config)
        shapes.append({name: list(p.shape) for name, p in model.named_parameters()})
    ours, theirs = shapes
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if ours.get(name) != theirs.get(name):
            sizes = [f"{size}" if size else "not there" for size in (ours.get(name), theirs.get(name))]
            raise ModelError(
                f"{before.name} and {after.name} are not one model before and after training: {name} is "
                f"{sizes[0]} in the one, {sizes[1]} in the other"
            )


def data_of(after: Named, settings: Settings) -> tuple[DataSpec, bool]:
    """(which rows, whether they are the held-out part of these data): those of --data, or those that the
    after model's run evaluated on. Raises ConfigError where there are none."""
    if settings.data is not None:
        return job_of(config_of(after, settings.data)).data, False
    if after.run is None:
        raise ConfigError(
            f"data: {after.name} is no run's, so nothing says on which rows; name held-out preference rows "
            "by --data rows.jsonl"
        )
    read = read_yaml(after.run / "config.yaml")
    run = from_values({key: value for key, value in read.items() if key in FIELDS})
    if not run.eval_data:
        raise ConfigError(
            f"data: the run {after.run} held no rows out, and those that it was trained on would flatter it; "
            "name others by --data rows.jsonl"
        )
    if isinstance(run.eval_data, float | int):
        spec = job_of(replace(config_of(after, run.data), eval_data=run.eval_data, seed=run.seed)).data
        return spec, True
    return job_of(config_of(after, run.eval_data)).data, False


def source_of(spec: DataSpec, held_out: bool) -> str:
    """What the rows of `data_of` are called."""
    name = spec.data if isinstance(spec.data, str) else ", ".join(spec.data)
    return f"the held-out part of {name}" if held_out else name


def rows_of(spec: DataSpec, held_out: bool, settings: Settings, tokenizer, processor, console: Console):
    """(the groups with pairs, at most `settings.pairs` of these, notes). Raises ConfigError or DataError."""
    groups, split, _ = load_data(spec, tokenizer, console, processor=processor)
    groups = split if held_out else groups
    if (seen := facts_of(groups).images).any():
        row = facts_of(groups).row[seen.nonzero()[0][0]]
        raise ConfigError(f"data: row {row} has an image, and `fastdpo explain` reads none yet")
    notes, facts = [], facts_of(groups)
    count = facts.cu_pairs[1:] - facts.cu_pairs[:-1]
    paired = count.nonzero()[0]
    if not len(paired):
        raise ConfigError("data: no row of it has a chosen and a rejected response, and pairs are needed")
    if len(paired) < len(groups):
        notes.append(f"{len(groups) - len(paired):,} rows without a pair are left out")
    total = int(count.sum())
    if total > settings.pairs:
        wanted = max(1, len(paired) * settings.pairs // total)
        paired = paired[[i * len(paired) // wanted for i in range(wanted)]]
        left = int(count[paired].sum())
        notes.append(
            f"{left:,} of {total:,} pairs were read, from all over the rows; --pairs {total} reads all"
        )
    return taken(groups, paired), notes


@dataclass
class Two:
    """Both models, of which one at a time has weights in memory; an adapter's base is it, switched off."""

    before_model: Named
    after_model: Named
    groups: Groups
    console: Console
    _kept: Policy | None = None  # both, of an adapter

    @property
    def is_one(self) -> bool:
        """Whether before is after without its adapter."""
        return self.after_model.is_on(self.before_model)

    @contextlib.contextmanager
    def before(self) -> Iterator[Policy]:
        if not self.is_one:
            with self._alone(self.before_model) as policy:
                yield policy
            return
        with self.after() as policy, policy.model.disable_adapter():
            yield policy

    @contextlib.contextmanager
    def after(self) -> Iterator[Policy]:
        if not self.is_one:
            with self._alone(self.after_model) as policy:
                yield policy
            return
        self._kept = self._kept or loaded(self.after_model, self.groups, self.console)
        yield self._kept

    @contextlib.contextmanager
    def _alone(self, model: Named) -> Iterator[Policy]:
        collect()  # what the other one held
        yield loaded(model, self.groups, self.console)

    @property
    def max_tokens(self) -> int:
        """Of a pack of rows."""
        return config_of(self.after_model, "rows").max_tokens

    def release(self) -> None:
        """Lets all weights go: a reward model may need the room."""
        self._kept = None
        collect()

    @property
    def adapted(self) -> bool:
        """Whether one of them is an adapter."""
        specs = (self.before_model.spec, self.after_model.spec)
        return any(find_start(spec).adapter is not None for spec in specs)
