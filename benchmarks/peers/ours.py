"""fastdpo's own training step, as a worker: its Stage on shared prompts with a stored reference.

Options: max_tokens; keys (config keys over those that all contenders share); liger (liger-kernel's layers
under it); compile (a torch.compile backend for the decoder layers).
"""

import contextlib
import itertools
import os
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console

from benchmarks.inputs import groups_of
from benchmarks.peers.jobs import BETA, CLIP, Job, apply_liger, same_lora
from benchmarks.peers.session import Absent, Session, serve
from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError
from fastdpo.model import adapters, support
from fastdpo.model.activations import set_up_activations
from fastdpo.model.lm_head import named_budget
from fastdpo.model.policy import Policy
from fastdpo.model.quantised import set_up_4bit
from fastdpo.optim.library import check_library
from fastdpo.optim.optimizers import make_optimizer
from fastdpo.records import PreferenceGroup
from fastdpo.reference.fill import load_reference
from fastdpo.training.job import stage_job
from fastdpo.training.stage import Progress, Stage

ENDLESS = 1_000_000  # steps: the parent says when to stop
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Prepared:
    """What ours and the ladder's rungs start from."""

    config: Config
    policy: Policy
    steps: list[list[PreferenceGroup]]

    @property
    def groups(self) -> list[PreferenceGroup]:
        return [group for step in self.steps for group in step]


def prepare(job: Job) -> Prepared:
    """The policy at its start weights, its prompts shared, and the groups of each step."""
    options = job.options
    shared = {
        "model": "random weights",
        "data": "random rows",
        "beta": BETA,
        "batch_size": job.pairs,
        "learning_rate": job.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": CLIP,
        "max_tokens": options["max_tokens"],
        "max_steps": ENDLESS,
        "lora_rank": job.lora_rank,
        "reference_cache": "off",
    }
    config = Config(**shared | job.keys)
    try:
        check_library(config)
    except ConfigError as error:
        raise Absent(str(error)) from None
    model = job.build()
    if config.load_in_4bit:
        set_up_4bit(model, job.dtype, QUIET)
    if options.get("liger"):
        apply_liger(model, job.device)
    if config.lora_rank is not None:
        model = adapters.add_lora(model, config)
        same_lora(model)
    set_up_activations(model.train(), config)
    policy = Policy(model, job.dtype, head_budget=named_budget(config.head_memory))
    groups = groups_of(job.all_rows)
    support.prepare(policy, groups, QUIET)
    if not policy.share:
        raise RuntimeError("the start check switched shared prompts off: this would measure something else")
    steps = [groups[i : i + job.pairs] for i in range(0, len(groups), job.pairs)]
    return Prepared(config, policy, steps)


def train(message: dict, session: Session) -> None:
    job = Job(**message)
    ready = prepare(job)
    policy = ready.policy
    if backend := job.options.get("compile"):
        for layer in policy.core.base_model.layers:
            layer.compile(backend=backend, dynamic=True)
    stage = Stage(stage_job(ready.config), policy, ready.groups, [])
    options = dict(path=None, max_tokens=ready.config.max_tokens, console=QUIET)
    stage.reference = load_reference(policy, [ready.groups], fresh_lora=job.lora_rank is not None, **options)
    optimizer, schedule = make_optimizer(policy, ready.config, ENDLESS)
    batches = list(stage.microbatches(ready.steps[0]))
    session.ready(
        head=policy.head_plan(batches), microbatches=len(batches), max_tokens=ready.config.max_tokens
    )
    del batches
    with contextlib.closing(optimizer):
        for number, groups in enumerate(itertools.cycle(ready.steps), 1):
            if not session.next_step():
                return
            progress = Progress()  # with a window of its own
            stage.step(groups, progress, number, optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            session.done(lambda window=progress.window: window.sums.means()["loss"])


if __name__ == "__main__":
    serve(train)
