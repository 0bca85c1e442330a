"""A pytest plugin for TRL's own DPO tests: what every test's trainers compute, up to their first step.

    python -m pytest -p benchmarks.peers.trl_recorder tests/test_dpo_trainer.py --record FILE [--patch]

--record FILE   JSON: {test: {"outcome", "why", and what a Record keeps}}
--patch         under fastdpo.integrations.trl.patch()
--float32       DPOConfig's bf16, where a test leaves it alone, is False
"""

import functools
import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import trl
import trl.import_utils as import_utils
import trl.trainer.base_config as base_config
import trl.trainer.utils as trl_utils

SCORED = ("log_probs", "entropy", "mean_logits", "log_sum_sq_probs")


@dataclass
class Record:
    """Of one test. Forwards and gradients are those until a trainer's first backward is done."""

    outcome: str = "not run"
    half: bool = False  # something of it computes in half precision
    why: str = ""  # it failed or was skipped
    forwards: list[dict] = field(default_factory=list)  # {field: its values at the scored tokens, in order}
    gradients: list[dict] = field(default_factory=list)  # {parameter: norm}, one dict a trainer
    metrics: list[dict] = field(default_factory=list)  # of the first batch, one dict a trainer
    logged: list[list[list[str]]] = field(default_factory=list)  # names of each trainer's log entries
    modes: list[str] = field(default_factory=list)  # how the patched forward ran, for each model


class Recorder:
    """Wraps what all of TRL's DPO code goes through, stock or patched."""

    def __init__(self, options):
        self.options, self.records = options, {}
        self.record, self.trainers, self.open = Record(), [], True

    def install(self) -> None:
        """For the life of this process."""
        if not hasattr(import_utils, "is_joblib_available"):  # gone in TRL 1.16, and its tests ask
            import_utils.is_joblib_available = lambda: False
        wrap(trl_utils, "FusedCausalLMOutput", after=self.forward)
        wrap(trl.DPOTrainer, "__init__", before=self.trainer)
        wrap(trl.DPOTrainer, "training_step", after=self.step)
        if self.options.float32:
            wrap(base_config._BaseConfig, "__post_init__", before=in_float32)
        if self.options.patch:
            import fastdpo.integrations.trl as fast
            from fastdpo.integrations.trl_forward import FusedForward

            fast.patch()
            wrap(FusedForward, "decide", after=lambda mode, *_: self.record.modes.append(mode))

    def trainer(self, trainer, *_, **__) -> None:
        self.trainers.append(trainer)
        self.open = True

    def forward(self, output, *_, **__) -> None:
        if self.open:
            found = {name: getattr(output, name) for name in SCORED}
            mask = output.label_mask
            kept = {k: v.detach()[mask].double().tolist() for k, v in found.items() if v is not None}
            self.record.forwards.append(kept)

    def step(self, _, trainer, *__, **___) -> None:
        if self.open:
            named = trainer.model.named_parameters()
            norms = {name: p.grad.double().norm().item() for name, p in named if p.grad is not None}
            self.record.gradients.append(norms)
            metrics = trainer._metrics["train"].items()
            self.record.metrics.append({name: values[-1] for name, values in metrics if values})
        self.open = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.record, self.trainers, self.open = Record(), [], True
        self.records[item.nodeid] = self.record
        for seed in (torch.manual_seed, np.random.seed, random.seed):  # whatever earlier tests drew
            seed(0)
        return (yield)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.record.outcome = report.outcome
            self.record.why = reason(report.longrepr)
        if report.when == "call":
            made = [trainer for trainer in self.trainers if hasattr(trainer, "state")]
            self.record.logged = [[sorted(log) for log in trainer.state.log_history] for trainer in made]
            self.record.half = any(map(in_half, made))
            self.trainers = []

    def pytest_sessionfinish(self) -> None:
        records = {test: asdict(record) for test, record in self.records.items()}
        Path(self.options.record).write_text(json.dumps(records))


def wrap(owner, name: str, before=None, after=None) -> None:
    """Calls `before` with the arguments, and `after` with the result and the arguments."""
    wrapped = getattr(owner, name)

    @functools.wraps(wrapped)
    def call(*args, **kwargs):
        if before is not None:
            before(*args, **kwargs)
        out = wrapped(*args, **kwargs)
        if after is not None:
            after(out, *args, **kwargs)
        return out

    setattr(owner, name, call)


def in_float32(config) -> None:
    if config.bf16 is None and not config.fp16:
        config.bf16 = False


def in_half(trainer) -> bool:
    """Whether it computes in bf16 or fp16."""
    args, weights = trainer.args, trainer.model.parameters()
    return args.bf16 or args.fp16 or any(p.dtype != torch.float32 for p in weights)


def reason(said) -> str:
    """What a report's longrepr says: a skip's (file, line, reason), or a traceback's error."""
    if isinstance(said, tuple):
        return said[-1]
    crash = getattr(said, "reprcrash", None)
    text = crash.message if crash else str(said or "")
    return text.strip().splitlines()[0][:300] if text.strip() else ""


def pytest_addoption(parser) -> None:
    parser.addoption("--record", required=True)
    parser.addoption("--patch", action="store_true")
    parser.addoption("--float32", action="store_true")


def pytest_configure(config) -> None:
    recorder = Recorder(config.option)
    recorder.install()
    config.pluginmanager.register(recorder)
