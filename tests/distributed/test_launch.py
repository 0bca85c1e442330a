"""`fastdpo train --gpus 2`, from a shell: what it ends with, however it ends."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_runs import apart
from tests.tiny import rows, save_model, write_jsonl

SECONDS = 180


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Starts `fastdpo train` into a folder."""
    folder = tmp_path_factory.mktemp("launch")
    given = dict(model=save_model(folder / "model"), data=write_jsonl(folder / "train.jsonl", rows(24)))
    given |= dict(optim="sgd", learning_rate=1e-2, batch_size=4, max_length=64, dtype="fp32", samples=0)
    given |= dict(lr_scheduler_type="constant", save_steps=20, logging_steps=1, data_cache="off")
    env = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}

    def start(run: Path, gpus: int, **keys) -> subprocess.Popen:
        flags = [str(w) for k, v in (given | dict(output_dir=run) | keys).items() for w in (f"--{k}", v)]
        words = [sys.executable, "-m", "fastdpo", "train", *flags, "--gpus", str(gpus)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        return subprocess.Popen(words, **pipes)

    return start


def ended(process) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=SECONDS)
    return process.returncode, out, err


def reached(process, step: int) -> None:
    """Returns when a step was logged."""
    for line in process.stdout:
        if (found := re.match(r"step +(\d+)", line)) and int(found[1]) >= step:
            return
    raise AssertionError(ended(process))


def pid_of(rank: int, launcher: int) -> int:
    """The process of a rank, of torchrun's that this launcher started."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in environment:
            return int(path.name)
    raise AssertionError("no such process")


def test_two_processes_end_with_the_model_of_one(command, tmp_path):
    runs = [tmp_path / str(gpus) for gpus in (1, 2)]
    for gpus, run in enumerate(runs, 1):
        code, out, err = ended(command(run, gpus, max_steps=10, max_tokens=60))
        assert code == 0, err
        assert err == "" and out.count("done: the model is in") == out.count("next: ") == 1
        assert ("2 processes, each with all weights" in out) == (gpus == 2)
    assert apart(*runs) < 1e-5


def test_a_signal_stops_all_and_a_killed_rank_ends_all(command, tmp_path):
    run, keys = tmp_path / "run", dict(max_steps=2000, max_tokens=60)
    first = command(run, 2, **keys)
    reached(first, 5)
    first.send_signal(signal.SIGINT)
    code, out, err = ended(first)
    assert code == 130 and err.count("stopped by SIGINT; the newest checkpoint is") == 1, err
    assert out.count("SIGINT: stopping once this step is done") == 1 and "Traceback" not in err + out
    stopped_at = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]

    second = command(run, 2, resume=True, **keys)
    reached(second, stopped_at + 25)
    os.kill(pid_of(1, second.pid), signal.SIGKILL)
    code, out, err = ended(second)
    assert code == 128 + signal.SIGKILL and "Traceback" not in err, err
    assert err.count("has lost another process of this run") == 1
    assert err.count("the same command with --resume goes on from it") == 1
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events if e["event"] in ("stopped", "error", "done")] == ["stopped", "error"]

    newest = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    code, out, err = ended(command(run, 1, resume=True, max_steps=newest + 3, max_tokens=60))
    assert code == 0 and "the run had 2 processes, now 1" in out, err
