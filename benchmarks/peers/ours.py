"""fastdpo's own training step, as a worker: its Stage on shared prompts with a stored reference.

With images it tells more: how long the reference took, what a step's microbatches take to make, the tower's
memory; and of each step how many images the tower saw, how long microbatches were waited for, how idle the
device was. On a round's rows it tells how long the reference took.

Options: max_tokens; keys (config keys over those that all contenders share); liger (liger-kernel's layers
under it); compile (a torch.compile backend for the decoder layers).
"""

import contextlib
import itertools
import os
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.console import Console

from benchmarks.peers.jobs import BETA, CLIP, Job, RoundJob, apply_liger, job_of, same_lora
from benchmarks.peers.session import Absent, Session, serve
from benchmarks.peers.towers import ImageWatch
from fastdpo.config.keys import Config
from fastdpo.data.store.digests import response_keys
from fastdpo.errors import ConfigError
from fastdpo.model import adapters, support
from fastdpo.model.activations import set_up_activations
from fastdpo.model.lm_head import named_budget
from fastdpo.model.policy import Policy
from fastdpo.model.quantised import set_up_4bit
from fastdpo.optim.library import check_library
from fastdpo.optim.optimizers import make_optimizer
from fastdpo.records import PreferenceGroup
from fastdpo.reference import tables
from fastdpo.reference.fill import ReferenceTable, load_reference
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
        "batch_size": len(job.groups[0]),
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
    if job.bench_model.vision:
        from benchmarks.pictures import processor

        policy.processor = processor(job.bench_model)
    ready = Prepared(config, policy, job.groups)
    support.prepare(policy, ready.groups, QUIET)
    if not policy.share:
        raise RuntimeError("the start check switched shared prompts off: this would measure something else")
    return ready


def reference(ready: Prepared) -> ReferenceTable:
    """That of all rows; of a step that comes twice one is enough."""
    fresh = ready.config.lora_rank is not None
    options = dict(path=None, max_tokens=ready.config.max_tokens, console=QUIET, fresh_lora=fresh)
    return load_reference(ready.policy, [seen_once(ready)], **options)


def seen_once(ready: Prepared) -> list[PreferenceGroup]:
    """All rows but those of a step that has been before."""
    once = {tuple(response_keys(step[0])): step for step in ready.steps}
    return [group for step in once.values() for group in step]


def round_reference(ready: Prepared) -> dict:
    """What a round's table of these rows takes, warm: no weights are hashed for it."""
    how = dict(base=False, max_tokens=ready.config.max_tokens, console=QUIET, check=lambda: None)
    account = tables.computed(ready.policy, [seen_once(ready)], **how).account
    return {"responses": account["misses"], "tokens": account["tokens"], "seconds": account["seconds"]}


def train(message: dict, session: Session) -> None:
    job = job_of(message)
    ready = prepare(job)
    policy = ready.policy
    if backend := job.options.get("compile"):
        for layer in policy.core.base_model.layers:
            layer.compile(backend=backend, dynamic=True)
    stage = Stage(stage_job(ready.config), policy, ready.groups, [])
    stage.reference = reference(ready)
    watch = ImageWatch(stage, ready.steps, lambda: reference(ready)) if job.bench_model.vision else None
    facts = watch.facts if watch else {}
    if isinstance(job, RoundJob):
        facts = {"reference": round_reference(ready)}
    optimizer, schedule = make_optimizer(policy, ready.config, ENDLESS)
    batches = list(stage.microbatches(ready.steps[0]))
    session.ready(
        head=policy.head_plan(batches),
        microbatches=len(batches),
        max_tokens=ready.config.max_tokens,
        **facts,
    )
    del batches
    with contextlib.closing(optimizer):
        for number, (groups, following) in enumerate(itertools.pairwise(itertools.cycle(ready.steps)), 1):
            if not session.next_step():
                return
            progress = Progress()  # with a window of its own
            stage.step(groups, progress, number, optimizer, following)
            with stage.updating(number, groups, progress):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            window = progress.window
            also = {"also": partial(watch.of_step, window.idle)} if watch else {}
            session.done(lambda window=window: window.sums.means()["loss"], **also)


if __name__ == "__main__":
    serve(train)
