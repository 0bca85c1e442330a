"""The trainer, top to bottom: config -> data -> model -> stages -> model folder."""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from transformers import get_scheduler

from fastdpo.config import Config
from fastdpo.errors import ConfigError, ModelError, TrainingError
from fastdpo.failures import WAY_OUT, check_weights, not_finite, out_of_memory
from fastdpo.groups import Limits, load_groups
from fastdpo.metrics import EVAL_STATS, Sums, Window, add_pair_metrics, add_token_metrics
from fastdpo.model import Policy, load_model_config, load_policy, load_tokenizer, save_model
from fastdpo.objectives import make_objective
from fastdpo.packing import epoch_order, pack, places, split_step
from fastdpo.records import PackedGroups, PreferenceGroup, ResponseLogps
from fastdpo.reference import make_reference
from fastdpo.run_folder import free_folder, open_run
from fastdpo.run_log import RunLog
from fastdpo.support import prepare


def train(config: Config, console: Console | None = None) -> Path:
    """Runs a config's stages and returns the run folder; the trained model is in its `model/`."""
    console = console or Console()
    for stage in config.per_stage():  # an unknown name shows before any work
        make_objective(stage)
        check_schedule(stage)
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
        stage = None  # lets go of the last stage's reference before the next one makes its own
        stage = Stage(keys, policy, groups, eval_groups, fresh_lora)
        done = stage.run(done, RunLog(run / "metrics.jsonl", number, console))
    check_weights(policy)
    save_model(policy, tokenizer, run / "model")
    where = escape(f"the model is in {run}/model, the metrics in {run}/metrics.jsonl")
    console.print(f"[bold]done:[/] {where}", soft_wrap=True)
    return run


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
                logged = i % config.logging_steps == 0 or i == self.total
                if logged:
                    log.train(done + i, i / self.per_epoch, window)
                start = time.perf_counter()
                if i == self.total or (config.eval_steps and i % config.eval_steps == 0):
                    self.evaluate(done + i, log)
                if logged:
                    window = Window(window.num_tokens)
                else:
                    window.start += time.perf_counter() - start  # evaluation is no training time
        return done + self.total

    def step(self, groups: list[PreferenceGroup], window: Window, step: int):
        """Forward and backward of one optimizer step, in microbatches; returns the gradient norm.

        Each microbatch's loss is divided by the whole step's count, so the gradient is that of the
        step's mean loss however the step was cut.
        """
        total = sum(self.objective.count(g) for g in groups)
        losses, rows = [], []
        for batch in self.microbatches(groups):
            try:
                logps = self.score(batch.to(self.policy.device), self.objective.stats)
                loss = self.objective.loss_sum(logps) / total
                loss.backward()
            except torch.OutOfMemoryError:
                raise out_of_memory(step, batch) from None
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
        return places(group, self.policy.share)

    def microbatches(self, groups: list[PreferenceGroup]) -> Iterator[PackedGroups]:
        share = self.policy.share
        for part in split_step(groups, self.config.max_tokens, self.policy.max_scored, share):
            yield pack(part, share)

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
        loss = sums.means()["loss"]
        if not math.isfinite(loss):
            raise TrainingError(f"step {step}: the held-out loss is {loss}; {WAY_OUT}")


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
    return optimizer, get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, total)


def check_schedule(config: Config) -> None:
    """Raises ConfigError for a schedule that cannot be made or stepped, by trying one on no model."""
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
        schedule = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, 100)
        optimizer.step()
        schedule.step()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lr_scheduler_type: {config.lr_scheduler_type!r}: {error}") from None
