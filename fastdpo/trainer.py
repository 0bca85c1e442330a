"""The trainer, top to bottom: config -> data -> model -> stages -> model folder."""

import itertools
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import get_scheduler

from fastdpo.config import Config, to_yaml
from fastdpo.errors import ConfigError, ModelError, TrainingError
from fastdpo.groups import Limits, load_groups
from fastdpo.metrics import EVAL_STATS, Sums, Window, add_pair_metrics, add_token_metrics
from fastdpo.model import Policy, load_model_config, load_policy, load_tokenizer, save_model
from fastdpo.objectives import make_objective
from fastdpo.packing import epoch_order, pack, separate_cost, split_step
from fastdpo.records import PackedGroups, PreferenceGroup, ResponseLogps
from fastdpo.reference import make_reference
from fastdpo.run_log import RunLog
from fastdpo.support import prepare

RUN_FILES = ("config.yaml", "metrics.jsonl", "data_report.json", "model")


def train(config: Config, console: Console | None = None) -> Path:
    """Runs a config's stages and returns the run folder; the trained model is in its `model/`."""
    console = console or Console()
    for stage in config.per_stage():
        make_objective(stage)  # an unknown name shows before any work
    run = free_folder(config)
    tokenizer = load_tokenizer(config)
    load_model_config(config)  # a wrong model or max_length shows before the data is read
    groups, eval_groups, reports = load_data(config, tokenizer, console)
    policy = load_policy(config, console)
    check_vocabulary(policy, groups + eval_groups)
    prepare(policy, groups, console)
    open_run(run, config, reports)
    done = 0
    for number, keys in enumerate(config.per_stage()):
        fresh_lora = config.lora_rank is not None and done == 0
        stage = Stage(keys, policy, groups, eval_groups, fresh_lora)
        done = stage.run(done, RunLog(run / "metrics.jsonl", number, console))
    save_model(policy, tokenizer, run / "model")
    console.print(
        f"[bold]done:[/] the model is in {run}/model, the metrics in {run}/metrics.jsonl", soft_wrap=True
    )
    return run


def free_folder(config: Config) -> Path:
    """The run folder's path; ConfigError where it holds another run and `overwrite` is not set."""
    run = Path(config.output_dir)
    held = [name for name in RUN_FILES if (run / name).exists()]
    if held and not config.overwrite:
        raise ConfigError(
            f"output_dir: {run} already holds a run ({', '.join(held)}). "
            "Name another folder, or replace it with --overwrite"
        )
    return run


def open_run(run: Path, config: Config, reports: dict) -> None:
    """Makes the run folder, once everything that can be wrong before the first step was right."""
    for path in (run / name for name in RUN_FILES):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run / "data_report.json").write_text(json.dumps(reports, indent=1), encoding="utf-8")


def load_data(config: Config, tokenizer, console: Console):
    """(training groups, evaluation groups, the account of every row for data_report.json)."""
    limits = Limits(config.max_length, config.truncation)

    def load(spec):
        groups, report = load_groups(spec, tokenizer, limits, strict=config.strict, console=console)
        report.print(console)
        return groups, report.to_dict()

    groups, report = load(config.data)
    if isinstance(config.eval_data, str):
        eval_groups, eval_report = load(config.eval_data)
        return groups, eval_groups, {"data": report, "eval_data": eval_report}
    held = math.ceil((config.eval_data or 0) * len(groups))
    order = epoch_order(len(groups), config.seed, epoch=2**31)  # a stream that no training reaches
    eval_groups = [groups[i] for i in sorted(order[:held])]
    groups = [groups[i] for i in sorted(order[held:])]
    if not groups:
        raise ConfigError(f"eval_data: {config.eval_data} of {held} groups leaves none to train on")
    if held:
        console.print(f"eval_data: {held} of {held + len(groups)} groups split off by seed")
    split = {"split_off": held, "rows": [g.row for g in eval_groups]}
    return groups, eval_groups, {"data": report, "eval_data": split}


def check_vocabulary(policy: Policy, groups: list[PreferenceGroup]) -> None:
    size = policy.core.get_input_embeddings().weight.shape[0]
    for group in groups:
        largest = max(group.prompt.max(), *(r.ids.max() for r in group.responses))
        if largest >= size:
            raise ModelError(
                f"row {group.row}: token id {largest}, but the model embeds only {size} ids: "
                "the tokenizer is of another model"
            )


class Stage:
    """One objective on one data set. Make it before the first step: its reference is the policy as it
    stands then."""

    def __init__(self, config: Config, policy: Policy, groups, eval_groups, fresh_lora: bool):
        self.config, self.policy = config, policy
        self.objective = make_objective(config)
        self.reference = None
        if self.objective.needs_reference:
            self.reference = make_reference(policy, fresh_lora)
        self.groups = [self.objective.select(g) for g in groups]
        self.eval_groups = [self.objective.select(g) for g in eval_groups]
        self.per_epoch = math.ceil(len(self.groups) / config.batch_size)
        self.total = config.max_steps or math.ceil(config.num_epochs * self.per_epoch)

    def run(self, done: int, log: RunLog) -> int:
        """Trains to the end, counting on from `done` optimizer steps; returns the new count."""
        config = self.config
        optimizer, schedule = make_optimizer(self.policy, config, self.total)
        log.announce(self)
        with log.bar(self.objective.name, self.total):
            self.eval_batches = self.prepare_eval(log)
            self.evaluate(done, log)
            window = Window()
            for i, groups in enumerate(step_groups(self.groups, config, self.total), 1):
                norm = self.step(groups, window, done + i)
                window.sums.add("grad_norm", norm)
                window.sums.add("learning_rate", schedule.get_last_lr()[0])
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                log.advance(window)
                if i % config.logging_steps == 0 or i == self.total:
                    log.train(done + i, i / self.per_epoch, window)
                    window = Window(window.num_tokens)
                if i == self.total or (config.eval_steps and i % config.eval_steps == 0):
                    self.evaluate(done + i, log)
        return done + self.total

    def step(self, groups: list[PreferenceGroup], window: Window, step: int):
        """Forward and backward of one optimizer step, in microbatches; returns the gradient norm.

        Each microbatch's loss is divided by the whole step's count, so the gradient is that of the
        step's mean loss however the step was cut.
        """
        total = sum(self.objective.count(g) for g in groups)
        losses, rows = [], []
        for batch in self.microbatches(groups):
            logps = self.score(batch.to(self.policy.device), self.objective.stats)
            loss = self.objective.loss_sum(logps) / total
            loss.backward()
            losses.append(loss.detach())
            rows.append(batch.rows)
            add_pair_metrics(window.sums, logps, self.config.beta)
            window.count(batch)
        parameters = self.policy.trained()
        limit = self.config.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        losses = torch.stack(losses)
        window.sums.add("loss", losses, count=1)
        if not math.isfinite(float(losses.sum() + norm)):
            raise not_finite(step, losses, rows, norm)
        return norm

    def cost(self, group: PreferenceGroup) -> int:
        """What a group takes of max_tokens."""
        return group.input_tokens if self.policy.share else separate_cost(group)

    def microbatches(self, groups: list[PreferenceGroup]) -> Iterator[PackedGroups]:
        for part in split_step(groups, self.config.max_tokens, self.policy.max_scored, self.cost):
            yield pack(part, self.policy.share)

    def score(self, batch: PackedGroups, stats=()) -> ResponseLogps:
        reference = self.reference(batch) if self.reference else None
        out = self.policy.token_logp(batch, stats)
        token_logp, token_stats = out if stats else (out, {})
        return ResponseLogps.of(batch, token_logp, reference, token_stats)

    @torch.no_grad()
    def prepare_eval(self, log: RunLog) -> list[PackedGroups]:
        """The evaluation rows packed once, with the reference's log-probs, which never change."""
        batches = list(self.microbatches(self.eval_groups))
        if self.reference is None:
            return batches
        fill = lambda b: replace(b, ref_token_logp=self.reference(b.to(self.policy.device)).cpu())
        return [fill(batch) for batch in log.track(batches, "held-out reference")]

    @torch.no_grad()
    def evaluate(self, step: int, log: RunLog) -> None:
        """Loss and metrics of the held-out rows, the vocabulary-wide ones too."""
        if not self.eval_batches:
            return
        sums = Sums()
        self.policy.model.eval()
        for batch in log.track(self.eval_batches, "held-out"):
            batch = batch.to(self.policy.device)
            logps = self.score(batch, EVAL_STATS)
            sums.add("loss", self.objective.loss_sum(logps), count=0)
            add_pair_metrics(sums, logps, self.config.beta)
            add_token_metrics(sums, batch, logps.token_stats)
        self.policy.model.train()
        count = sum(self.objective.count(g) for g in self.eval_groups)
        sums.add("loss", 0.0, count=count)
        log.held_out(step, sums)


def step_groups(groups, config: Config, n_steps: int) -> Iterator[list[PreferenceGroup]]:
    """The groups of each optimizer step, epoch after epoch: a function of seed and epoch alone."""
    for epoch in itertools.count():
        order = epoch_order(len(groups), config.seed, epoch)
        for start in range(0, len(order), config.batch_size):
            if n_steps == 0:
                return
            n_steps -= 1
            yield [groups[i] for i in order[start : start + config.batch_size]]


def make_optimizer(policy: Policy, config: Config, total: int):
    """Fused AdamW with transformers' defaults, decaying matrices only, and a transformers schedule."""
    parameters = policy.trained()
    grouped = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(grouped, lr=config.learning_rate, fused=True)
    try:
        schedule = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, total)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lr_scheduler_type: {error}") from None
    return optimizer, schedule


def not_finite(step: int, losses, rows, norm) -> TrainingError:
    """Says which rows made the loss or gradient something else than a number."""
    bad = [r for loss, group in zip(losses.tolist(), rows) if not math.isfinite(loss) for r in group]
    where = f"in the microbatch of rows {', '.join(map(str, bad))}" if bad else "in the gradient"
    return TrainingError(
        f"step {step}: the loss is {float(losses.sum())} and the gradient norm {float(norm)}; "
        f"not a number first {where}. The weights of this step were not updated. "
        "Try a lower learning_rate, more warmup_steps, or dtype: fp32; look at the rows with "
        "`fastdpo data`"
    )
