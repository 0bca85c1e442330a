"""Going on with a run: which checkpoint, and is it this run's?"""

import hashlib
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fastdpo.config.keys import FIELDS, Config
from fastdpo.config.names import in_our_words
from fastdpo.data.store.stored import facts_of
from fastdpo.errors import ConfigError, DeadEndError
from fastdpo.files.names import gguf_path
from fastdpo.model.lm_head import named_budget
from fastdpo.objectives.make import same_objective
from fastdpo.records import Groups
from fastdpo.training import checkpoint
from fastdpo.training.folder import RUN_FILES
from fastdpo.training.job import Job, StageJob, total_steps

# What a resumed run may set anew. The lengths decide when the run ends (and, by the schedule, its
# learning rate from there on); the rest changes no step, but for rounding: max_tokens', checkpointing's, the
# host's, and under pure_bf16 that of gradients summed over microbatches, in bf16 or (in the backward) fp32.
# max_tokens also says over which microbatches a mixture's balance loss is a mean. What a chat template wrote
# is compared token by token, and an image pixel by pixel, wherever their files lie.
FREE = set(
    "max_steps num_epochs rounds eval_steps logging_steps save_steps save_total_limit load_best report_to "
    "samples data_cache reference_cache memory max_tokens head_memory gradient_checkpointing tiled_mlp "
    "activation_offloading shard offload_optimizer optimizer_in_backward push_to_hub output_dir resume "
    "overwrite strict ignore chat_template media_dir".split()
)


def find_checkpoint(
    folder: Path, job: Job, console: Console
) -> tuple[checkpoint.Checkpoint | None, dict[str, str]]:
    """(the newest whole checkpoint of a run to go on with, the newer ones passed over and why).

    None where the run starts from the beginning. Raises ConfigError where the job is another run's, or
    where a finished model would be lost.
    """
    if not job.resume:
        return None, {}
    try:
        found, passed = checkpoint.newest(folder / "checkpoints")
    except OSError as error:
        raise ConfigError(f"resume: cannot read the checkpoints: {error}") from None
    for name, reason in passed.items():
        text = escape(f"{name} cannot be used: {reason}. It is kept as damaged-{name}")
        console.print(f"[yellow]{text}", highlight=False, soft_wrap=True)
    if found:
        check_settings(found.state["config"], job.settings)
        console.print(f"going on from {folder}/checkpoints/{found.name}", highlight=False, soft_wrap=True)
    elif (folder / "model").exists() and not job.overwrite:
        raise ConfigError(
            f"resume: {folder} holds a finished model and no checkpoint to go on from; "
            "to train it anew say --overwrite"
        )
    else:
        held = any((folder / name).exists() for name in RUN_FILES)
        what = "holds no whole checkpoint" if held else "holds no run"
        console.print(f"{folder} {what}: the run starts from the beginning", highlight=False)
    return found, passed


def check_settings(saved: dict, settings: dict) -> None:
    """Raises ConfigError for a key that makes another run of this one."""
    defaults = {name: f.default for name, f in FIELDS.items()}
    _check_keys(defaults | saved, settings, FREE | {"stages"}, "")
    before, after = saved.get("stages") or [], settings["stages"] or []
    if len(before) != len(after):
        raise _changed("stages", f"{len(before)} stages", f"{len(after)}")
    for number, (old, new) in enumerate(zip(before, after), 1):
        _check_keys(old, new, FREE, f"stages: stage {number}: ")


def _check_keys(old: dict, new: dict, free: set, where: str) -> None:
    for name in sorted((old.keys() | new.keys()) - free):
        a, b = in_our_words(name, old.get(name)), new.get(name)  # it may be of before a word was taken
        other_words = same_objective if name == "objective" else _same_file
        if a != b and not other_words(a, b):
            raise _changed(where + name, a, b)


def _same_file(old, new) -> bool:
    """Whether two values are two ways to write the path of one file or folder."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return False
    (old, _, old_split), (new, _, new_split) = (gguf_path(name).partition("#") for name in (old, new))
    return old_split == new_split and Path(new).exists() and Path(old).resolve() == Path(new).resolve()


def _changed(name, old, new) -> ConfigError:
    return ConfigError(
        f"{name}: the run in output_dir was started with {old!r}, this config says {new!r}. "
        "To resume, keep it; for another run, name another output_dir"
    )


def clock_of(found: checkpoint.Checkpoint | None) -> datetime:
    """What the run's chat templates are told where they ask for the time: of a run that goes on, the time it
    was started at, so that its rows stay the same."""
    started = found.state.get("clock") if found else None
    return datetime.fromisoformat(started) if started else datetime.now()


def head_budget_of(found: checkpoint.Checkpoint | None, job: Job) -> int | None:
    """Bytes that the lm_head may take in a run that goes on: it cuts its steps as it did, whatever is free
    now, unless the config names a head_memory. None: as for a run that starts."""
    if found is None or job.model.head_memory is not None:
        return None
    # before it was kept, the config named the default of then
    return found.state.get("head_budget") or named_budget(found.state["config"].get("head_memory"))


def check_same_run(
    found: checkpoint.Checkpoint | None, job: Job, data: str, n_groups: int, console: Console
) -> None:
    """Raises ConfigError where the rows or the lengths of the stages do not fit the checkpoint; says where a
    stage becomes longer or shorter."""
    if found is None:
        return
    if found.state["data"] != data:
        raise ConfigError(
            "data: the rows (or the tokenizer) are no longer those that the run in output_dir was started "
            "with, so it cannot go on exactly; start another run from its model instead"
        )
    had = found.state["config"].get("rounds")
    if (had is None) != (job.rounds is None):
        raise _changed("rounds", had, job.rounds)
    if job.rounds is not None:
        number = found.state["progress"]["rounds"]["number"]
        if number > job.rounds:
            raise ConfigError(f"rounds: {job.rounds}, but {found.name} is in round {number} already")
        if found.state["config"]["num_epochs"] != job.stages[0].num_epochs:
            raise _changed("num_epochs", found.state["config"]["num_epochs"], job.stages[0].num_epochs)
        if had != job.rounds:
            text = f"the run had rounds: {had}, now {job.rounds}: the learning rate follows from here on"
            console.print(f"[yellow]{text}", highlight=False)
        return
    now, stage = job.stages, found.state["stage"]
    before = Config(**found.state["config"]).per_stage()
    for number, (old, new) in enumerate(zip(before, now[:stage]), 1):
        if total_steps(old, n_groups) != total_steps(new, n_groups):
            raise ConfigError(
                f"stages: stage {number} is over, so its max_steps and num_epochs cannot change"
            )
    total = total_steps(now[stage], n_groups)
    if total < found.steps:
        raise ConfigError(
            f"max_steps: {total}, but {found.name} is already {found.steps} steps into its stage; train that "
            "long at least, or name another output_dir"
        )
    for number, (old, new) in enumerate(list(zip(before, now))[stage:], stage + 1):
        if text := _other_length(old, new, n_groups):
            where = f"stage {number}: " if len(now) > 1 else ""
            console.print(f"[yellow]{where}{text}", highlight=False, soft_wrap=True)


def _other_length(old: Config, new: StageJob, n_groups: int) -> str:
    """What is said of a stage that takes other steps than the run was started with."""
    was, steps = total_steps(old, n_groups), total_steps(new, n_groups)
    if was == steps:
        return ""
    keys = [name for name in ("max_steps", "num_epochs") if getattr(old, name) != getattr(new, name)]
    word = lambda stage, name: "none" if getattr(stage, name) is None else f"{getattr(stage, name):g}"
    changes = ", ".join(f"{name}: {word(old, name)}, now {word(new, name)}" for name in keys)
    steps_now = f"{steps:,} steps, not {was:,}"
    return f"the run had {changes}: it takes {steps_now}, and the learning rate follows from here on"


def check_start(expected: str | None, namespace: str) -> None:
    """Raises DeadEndError where the stage's start weights are not those it started from."""
    if expected not in (None, namespace):
        raise DeadEndError(
            "model: these are not the start weights of the run in output_dir any more; give it the model it "
            "was started with, or start a new run, by --overwrite and without --resume"
        )


def rows_digest(*sets: Groups) -> str:
    """Fingerprint of the rows in their order: tokens, what is scored, the pairs, scores, labels, token
    weights and the reference columns."""
    digest = hashlib.blake2b(digest_size=16)
    for groups in sets:
        digest.update(len(groups).to_bytes(8, "little"))
        digest.update(facts_of(groups).digest.tobytes())
    return digest.hexdigest()
