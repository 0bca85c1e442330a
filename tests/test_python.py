"""fastdpo from Python: train and fill_reference take what the command takes, wherever they are called."""

import doctest
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

import fastdpo
from fastdpo import api
from fastdpo.config.keys import from_values
from fastdpo.errors import ConfigError
from tests.docs.workplace import furnish
from tests.tiny import rows, save_model, write_jsonl

QUIET = Console(quiet=True)
GIVEN = {"model": "m", "data": "d.jsonl", "learning_rate": "1e-6", "eval_data": "0.05", "batch_size": 4}
THEIRS = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "learning_rate": 1e-6, "loss_type": "ipo"}


@pytest.fixture
def asked(monkeypatch):
    """The configs that training is asked for, in the place of the training."""
    configs = []
    monkeypatch.setattr(api.trainer, "train", lambda config, *_: configs.append(config))
    monkeypatch.setattr(api.trainer, "fill_reference", lambda config, *_: configs.append(config))
    return configs


@pytest.fixture
def toy(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", rows(12))
    small = {"batch_size": 4, "max_length": 64, "max_steps": 2, "samples": 0, "learning_rate": 1e-3}
    return small | {"model": save_model(tmp_path / "model"), "data": data, "logging_steps": 1}


@pytest.mark.parametrize("call", [fastdpo.train, fastdpo.fill_reference])
def test_each_way_to_say_it_is_the_same_config(call, asked, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(GIVEN))
    for given in (GIVEN, from_values(GIVEN), file, str(file)):
        call(given)
        call(given, seed=3, learning_rate=2e-6)  # keys win
    call(**GIVEN)
    call(console=QUIET, **GIVEN)
    call(dict(GIVEN, seed=1), seed=3, learning_rate="2e-6")
    plain, over = from_values(GIVEN), from_values(GIVEN | {"seed": 3, "learning_rate": 2e-6})
    assert asked == [plain, over] * 4 + [plain, plain, over]


def test_values_of_python(asked):
    """A path, a tuple, numbers of numpy: what config.yaml and the checkpoints can hold."""
    values = {"batch_size": np.int64(4), "beta": np.float32(0.5), "objective_args": {"f": np.float64(2)}}
    values |= {"report_to": ("wandb", "trackio"), "load_best": np.bool_(False), "eval_data": Path("held")}
    fastdpo.train(model=Path("m"), data=Path("d.jsonl"), lora_rank=None, **values | {"objective_args": None})
    plain = {"batch_size": 4, "beta": 0.5, "report_to": ["wandb", "trackio"], "eval_data": "held"}
    assert asked == [from_values({"model": "m", "data": "d.jsonl"} | plain)]
    assert type(asked[0].batch_size) is int and type(asked[0].beta) is float
    fastdpo.train(model="m", data="d", stages=[{"learning_rate": np.float64(1)}, {"max_steps": np.int64(2)}])
    assert yaml.safe_dump(asked[1].stages) == "- learning_rate: 1.0\n- max_steps: 2\n"


def test_other_trainers_keys_are_translated_and_said(asked, capsys):
    fastdpo.train(THEIRS)
    assert "read as a config of TRL" in capsys.readouterr().err
    assert (asked[0].objective, asked[0].max_length, asked[0].num_epochs) == ("ipo", 1024, 3)
    fastdpo.train(GIVEN, num_train_epochs=2)  # a key by name is as a flag: no other default of theirs comes
    assert "num_train_epochs 2 -> num_epochs 2" in capsys.readouterr().err
    assert asked[1] == from_values(GIVEN | {"num_epochs": 2})
    with pytest.raises(ConfigError, match="sync_ref_model"):
        fastdpo.train(THEIRS, sync_ref_model=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rat": 1}, "unknown key 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"batch_size": "many"}, "batch_size: expected a whole number, got 'many'"),
        ({"batch_size": 0}, "batch_size: 0 is below 1"),
        ({"data": None}, "data: expected text or a list, got None"),
        (["m"], "expected keys, a dict of keys, a Config or a YAML file's name, got a list"),
        ("no.yaml", "cannot read the config file no.yaml: No such file or directory"),
    ],
)
def test_mistakes_are_answered(given, said):
    with pytest.raises(ConfigError) as caught:
        fastdpo.train(GIVEN | given if isinstance(given, dict) else given)
    assert said in str(caught.value)
    if isinstance(given, dict):
        with pytest.raises(ConfigError) as caught:
            fastdpo.train(GIVEN, **given)
        assert said in str(caught.value)


def test_nothing_given_is_said():
    with pytest.raises(ConfigError, match="model: missing"):
        fastdpo.train()


def test_its_docstring_runs(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in doctest.DocTestParser().get_examples(fastdpo.train.__doc__):
        exec(example.source, names)
    assert {path.name for path in Path("runs").iterdir()} >= {"fastdpo", "rate-1e-06", "rate-5e-06"}
    assert names["folder"] == Path("runs/rate-5e-06") and (names["folder"] / "report.html").is_file()


def test_again_in_one_process_is_the_same_and_nothing_is_kept(toy, tmp_path):
    """As in a notebook: a run leaves no state to the next one, and no model in memory."""
    again = [fastdpo.train(toy, QUIET, output_dir=tmp_path / name, lora_rank=4) for name in ("a", "b")]
    weights = [(folder / "model/adapter_model.safetensors").read_bytes() for folder in again]
    assert weights[0] == weights[1]
    losses = [[json.loads(line)["loss"] for line in open(folder / "metrics.jsonl")] for folder in again]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    gc.collect()
    assert not [one for one in gc.get_objects() if type(one) is fastdpo.Policy]
    with pytest.raises(ConfigError, match="holds a run"):
        fastdpo.train(toy, QUIET, output_dir=again[0], lora_rank=4)
    fastdpo.train(toy, QUIET, output_dir=again[0], lora_rank=4, overwrite=True)


def test_in_a_thread(toy, tmp_path):
    """Python allows no signal handlers there: a run does without, and signals stay whose they are."""
    before, done = signal.getsignal(signal.SIGINT), []
    run = lambda: done.append(fastdpo.train(toy, QUIET, output_dir=tmp_path / "run"))
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert done == [tmp_path / "run"] and (done[0] / "model").is_dir()
    assert signal.getsignal(signal.SIGINT) is before


def test_python_m_fastdpo_and_a_quick_import():
    script = "import sys, fastdpo; print(fastdpo.__version__); "
    script += "assert not {'torch', 'email', 'importlib.metadata', 'rich', 'cyclopts'} & set(sys.modules)"
    for words in (("-m", "fastdpo", "--version"), ("-m", "fastdpo.cli", "--version"), ("-c", script)):
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=os.environ)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split()[-1] == fastdpo.__version__
