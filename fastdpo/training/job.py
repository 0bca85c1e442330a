"""A run's config in parts: what each room needs of it, as that room's own record."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch.distributed.fsdp import FSDPModule

from fastdpo.config.keys import Config
from fastdpo.config.rewards import check_reward_keys
from fastdpo.config.rounds import SampleSpec, only_with_rounds, sample_spec
from fastdpo.data.load import DataSpec
from fastdpo.data.packing import epoch_steps
from fastdpo.data.pairs import BY_GAP
from fastdpo.distributed.world import ALONE, World
from fastdpo.errors import ConfigError
from fastdpo.model.spec import ModelSpec
from fastdpo.objectives import Objective, Rescaled, make_objective
from fastdpo.objectives.rewards import BRADLEY_TERRY
from fastdpo.optim.library import check_library
from fastdpo.optim.optimizers import check_schedule
from fastdpo.optim.spec import OptimSpec
from fastdpo.records import Groups
from fastdpo.sampling.engine import check_engine

T = TypeVar("T")
SHARDED_OPTIM = ("adamw_torch_fused", "sgd", "rmsprop")  # tried
RESCALES = (
    "{} rescales a step's gradient after its last microbatch, and the balance loss has no part in that; "
    "give it a scope (objective_args: {{scope: N}})"
)


@dataclass(frozen=True)
class StageJob:
    """One stage: an objective, which pairs and how many steps of them, and what is done on the way."""

    objective: Objective
    optim: OptimSpec
    pairs: str
    pair_gap: str
    flip_pairs: float
    seed: int
    batch_size: int
    max_tokens: int
    max_length: int
    num_epochs: float
    max_steps: int | None
    eval_steps: int | None
    logging_steps: int
    save_steps: int | None
    load_best: bool
    router_aux_loss_coef: float | None

    @property
    def by_logp(self) -> bool:
        """Whether its pairs are told by the reference's log-probs."""
        return self.pairs in BY_GAP and self.pair_gap == "logp"


@dataclass(frozen=True)
class Job:
    """A run."""

    data: DataSpec
    model: ModelSpec
    stages: tuple[StageJob, ...]
    output_dir: str
    resume: bool
    overwrite: bool
    reference_cache: str
    save_total_limit: int
    samples: int
    trackers: list[str]
    push_to_hub: str | None
    rounds: int | None
    sample: SampleSpec
    reward: str | None
    reference: str | None
    config: Config  # for the records, and for what is done around the run

    @property
    def settings(self) -> dict:
        """Every key and its value."""
        return dataclasses.asdict(self.config)


@dataclass(frozen=True)
class Around:
    """What other rooms do around a run: `fastdpo.api` hands it to the trainer, which imports none of them."""

    settle_backends: Callable[[Console], None]  # which kernels are right on this machine
    # processor: of a model that sees images, where rows have some
    choose: Callable[..., Config]  # (config, model_config, groups, console, processor): what `memory` takes
    replica_fits: Callable[..., bool | str]  # (config, model_config, groups, processor): all, on one GPU
    explain: Callable[..., str]  # (config, model_config, whether rows have images, batch): of one too large
    write_report: Callable[[Path, bool], object]  # (run folder, whether the run has ended)
    add_card: Callable[[Path, Path, Console], None]  # (run folder, model folder, console)
    check_hub: Callable[[str | None], None]  # whether that repository can be pushed to
    push: Callable[[Path, str, Console], object]  # (model folder, repository, console)


def resolve(config: Config, world: World = ALONE) -> Job:
    """Raises ConfigError for what is wrong in a config before any work, also between its keys, on this
    machine and in this world."""
    if config.rewards:
        check_reward_keys(config)
    job = job_of(config)
    if found := list(only_with_rounds(config)):
        raise ConfigError(*found)
    if job.rounds is not None:
        check_engine(job.sample, job.model, sharded=config.shard in (True, "hybrid"))
    check_ranks(config, world, sharded=config.shard in (True, "hybrid"))
    for stage in job.stages:
        if stage.flip_pairs and "ordered scores" in stage.objective.needs:
            name = stage.objective.name
            raise ConfigError(f"flip_pairs: flipped pairs contradict the scores that {name} reads")
        check_samples(stage, config)
        check_stepping(stage)
        check_library(stage.optim)
    if config.pair_gap == "logp" and not any(stage.by_logp for stage in job.stages):
        raise ConfigError(f"pair_gap: logp is read only with pairs: {', '.join(BY_GAP)}")
    return job


def check_ranks(config: Config, world: World, sharded: bool) -> None:
    """Raises ConfigError for keys that several ranks, or their shards, do not have yet."""
    if world.size == 1:
        return
    if config.optimizer_in_backward:
        raise ConfigError(
            "optimizer_in_backward: on several GPUs a weight's gradient is complete only after the backward; "
            "leave the key out"
        )
    if not sharded:
        return
    refused = {"load_in_4bit": config.load_in_4bit, "pure_bf16": config.pure_bf16}
    refused |= {"offload_optimizer": config.offload_optimizer, "memory": config.memory is not None}
    refused |= {f"optim: {config.optim}": config.optim not in SHARDED_OPTIM}
    for name in (name for name, is_set in refused.items() if is_set):
        raise ConfigError(
            f"{name}: not with shard, whose parts of a weight it does not know yet; say shard: false, which "
            "gives each GPU all weights, or leave it out"
        )
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise ConfigError(f"shard: needs a newer torch than {torch.__version__}")


def check_samples(stage: StageJob, config: Config) -> None:
    """Raises ConfigError for an objective that does not go with rounds, or not without."""
    objective = stage.objective
    if config.rounds is not None and "token weights" in objective.needs:
        raise ConfigError(
            "objective_args: gamma is of token weights, which samples do not have; leave it out"
        )
    if config.reference == "start" and not objective.needs_reference:
        raise ConfigError(
            f"reference: start pulls to nothing, as {objective.name} has no reference; leave it out"
        )
    if "response scores" not in objective.needs:
        return
    if stage.pairs != "all":
        raise ConfigError(f"pairs: {objective.name} looks at all samples of a prompt; leave the key out")
    if config.rounds is None:
        raise ConfigError(
            f"objective: {objective.name} trains on the policy's own samples; set rounds and reward, or "
            "choose an objective of preference rows"
        )
    if config.eval_data is not None:
        raise ConfigError(
            f"eval_data: {objective.name} has a loss of the policy's own samples alone, and none of held-out "
            "rows; leave it out (`fastdpo eval` takes held-out rows afterwards)"
        )


def check_stepping(stage: StageJob) -> None:
    """Raises ConfigError for a way of stepping that the objective does not allow, or a wrong schedule."""
    if stage.optim.optimizer_in_backward and isinstance(stage.objective, Rescaled):
        raise ConfigError(
            f"optimizer_in_backward: {stage.objective.name} rescales the gradient after the last microbatch, "
            "when the weights would be updated already; give it a scope (objective_args: {scope: N}) or "
            "leave the key out"
        )
    if stage.router_aux_loss_coef and isinstance(stage.objective, Rescaled):
        raise ConfigError(f"router_aux_loss_coef: {RESCALES.format(stage.objective.name)}, or say 0")
    check_schedule(stage.optim)


def job_of(config: Config) -> Job:
    """The config in parts; only its objectives are checked, the rest by `resolve`."""
    stages = tuple(stage_job(stage) for stage in config.per_stage())
    data, model = data_of(config), part(ModelSpec, config)
    own = dict(data=data, model=model, stages=stages, sample=sample_spec(config.sample), config=config)
    own |= {"samples": 0} if config.rewards else {}  # a reward model writes nothing
    return part(Job, config, **own)


def data_of(config: Config) -> DataSpec:
    """Rounds need no responses, so prompts alone are rows of theirs."""
    return part(DataSpec, config, prompts_only=config.rounds is not None)


def stage_job(config: Config) -> StageJob:
    """One stage's config (of Config.per_stage) as a StageJob. Raises ConfigError for its objective."""
    return part(StageJob, config, objective=objective_of(config), optim=part(OptimSpec, config))


def objective_of(config: Config) -> Objective:
    """The objective that a config names. Raises ConfigError for what is unknown, unread or out of range."""
    if config.rewards:
        return BRADLEY_TERRY
    args = config.objective_args or {}
    keys = {"beta": config.beta, "label_smoothing": config.label_smoothing}
    for key, value in keys.items():
        if value is not None and key in args:
            raise ConfigError(f"{key}: given twice, as a key and in objective_args")
    return make_objective(config.objective, keys | args)


def total_steps(stage: StageJob | Config, n_groups: int) -> int:
    """Optimizer steps of a stage on so many groups."""
    return stage.max_steps or math.ceil(stage.num_epochs * math.ceil(n_groups / stage.batch_size))


def step_groups(groups: Groups, job: StageJob | Config, n_steps: int, skip: int = 0) -> Iterator[Groups]:
    """The groups of each optimizer step after the first `skip`, epoch after epoch, each read when its step
    comes: a function of seed and epoch alone."""
    steps = epoch_steps(len(groups), job.batch_size, job.seed)
    for places in itertools.islice(steps, skip, n_steps):
        yield [groups[i] for i in places]


def part(kind: type[T], config: Config, /, **own: Any) -> T:
    """A `kind` whose fields are the config's keys of the same names, but for those in `own`."""
    names = [f.name for f in dataclasses.fields(kind) if f.name not in own]  # type: ignore[arg-type]
    return kind(**{name: getattr(config, name) for name in names}, **own)
