"""tensorboard, wandb and trackio: where metrics go besides metrics.jsonl, when named and installed."""

import importlib
import json
import os
import shlex
import uuid
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fastdpo.errors import ConfigError

RUN_ID = "tracker_id"  # the file that keeps a run's id, so that a resumed run goes on in the same chart
_PROJECT = "fastdpo"


class TensorBoard:
    """Its writer, with the two methods that the other trackers' runs have."""

    def __init__(self, library, run: Path, run_id: str, config: dict, resumed_at: int | None):
        # What a killed run logged after its checkpoint is logged again: the viewer drops the first copy.
        purge = None if resumed_at is None else resumed_at + 1
        self._writer = library.SummaryWriter(log_dir=str(run / "tensorboard"), purge_step=purge)
        if resumed_at is None:
            self._writer.add_text("config", f"```json\n{json.dumps(config, indent=1)}\n```")

    def log(self, values: dict, step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def wandb(library, run: Path, run_id: str, config: dict, resumed_at: int | None):
    """Steps already there when a run resumes are refused by wandb itself, with a warning: the values,
    an exact resume's, are the same."""
    project, name = os.environ.get("WANDB_PROJECT", _PROJECT), run.resolve().name
    return library.init(project=project, name=name, id=run_id, dir=str(run), config=config, resume="allow")


def trackio(library, run: Path, run_id: str, config: dict, resumed_at: int | None):
    """Trackio knows a run by its name, so the name carries the id."""
    project, name = os.environ.get("TRACKIO_PROJECT", _PROJECT), f"{run.resolve().name}-{run_id}"
    return library.init(project=project, name=name, config=config, resume="allow")


def _tensorboard_command(run: Path) -> str:
    """All runs beside this one too, unless it lies among other things."""
    runs = run if run.parent in (Path(), Path.cwd(), Path.home(), Path("/")) else run.parent
    return f"tensorboard --logdir {shlex.quote(str(runs))}"


# name, also of the package to install -> (module, what opens it for a run, the command that shows it while it
# goes; the others say it themselves)
TRACKERS: dict[str, tuple] = {
    "tensorboard": ("torch.utils.tensorboard", TensorBoard, _tensorboard_command),
    "wandb": ("wandb", wandb, None),
    "trackio": ("trackio", trackio, None),
}


class Trackers:
    """The open trackers of a run. One that fails later is let go with a note: a run never ends for it."""

    def __init__(self, opened: dict, console: Console | None = None):
        self._open, self._console = opened, console or Console()

    def log(self, step: int, record: dict) -> None:
        """A line of metrics.jsonl, under the names that transformers' trainers use."""
        values = {
            f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}": value
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        }
        self._each(lambda tracker: tracker.log(values, step=step))

    def close(self) -> None:
        self._each(lambda tracker: tracker.finish())
        self._open = {}

    def _each(self, act) -> None:
        for name in list(self._open):
            try:
                act(self._open[name])
            except Exception as error:  # a network, a full disk, a service's limits
                del self._open[name]
                why = escape(f"{type(error).__name__}: {error}")
                note = f"[yellow]{name} stopped taking metrics ({why}); metrics.jsonl still has them all"
                self._console.print(note, soft_wrap=True)


def check_trackers(names: list[str]) -> None:
    """Raises ConfigError where a named tracker cannot be imported."""
    for name in names:
        _library(name)


def open_trackers(
    names: list[str], run: Path, config: dict, resumed_at: int | None, console: Console | None = None
) -> Trackers:
    """The named trackers, open for this run; `resumed_at` is the step of the checkpoint it goes on from.

    Raises ConfigError where one cannot start (not installed, not logged in).
    """
    libraries, opened = {name: _library(name) for name in names}, {}
    run_id = _run_id(run, resumed_at is not None) if names else ""
    for name, library in libraries.items():
        try:
            opened[name] = TRACKERS[name][1](library, run, run_id, config, resumed_at)
        except Exception as error:
            Trackers(opened, console).close()
            raise ConfigError(f"report_to: {name} does not start: {type(error).__name__}: {error}") from None
        if console and (command := TRACKERS[name][2]):
            console.print(f"watch the run: {escape(command(run))}", highlight=False, soft_wrap=True)
    return Trackers(opened, console)


def _library(name: str):
    try:
        library = importlib.import_module(TRACKERS[name][0])
    except ImportError:
        library = None
    # A folder named wandb beside the script imports as an empty package.
    if getattr(library, "__file__", None) is None:
        raise ConfigError(f"report_to: {name} is not installed: pip install {name}")
    return library


def _run_id(run: Path, resumed: bool) -> str:
    file = run / RUN_ID
    if not (resumed and file.exists()):
        file.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()
