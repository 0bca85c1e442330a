"""An evaluation, top to bottom: models -> rows -> answers -> numbers and tests -> eval.json and eval.html."""

import contextlib
import gc
import platform
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from fastdpo.data.load import load_data
from fastdpo.data.sources import NumberedRows
from fastdpo.evaluation import rows as of_rows
from fastdpo.evaluation.answers import Answers, Sampling, add_kl, answer
from fastdpo.evaluation.models import (
    Named,
    alike,
    check_same_tokens,
    config_of,
    loaded,
    named,
    reference_of,
)
from fastdpo.evaluation.page import page
from fastdpo.evaluation.result import Measured, Settings, check_free, result, write
from fastdpo.evaluation.rows import Rows
from fastdpo.evaluation.show import show
from fastdpo.files import durable
from fastdpo.files.installed import versions
from fastdpo.model.loading import load_tokenizer
from fastdpo.model.policy import Policy
from fastdpo.model.processors import load_processor
from fastdpo.objectives import check_rows
from fastdpo.records import Groups
from fastdpo.reference.cache_file import cache_path
from fastdpo.reference.fill import ReferenceTable, load_reference
from fastdpo.sampling.scorers import Scorer, make_scorer
from fastdpo.training.held_out import prompts_of
from fastdpo.training.job import Job, job_of
from fastdpo.training.run import device_name, spread

_PACKAGES = "fastdpo torch transformers datasets peft vaderSentiment".split()


def evaluate(settings: Settings, output: str | None, overwrite: bool, console: Console) -> dict[str, Any]:
    """As fastdpo.api.evaluate."""
    model = named(settings.model, "model", **settings.keys())
    reference = reference_of(model, settings.reference)
    versus = named(settings.versus, "versus", **alike(model)) if settings.versus else None
    folder = Path(output) if output else _default_folder(settings.model, model.run)
    check_free(folder, settings, overwrite)
    durable.recover(folder)
    job = job_of(config_of(model, settings.data))
    given = NumberedRows(settings.data, job.data.data_format)
    scorer = make_scorer(settings.scorer, rows=given) if settings.scorer else None
    tokenizer = load_tokenizer(model.spec, console)
    others = [other for other in (reference, versus) if other is not None]
    tokenizers = [load_tokenizer(other.spec) for other in others]
    processor = load_processor(model.spec, tokenizer)
    groups, _, account = load_data(job.data, tokenizer, console, processor=processor)
    for other, theirs in zip(others, tokenizers):
        check_same_tokens(tokenizer, theirs, groups, (model.name, other.name))
    rows = Rows(groups, job.stages[0], has_reference=reference is not None)
    check_rows(rows.job.objective, groups, "data")
    sources, note = of_rows.sources(settings.data, job.data.data_format, groups, console)
    rows = replace(rows, sources=sources)
    work = Evaluation(settings, job, rows, tokenizer, console)
    measured = work.run(model, reference, versus)
    if scorer:
        work.judge(measured, scorer)
    measured = {key: one.summed() for key, one in measured.items()}
    facts = {
        "account": account["data"],
        "notes": [*_notes(model, reference, rows, measured), *filter(None, [note])],
        "objective": rows.job.objective.name,
        "beta": rows.job.objective.beta,
        "rewards": rows.rewarded.name if reference else None,
        "versions": {"python": platform.python_version(), **versions(*_PACKAGES)},
        "device": device_name(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    made = result(settings, rows, work.sampling, measured, facts)
    show(made, console)
    write(folder, made, page(made))
    where = escape(f"{folder}/eval.json; open {folder}/eval.html to see it")
    console.print(f"[bold]written:[/] {where}", soft_wrap=True)
    return made


def _default_folder(name: str, run: Path | None) -> Path:
    return run / "eval" if run else Path("runs/eval") / (Path(name).name or "model")


class Evaluation:
    """The part that needs weights: one model's at a time, and two where their exact KL is asked for."""

    def __init__(self, settings: Settings, job: Job, rows: Rows, tokenizer, console: Console):
        self.settings, self.job, self.rows = settings, job, rows
        self.tokenizer, self.console = tokenizer, console
        self.sampling: Sampling | None = None
        if settings.wanted:
            prompts = spread(rows.groups, settings.wanted)
            if len(prompts) < settings.wanted and settings.samples is not None:
                text = f"samples: the rows have {len(prompts):,} different prompts, and all are answered"
                console.print(text, highlight=False, soft_wrap=True)
            numbers = _numbers(rows, prompts)
            self.sampling = Sampling(
                prompts, numbers, settings.per_prompt, settings.max_new_tokens, settings.seed
            )

    def run(self, model: Named, reference: Named | None, versus: Named | None) -> dict[str, Measured]:
        """{"model", "reference" and "versus", where they are: ...}."""
        beside, table, out = None, None, dict[str, Measured]()
        if reference is not None and not model.is_on(reference):
            beside = loaded(reference, self.rows.groups, self.console)
            table, answers = self.reference_part(beside, reference, fresh=False)
            out["reference"] = Measured(reference.name, answers=answers)
            if self.sampling is None:
                beside = None  # its weights go
        for key, one in (("model", model), ("versus", versus)):
            if one is None:
                continue
            collect()
            policy = loaded(one, self.rows.groups, self.console)
            if key == "model" and reference is not None and table is None:
                table, answers = self.reference_part(policy, reference, fresh=True)
                out["reference"] = Measured(reference.name, answers=answers)
            if reference is not None and self.sampling and beside is None and not one.is_on(reference):
                beside = loaded(reference, self.rows.groups, self.console)
            own_base = reference is not None and beside is None
            out[key] = self.measured(one, policy, table, beside, own_base, out.get("reference"))
            del policy
        order = [key for key in ("model", "reference", "versus") if key in out]
        return {key: out[key] for key in order}

    def reference_part(
        self, policy: Policy, reference: Named, fresh: bool
    ) -> tuple[ReferenceTable, Answers | None]:
        """Its log-probs and its answers. fresh: it is the policy without its adapter."""
        stage = self.rows.stage(policy)
        data = self.settings.data if isinstance(self.settings.data, list) else [self.settings.data]
        source = {"model": reference.spec.model, "adapter": reference.spec.adapter, "stage": 0, "data": data}
        table = load_reference(
            policy,
            [[], stage.eval_groups, stage.eval_mismatched],  # packed as the policy's
            path=cache_path(self.job.reference_cache),
            fresh_lora=fresh,
            max_tokens=self.rows.job.max_tokens,
            console=self.console,
            source=source,
        )
        if self.sampling is None:
            return table, None
        with policy.model.disable_adapter() if fresh else contextlib.nullcontext():
            return table, answer(policy, self.tokenizer, self.sampling, self.console, "the reference")[0]

    def measured(self, one: Named, policy, table, beside, own_base: bool, reference) -> Measured:
        """One model's part. It fills in what the reference makes of the rows, beside the first model."""
        logps, aside = of_rows.scored(self.rows, policy, table, one.name, self.console)
        found = Measured(one.name, of_rows.numbers(self.rows, logps, aside))
        if reference is not None and reference.rows is None:
            reference.rows = of_rows.reference_numbers(self.rows, logps)
        if self.sampling is not None:
            found.answers, groups = answer(policy, self.tokenizer, self.sampling, self.console, one.name)
            if own_base or beside is not None:
                base = None if own_base else beside
                add_kl(found.answers, groups, policy, base, self.rows.job.max_tokens, self.console)
        return found

    def judge(self, measured: dict[str, Measured], scorer: Scorer) -> None:
        collect()
        for one in measured.values():
            assert one.answers is not None and self.settings.scorer is not None
            one.answers.judge(scorer, self.settings.scorer, self.console, one.name)


def _numbers(rows: Rows, prompts: Groups):
    """Which prompts of the rows these are."""
    first = rows.facts.cu_resp[:-1]
    number = dict(zip(rows.facts.row.tolist(), prompts_of(rows.groups)[first].tolist()))
    return torch.tensor([number[group.row] for group in prompts], dtype=torch.int64).numpy()


def collect() -> None:
    """Gives back what the model before held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _notes(model: Named, reference: Named | None, rows: Rows, measured: dict[str, Measured]) -> Iterator[str]:
    """What a reader has to know."""
    if reference is None:
        yield (
            f"{model.name} has no reference that is known, so accuracy over it, margins, KL and the loss of "
            "objectives that refer to one are left out: name one by --reference"
        )
    if reference is not None and model.stages > 1:
        yield (
            f"the run had {model.stages} stages, and its last one referred to the weights before it; the "
            "reference here is the model that the run started from"
        )
    own = rows.job.objective
    if reference is not None and rows.rewarded is not own:
        yield f"{own.name} does not refer to the reference: rewards are DPO's, at beta {rows.rewarded.beta:g}"
    for one in measured.values():
        if one.rows and one.rows.ties:
            yield f"{one.name} is its reference on these rows: all pairs tie, so no accuracy over it is told"
