"""Trackers: the calls each library gets, and the libraries themselves where they are installed."""

import io
import json
import math
import os
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.process import python_path
from fastdpo.errors import ConfigError
from fastdpo.training.trackers import RUN_ID, check_trackers, open_trackers

LINE = {"stage": 0, "step": 10, "loss": 0.5, "rewards/margins": 0.1, "note": "text"}
EVAL = {"stage": 0, "step": 10, "eval_loss": 0.6, "eval_rewards/margins": math.nan}


class Fake(types.ModuleType):
    """A module whose functions and objects write down how they were called."""

    def __init__(self, name, calls, fails=()):
        super().__init__(name)
        self.__file__, self._calls, self._fails = f"/{name}.py", calls, fails

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self._calls.append((name, *args, kwargs))
            if name in self._fails:
                raise RuntimeError(f"{name} failed")
            return self

        return call


@pytest.fixture
def fake(monkeypatch):
    def install(name, *fails):
        calls = []
        monkeypatch.setitem(sys.modules, name, Fake(name, calls, fails))
        return calls

    return install


@pytest.mark.parametrize("name, key", [("wandb", "id"), ("trackio", "name")])
def test_a_resumed_run_goes_on_in_the_same_chart(tmp_path, fake, name, key):
    calls, run = fake(name), tmp_path / "first"
    run.mkdir()
    for resumed_at in (None, 10):
        trackers = open_trackers([name], run, {"beta": 0.1}, resumed_at)
        trackers.log(10, LINE)
        trackers.log(10, EVAL)
        trackers.close()
    opened = [call[-1] for call in calls if call[0] == "init"]
    assert opened[0] == opened[1]
    assert (run / RUN_ID).read_text().strip() in opened[0][key]
    assert opened[0]["resume"] == "allow" and opened[0]["project"] == "fastdpo"
    assert opened[0]["config"] == {"beta": 0.1} and opened[0]["name"].startswith("first")
    logged = [call for call in calls if call[0] == "log"]
    train = {"train/stage": 0, "train/loss": 0.5, "train/rewards/margins": 0.1}
    assert logged[0] == ("log", train, {"step": 10})
    assert set(logged[1][1]) == {"train/stage", "eval/loss", "eval/rewards/margins"}
    assert [call[0] for call in calls].count("finish") == 2
    open_trackers([name], run, {}, None).close()  # the folder's run was replaced: a new chart
    assert [call[-1] for call in calls if call[0] == "init"][2][key] != opened[0][key]


def test_projects_from_the_environment(tmp_path, fake, monkeypatch):
    calls = fake("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_trackers(["wandb"], tmp_path, {}, None)
    assert calls[0][-1]["project"] == "mine"


def test_tensorboard_purges_what_comes_again(tmp_path, fake):
    calls = fake("torch.utils.tensorboard")
    open_trackers(["tensorboard"], tmp_path, {"beta": 0.1}, None).log(10, LINE)
    open_trackers(["tensorboard"], tmp_path, {"beta": 0.1}, 20).close()
    writers = [call[-1] for call in calls if call[0] == "SummaryWriter"]
    assert [w["purge_step"] for w in writers] == [None, 21]
    assert writers[0]["log_dir"] == str(tmp_path / "tensorboard")
    assert ("add_scalar", "train/loss", 0.5, 10, {}) in calls and ("flush", {}) in calls
    assert [call[0] for call in calls].count("add_text") == 1


@pytest.mark.parametrize(
    ("run", "where"), [("runs/first", "runs"), ("first", "first"), ("my runs/first", "'my runs'")]
)
def test_the_command_that_shows_a_run_is_said(tmp_path, fake, monkeypatch, run, where):
    console = Console(file=io.StringIO(), width=40)
    fake("torch.utils.tensorboard")
    monkeypatch.chdir(tmp_path)
    Path(run).mkdir(parents=True)
    open_trackers(["tensorboard"], Path(run), {}, None, console).close()
    assert console.file.getvalue() == f"watch the run: tensorboard --logdir {where}\n"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_is_named_before_training(tmp_path, monkeypatch, name):
    module = "torch.utils.tensorboard" if name == "tensorboard" else name
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=f"report_to: {name} is not installed: pip install {name}"):
        check_trackers([name])
    with pytest.raises(ConfigError):
        open_trackers([name], tmp_path, {}, None)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_the_same_name_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="pip install wandb"):
        check_trackers(["wandb"])
    sys.modules.pop("wandb", None)


def test_one_that_does_not_start_closes_the_others(tmp_path, fake):
    calls = fake("trackio")
    fake("wandb", "init")
    with pytest.raises(ConfigError, match="report_to: wandb does not start: RuntimeError: init failed"):
        open_trackers(["trackio", "wandb"], tmp_path, {}, None)
    assert [call[0] for call in calls] == ["init", "finish"]


def test_one_that_fails_later_is_let_go(tmp_path, fake):
    console = Console(file=io.StringIO(), width=200)
    lost, kept = fake("wandb", "log"), fake("trackio")
    trackers = open_trackers(["wandb", "trackio"], tmp_path, {}, None, console)
    trackers.log(10, LINE)
    trackers.log(20, LINE)
    trackers.close()
    assert [call[0] for call in lost] == ["init", "log"]
    assert [call[0] for call in kept] == ["init", "log", "log", "finish"]
    assert console.file.getvalue().count("wandb stopped taking metrics (RuntimeError: log failed)") == 1


def test_none(tmp_path):
    trackers = open_trackers([], tmp_path, {}, None)
    trackers.log(1, LINE)
    trackers.close()
    assert not list(tmp_path.iterdir())


def test_tensorboard_itself(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(["tensorboard"], tmp_path, {"beta": 0.1}, None)
    for step in (10, 20, 30):
        trackers.log(step, LINE | {"loss": step / 10})
    trackers.close()
    resumed = open_trackers(["tensorboard"], tmp_path, {"beta": 0.1}, 20)
    resumed.log(30, LINE | {"loss": 3.5})
    resumed.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    values = [(e.step, round(e.value, 4)) for e in events.Scalars("train/loss")]
    assert values == [(10, 1.0), (20, 2.0), (30, 3.5)]


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resumed_at in (None, 10):
        trackers = open_trackers(["wandb"], tmp_path, {"beta": 0.1}, resumed_at)
        trackers.log(10, LINE)
        trackers.close()
    run_id = (tmp_path / RUN_ID).read_text().strip()
    files = list((tmp_path / "wandb").rglob(f"run-{run_id}.wandb"))
    assert files and all(path.stat().st_size for path in files)


def test_trackio_itself(tmp_path, monkeypatch):
    """In a process of its own: trackio reads its folder from the environment when imported."""
    pytest.importorskip("trackio")
    import sqlite3
    import subprocess

    script = "from pathlib import Path; from fastdpo.training.trackers import open_trackers\n"
    script += f"run, line = Path({str(tmp_path)!r}), {LINE!r}\n"
    script += "for at in (None, 10):\n  t = open_trackers(['trackio'], run, {'beta': 0.1}, at)\n"
    script += "  t.log(20 if at else 10, line)\n  t.close()\n"
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    environment = os.environ | python_path()
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, env=environment)
    (database,) = Path(tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(database).execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    assert [step for _, step, _ in rows] == [10, 20] and len({name for name, *_ in rows}) == 1
    assert json.loads(rows[0][2])["train/loss"] == 0.5
