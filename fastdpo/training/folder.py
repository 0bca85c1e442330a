"""The run folder: where a run leaves everything, what it must not overwrite, and where it goes on."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from fastdpo.config.reading import to_yaml
from fastdpo.data.chat.named import file_of
from fastdpo.errors import ConfigError
from fastdpo.files import durable
from fastdpo.files.names import gguf_path
from fastdpo.model.adapters import find_start
from fastdpo.training import checkpoint
from fastdpo.training.checkpoint import Checkpoint
from fastdpo.training.job import Job
from fastdpo.values import as_list

RUN_FILES = (
    *("config.yaml", "metrics.jsonl", "held_out.jsonl", "events.jsonl", "samples.jsonl", "data_report.json"),
    *("report.html", "plots", "tensorboard", "wandb", "tracker_id", "rounds", "checkpoints", "model"),
    *("eval", "explain"),
)
# A resumed run cuts them back to its checkpoint.
GROWING = ("metrics.jsonl", "held_out.jsonl", "samples.jsonl")


def free_folder(job: Job) -> Path:
    """The run folder's path; ConfigError where it holds another run and neither `overwrite` nor
    `resume` is set."""
    run = Path(job.output_dir)
    held = [name for name in RUN_FILES if (run / name).exists()]
    if held and not job.overwrite and not job.resume:
        raise ConfigError(
            f"output_dir: {run} already holds a run ({', '.join(held)}). "
            "Go on with it by --resume, replace it by --overwrite, or name another folder"
        )
    named = {name: getattr(job.config, name) for name in ("model", "adapter", "data", "eval_data")}
    named["model"] = gguf_path(job.config.model)
    named["chat_template"] = file_of(job.config.chat_template)
    for name, value in (named | {"the adapter's base": find_start(job.model).model}).items():
        for source in (Path(str(one).partition("#")[0]).resolve() for one in as_list(value)):
            for doomed in ((run / part).resolve() for part in held):
                if source == doomed or doomed in source.parents:
                    text = f"output_dir: the run would replace {name}: {source}. Name another folder"
                    raise ConfigError(text)
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").touch()
        (run / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write into the folder {run}: {error}") from None
    return run


@contextlib.contextmanager
def only_run_in(run: Path) -> Iterator[None]:
    """Holds the folder against a second process, and puts right what a crash left in it."""
    with contextlib.ExitStack() as until_end:
        try:
            until_end.enter_context(durable.held(run))
        except BlockingIOError:
            text = f"output_dir: another process is training into {run}; wait for it, or name another folder"
            raise ConfigError(text) from None
        for place in (run, run / "checkpoints"):
            durable.recover(place)
        yield


def open_run(run: Path, job: Job, reports: dict, found: Checkpoint | None, passed, console: Console) -> None:
    """Makes the run folder ready, once everything that can be wrong before the first step was right.

    Without a checkpoint, what an earlier run left is deleted (but for damaged checkpoints, those `passed`
    over, where the run was to be resumed); with one, the files that grow with the steps are cut back to
    where it was written.
    """
    checkpoint.set_aside(run / "checkpoints", passed)
    if found is None:
        clear(run, RUN_FILES if not job.resume else set(RUN_FILES) - {"checkpoints", "rounds"})
    for name, size in (found.state["files"] if found else {}).items():
        with (run / name).open("ab") as file:
            if (lost := size - file.tell()) > 0:
                console.print(f"[yellow]{name} has lost its last {lost:,} bytes", highlight=False)
            file.truncate(min(size, file.tell()))
    durable.write_text(run / "config.yaml", to_yaml(job.config))
    durable.write_text(run / "data_report.json", json.dumps(reports, indent=1))


@contextlib.contextmanager
def undone_if_refused(run: Path) -> Iterator[None]:
    """A run that turns out to be misconfigured before its first checkpoint leaves no run behind."""
    try:
        yield
    except ConfigError:
        if not checkpoint.found(run / "checkpoints"):
            clear(run, set(RUN_FILES) - {"checkpoints", "rounds"})
        raise


def clear(run: Path, names) -> None:
    """Deletes these of a run's files and folders."""
    for path in (run / name for name in names):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def growing_sizes(run: Path) -> dict[str, int]:
    """Bytes of the files that grow with the steps, now on the disk for good."""
    there = [run / name for name in GROWING if (run / name).exists()]
    for path in there:
        durable.sync(path)
    return dict.fromkeys(GROWING, 0) | {path.name: path.stat().st_size for path in there}
