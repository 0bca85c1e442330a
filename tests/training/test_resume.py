"""A run that stops, is killed or finds its files damaged goes on exactly, or says why it cannot."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.data.load import load_groups
from fastdpo.errors import ConfigError, DataError, Stopped, TrainingError
from fastdpo.training import checkpoint
from fastdpo.training.resume import check_settings
from fastdpo.training.stage import Stage
from fastdpo.training.stopping import Stopping
from tests.tiny import rows, save_model, write_jsonl
from tests.training.killing import TIMED

ROOT = Path(__file__).resolve().parents[2]
TWO_STAGES = [dict(objective="sft", max_steps=4), dict(max_steps=5)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    model = save_model(folder / "model")
    return dict(model=model, data=write_jsonl(folder / "rows.jsonl", rows(20)))


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """Its own tests draw it, and the killed runs do."""
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture
def make(inputs, tmp_path):
    """Config of a short run in a folder of the test's own."""

    def make(name="run", **keys):
        values = dict(
            output_dir=str(tmp_path / name),
            eval_data=0.2,
            learning_rate=1e-3,
            batch_size=4,
            max_steps=8,
            max_length=64,
            logging_steps=3,
            eval_steps=4,
            save_steps=3,
            samples=0,
            dtype="fp32",
        )
        return Config(**inputs | values | keys)

    return make


@contextmanager
def stopped_in_step(n, number=signal.SIGTERM, where=(Stage, "step")):
    """Inside, the n-th optimizer step (or other call) sends a signal to this process as it ends, and the run
    must end with Stopped."""
    call, seen = getattr(*where), []

    def stopping(*args, **keys):
        seen.append(call(*args, **keys))
        if len(seen) == n:
            os.kill(os.getpid(), number)
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped) as stop:
        patch.setattr(*where, stopping)
        yield stop


def run(config):
    """Trains; everything it printed."""
    console = Console(record=True, quiet=False, width=1000, file=open(os.devnull, "w"))
    train(config, console)
    return console.export_text()


def outcome(config):
    folder = Path(config.output_dir)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    (weights,) = (folder / "model").glob("*.safetensors")
    untimed = [{k: v for k, v in line.items() if k not in TIMED} for line in lines]
    return untimed, weights.read_bytes()


def events(config, name):
    lines = map(json.loads, (Path(config.output_dir) / "events.jsonl").read_text().splitlines())
    return [line for line in lines if line["event"] == name]


def names(config):
    return [path.name for path in checkpoint.found(Path(config.output_dir) / "checkpoints")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("n", [1, 3, 4, 8])
@pytest.mark.parametrize(
    "keys", [{}, dict(stages=TWO_STAGES, lora_rank=2, load_best=True)], ids=["plain", "lora"]
)
def test_a_stopped_run_goes_on_bit_by_bit(make, keys, n, number):
    whole, cut = make("whole", **keys), make("cut", **keys)
    run(whole)
    with stopped_in_step(n, number) as stop:
        run(cut)
    assert stop.value.signal == number and f"step-{n}" in str(stop.value) and "--resume" in str(stop.value)
    assert not (Path(cut.output_dir) / "model").exists()
    assert events(cut, "stopped")[0]["signal"] == number.name
    printed = run(replace(cut, resume=True))
    assert f"going on from {cut.output_dir}/checkpoints/step-{n}" in printed
    assert outcome(cut) == outcome(whole)


@pytest.mark.parametrize("n", range(3, 11))
def test_a_signal_just_after_the_run_looked_for_one_loses_no_step(make, monkeypatch, n):
    step, steps = Stage.step, []
    monkeypatch.setattr(Stage, "step", lambda *args: steps.append(1) or step(*args))
    config = make()
    with stopped_in_step(n, where=(Stopping, "requested")):
        run(config)
    assert names(config)[-1:] == [f"step-{len(steps)}"] * bool(steps)


def test_a_second_run_is_bitwise_the_same(make, tmp_path):
    one, two = (make(name, reference_cache=str(tmp_path / f"{name}.db")) for name in ("one", "two"))
    run(one), run(two)
    assert outcome(one) == outcome(two)
    run(one_more := replace(one, output_dir=str(tmp_path / "cached")))  # from the cache that `one` filled
    assert outcome(one_more) == outcome(one)


BF16 = dict(dtype="bf16", max_tokens=60)  # microbatches that linear_logp adds to one gradient of the head


@pytest.mark.parametrize("keys", [{}, dict(lora_rank=2), BF16], ids=["full", "lora", "bf16"])
def test_max_steps_can_be_raised(make, keys):
    """With a constant learning rate, 5 steps and then 8 are the same as 8 at once."""
    keys = keys | dict(lr_scheduler_type="constant", save_steps=None)
    whole, short = make("whole", **keys), make("short", max_steps=5, **keys)
    run(whole), run(short)
    run(replace(short, resume=True, max_steps=8))
    assert outcome(short)[1] == outcome(whole)[1]
    assert outcome(short)[0][-1] == outcome(whole)[0][-1]
    with pytest.raises(ConfigError, match=r"max_steps: 6, but step-8 is already 8 .*; train that"):
        run(replace(short, resume=True, max_steps=6))


def test_a_finished_run_resumed_is_the_same_run(make):
    config = make()
    run(config)
    before = outcome(config)
    shutil.rmtree(Path(config.output_dir) / "model")  # killed before the model was written, say
    run(replace(config, resume=True))
    assert outcome(config) == before


def test_checkpoints_hold_no_pickle_and_can_be_read(make):
    config = make()
    run(config)
    folder = Path(config.output_dir) / "checkpoints/step-8"
    assert {p.name for p in folder.iterdir()} == {
        "weights.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    weights = load_file(folder / "weights.safetensors")
    assert "lm_head.weight" in weights and load_file(folder / "optimizer.safetensors")


@pytest.mark.parametrize("load_best", [False, True])
def test_the_last_k_and_the_best_are_kept(make, swapped, load_best):
    config = make(eval_data=swapped, max_steps=6, save_steps=1, eval_steps=2, load_best=load_best)
    run(config)
    losses = {r["step"]: r["eval_loss"] for r in outcome(config)[0] if "eval_loss" in r and r["step"]}
    best = 1 if load_best else 2  # load_best judges every checkpoint
    assert min(losses, key=losses.get) == best
    assert names(config) == [f"step-{best}", "step-5", "step-6"]
    saved = load_file(Path(config.output_dir) / "model/model.safetensors")
    same_as = f"checkpoints/step-{best if load_best else 6}/weights.safetensors"
    expected = load_file(Path(config.output_dir) / same_as)
    assert all((saved[name] == expected[name]).all() for name in saved)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(make, file, how):
    config = make()
    run(config)
    before = outcome(config)
    path = Path(config.output_dir) / "checkpoints/step-8" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data if how == "flip" else data[:-1])
    if how == "delete":
        path.unlink()
    printed = run(replace(config, resume=True))
    assert "step-8 cannot be used" in printed and "going on from" in printed and "step-6" in printed
    assert file in printed or how != "delete"
    assert events(config, "resume")[0]["skipped"].keys() == {"step-8"}
    assert outcome(config) == before


def test_with_every_checkpoint_damaged_it_starts_over_aloud(make):
    config = make()
    with stopped_in_step(4):
        run(config)
    for path in (Path(config.output_dir) / "checkpoints").glob("*/state.json"):
        path.write_text("{}")
    printed = run(replace(config, resume=True))
    assert "step-4 cannot be used" in printed and "starts from the beginning" in printed
    assert {p.name for p in (Path(config.output_dir) / "checkpoints").glob("damaged-*")} == {
        "damaged-step-3",
        "damaged-step-4",
    }
    whole = make("whole")
    run(whole)
    assert outcome(config) == outcome(whole)


def test_a_checkpoint_of_a_newer_version_is_refused_and_left_alone(make, monkeypatch):
    config = make(max_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        run(config)
    with pytest.raises(ConfigError, match="format 99, of a newer fastdpo; this one knows 1"):
        run(replace(config, resume=True))
    assert names(config) == ["step-2"]


@pytest.fixture
def swapped(tmp_path):
    """Held-out rows with the answers swapped: they get worse from the first step on."""
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(8, seed=1)]
    return write_jsonl(tmp_path / "eval.jsonl", swapped)


def test_a_damaged_one_takes_no_good_one_with_it(make, swapped):
    """Damaged newer checkpoints are moved aside, so they neither count as newest nor get good ones pruned."""
    config = make(save_total_limit=1, save_steps=2, load_best=True, eval_data=swapped)
    run(config)
    assert names(config) == ["step-2", "step-8"]
    (Path(config.output_dir) / "checkpoints/step-8/state.json").unlink()
    with stopped_in_step(1):
        run(replace(config, resume=True))
    assert names(config) == ["step-2", "step-3"]
    assert (Path(config.output_dir) / "checkpoints/damaged-step-8").exists()


def test_a_damaged_best_is_said_and_the_last_weights_end_the_stage(make, swapped):
    config = make(eval_data=swapped, max_steps=6, save_steps=1, eval_steps=2, load_best=True)
    with stopped_in_step(5):
        run(config)
    best = Path(config.output_dir) / "checkpoints/step-1/weights.safetensors"
    best.write_bytes(best.read_bytes()[:-1])
    printed = run(replace(config, resume=True))
    assert "step-1 cannot be used" in printed and "the stage ends with step-6" in printed


def test_leftovers_of_a_killed_write_go(make):
    config = make()
    with stopped_in_step(4):
        run(config)
    folder = Path(config.output_dir) / "checkpoints"
    shutil.copytree(folder / "step-4", folder / ".step-7.part")
    os.rename(folder / "step-4", folder / ".step-4.old")  # killed between the two renames of a rewrite
    printed = run(replace(config, resume=True))
    assert "checkpoints/step-4" in printed and not list(folder.glob(".*"))


def test_the_start_of_a_later_stage_is_checked_too(make):
    config = make(stages=TWO_STAGES)
    with stopped_in_step(6):
        run(config)
    assert names(config) == ["step-4", "step-6"]
    path = Path(config.output_dir) / "checkpoints/step-4/weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    printed = run(replace(config, resume=True))
    assert "step-6 cannot be used: step-4, which it needs" in printed
    whole = make("whole", stages=TWO_STAGES)
    run(whole)
    assert outcome(config) == outcome(whole)


@pytest.mark.parametrize(
    "keys, text",
    [
        (dict(beta=0.3), "beta: the run in output_dir was started with None, this config says 0.3"),
        (dict(batch_size=2), "batch_size"),
        (dict(stages=[dict(beta=0.3)]), "stages: the run in output_dir was started with '0 stages'"),
    ],
)
def test_another_config_is_refused(make, keys, text):
    config = make(max_steps=2)
    run(config)
    with pytest.raises(ConfigError, match=text):
        run(replace(config, resume=True, **keys))


def test_other_rows_and_other_weights_are_refused(make, inputs, tmp_path):
    config = make(max_steps=2)
    data, model = shutil.copy(inputs["data"], tmp_path), shutil.copytree(inputs["model"], tmp_path / "m")
    config = replace(config, data=str(data), model=str(model))
    run(config)
    write_jsonl(data if isinstance(data, Path) else Path(data), rows(20, seed=5))
    with pytest.raises(ConfigError, match=r"the rows \(or the tokenizer\) are no longer those"):
        run(replace(config, resume=True))
    shutil.copy(inputs["data"], tmp_path)
    save_model(tmp_path / "m", initializer_range=0.2)
    with pytest.raises(
        TrainingError, match=r"start weights of the run.*what differs: config, weights"
    ) as stop:
        run(replace(config, resume=True))
    said = str(stop.value)
    assert "--overwrite and without --resume" in said and "the same command" not in said
    run(replace(config, overwrite=True))


def test_a_resumed_run_says_that_it_takes_other_steps(make):
    """20 rows but for the 4 held out, 4 a step: an epoch is 4 steps."""
    config = make(max_steps=2, num_epochs=2.0)
    run(config)
    assert "the run had" not in run(replace(config, resume=True))
    said = run(replace(config, resume=True, max_steps=None))
    assert (
        "the run had max_steps: 2, now none: it takes 8 steps, not 2, and the learning rate follows" in said
    )
    assert outcome(config)[0][-1]["step"] == 8


def test_another_name_of_the_loss_is_no_other_run(make):
    config = make(max_steps=2, objective="dpo")
    run(config)
    run(replace(config, resume=True, objective="sigmoid"))
    staged = make("staged", stages=[dict(objective="SFT", max_steps=1), dict(objective="dpo", max_steps=1)])
    run(staged)
    same = [dict(objective="sft", max_steps=1), dict(objective="sigmoid", max_steps=1)]
    run(replace(staged, resume=True, stages=same))
    with pytest.raises(ConfigError, match="objective: the run in output_dir was started with 'dpo'"):
        run(replace(config, resume=True, objective="ipo"))


def test_a_config_that_was_kept_in_other_words_is_no_other_run():
    now = dataclasses.asdict(Config(model="m", data="d", lora_target_modules="lm_head"))
    assert now["lora_target_modules"] == ["lm_head"]
    check_settings(now | {"lora_target_modules": "lm_head"}, now)
    with pytest.raises(ConfigError, match="lora_target_modules: the run in output_dir was started with"):
        check_settings(now | {"lora_target_modules": "q_proj"}, now)


def test_what_was_ignored_is_no_other_run():
    now = dataclasses.asdict(Config(model="m", data="d"))
    check_settings(now | {"ignore": {"lora_dropout": 0.1}}, now)


def test_a_wrong_eval_data_shows_before_the_rows_are_read(make, monkeypatch):
    read = []
    load = "fastdpo.data.load.load_groups"
    monkeypatch.setattr(
        load, lambda name, *args, _load=load_groups, **k: read.append(name) or _load(name, *args, **k)
    )
    with pytest.raises(DataError, match=r"eval_data: 'nowhere\.jsonl' does not exist here"):
        run(make(eval_data="nowhere.jsonl"))
    assert read == ["nowhere.jsonl"]


def test_a_folder_with_a_run_is_refused_without_resume_or_overwrite(make):
    config = make(max_steps=2)
    run(config)
    with pytest.raises(ConfigError, match=r"already holds a run .*--resume.*--overwrite"):
        run(config)
    run(replace(config, overwrite=True))
    shutil.rmtree(Path(config.output_dir) / "checkpoints")
    with pytest.raises(ConfigError, match="holds a finished model and no checkpoint"):
        run(replace(config, resume=True))
    run(replace(config, resume=True, overwrite=True))


def test_resume_of_nothing_starts(make):
    config = make(resume=True, max_steps=2)
    assert "holds no run: the run starts from the beginning" in run(config)
    assert len(outcome(config)[0]) == 3


def test_two_processes_do_not_share_a_folder(make):
    config = make(max_steps=2)
    holder = "import fcntl, os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); fcntl.flock(fd, fcntl.LOCK_EX)"
    Path(config.output_dir).mkdir()
    code = holder + "; print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, config.output_dir], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout.readline()
        with pytest.raises(ConfigError, match=r"another process is training into .*; wait"):
            run(config)
    finally:
        other.kill()
        other.wait()
    run(config)


@pytest.fixture
def small_disk(tmp_path):
    """A 1.5 MB file system."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1536k", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this process may not mount: {done.stderr.strip()}")
    except FileNotFoundError:
        pytest.skip("no mount command")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_loses_nothing(make, small_disk):
    whole, config = make("whole"), make(output_dir=str(small_disk / "run"))
    run(whole)
    with pytest.raises(TrainingError) as error:
        run(config)
    assert "No space left" in str(error.value) and "--resume" in str(error.value)
    assert names(config)  # some were written before the disk was full
    assert not list(small_disk.glob("run/checkpoints/.*"))  # nothing half-written takes room
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run(replace(config, resume=True))
    assert outcome(config) == outcome(whole)


def test_a_read_only_folder_is_an_error_before_any_work(make, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    config = make(output_dir=str(small_disk / "run"))
    with pytest.raises(ConfigError, match=r"output_dir: cannot write into the folder .*Read-only"):
        run(config)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_with_a_code_that_says_so(make, number):
    config = make(max_steps=100000, save_steps=None, eval_steps=None, logging_steps=1)
    flags = [f"--{name}={value}" for name, value in vars(config).items() if value is not None]
    command = [sys.executable, "-m", "fastdpo.cli", "train", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    metrics = Path(config.output_dir) / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_text().count("\n") < 3):
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + number
    assert f"stopped by {number.name}; the newest checkpoint is {config.output_dir}/checkpoints/step-" in err
    assert (Path(config.output_dir) / "report.html").exists() and len(names(config)) == 1


def kill_runs(kills):
    command = [sys.executable, "-m", "tests.training.killing", "--kills", str(kills), "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "weights, metrics and samples bitwise equal" in done.stdout


def test_killed_runs_end_bitwise_as_undisturbed_ones():
    kill_runs(12)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_kills():
    kill_runs(200)


def test_a_signal_while_the_model_loads_ends_the_run_at_once(make, monkeypatch):
    def load(*args):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("fastdpo.model.source.AutoModelForCausalLM.from_pretrained", lambda *a, **k: load())
    with pytest.raises(Stopped) as stop:
        run(make())
    assert stop.value.signal == signal.SIGINT


def test_a_run_that_is_refused_late_leaves_nothing_and_deletes_nothing(make):
    config = make(max_steps=2)
    run(config)
    before = outcome(config)
    bad = dict(reference_cache="/proc/none/cache.sqlite")
    with pytest.raises(ConfigError, match="reference_cache"):
        run(replace(config, overwrite=True, **bad))
    assert outcome(config) == before
    fresh = make("fresh", **bad)
    with pytest.raises(ConfigError, match="reference_cache"):
        run(fresh)
    run(replace(fresh, reference_cache="off"))
