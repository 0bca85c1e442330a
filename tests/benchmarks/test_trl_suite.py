"""benchmarks.peers.trl_suite without TRL's checkout: a test module of our own in its place."""

import copy

import datasets
import pytest
import transformers

from benchmarks.peers import trl_suite, trl_suite_models
from benchmarks.peers.trl_suite import LIMITS, compare, relative, run_tests

pytestmark = pytest.mark.peer

TESTS = """
import pytest
import trl
from datasets import Dataset

ROWS = [{"prompt": f"one two {i}", "chosen": " three" * (1 + i), "rejected": " four five"} for i in range(4)]

@pytest.fixture
def train(tmp_path):
    def train(**settings):
        config = trl.DPOConfig(str(tmp_path), use_cpu=True, report_to="none", max_steps=2,
                               per_device_train_batch_size=2, logging_steps=1, **settings)
        trainer = trl.DPOTrainer("tiny", args=config, train_dataset=Dataset.from_list(ROWS))
        trainer.train()
    return train

@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_trains(train, beta):
    train(beta=beta)

def test_half(train):
    train(bf16=True)

def test_stored(train):
    train(precompute_ref_log_probs=True)

def test_without_a_trainer():
    pass

def test_fails():
    raise OSError("not on this machine")

def test_skips():
    pytest.skip("no GPU")
"""
WRONG = """
import fastdpo.integrations.trl_forward as ours

right = ours.token_logp

def wrong(*args, **kwargs):
    logp, stats = right(*args, **kwargs)
    return 0.99 * logp, stats

ours.token_logp = wrong
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    tokenizer = trl_suite_models.make_tokenizer(["one two three four five"] * 9)
    family, options, template = trl_suite_models.MODELS["tiny-Qwen2ForCausalLM-2.5"]
    config = getattr(transformers, f"{family}Config")(
        **trl_suite_models.token_ids(tokenizer) | trl_suite_models.SIZES | options
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    trl_suite_models.save(model, tokenizer, template, folder / "tiny")
    (folder / "test_small.py").write_text(TESTS)
    (folder / "wrong.py").write_text(WRONG)
    return folder


@pytest.fixture(scope="module")
def runs(work):
    # `wrong` is found beside the tests, where python -m pytest looks first
    options = {"stock": [], "patched": ["--patch"], "wrong": ["--patch", "-p", "wrong"]}
    return run_tests(work, "test_small.py", {k: ["--float32", *v] for k, v in options.items()}, [])


def test_stock_and_patched_are_the_same(runs):
    compared = {each.test.split("::")[1]: each for each in compare(runs["stock"], runs["patched"])}
    assert {name: each.stock for name, each in compared.items()} == {
        **dict.fromkeys(("test_trains[0.1]", "test_trains[0.5]", "test_half", "test_stored"), "passed"),
        "test_without_a_trainer": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
    }
    assert not [fault for each in compared.values() for fault in each.faults]
    trains = compared["test_trains[0.1]"]
    assert trains.forwards == 2 and trains.modes == ["shared"] * 2  # policy and reference, once each
    assert 0 < trains.largest["tokens"] < 1e-6 and trains.largest["gradient"] < 1e-5
    assert compared["test_half"].largest["tokens"] > 1e-5  # the half's own limits were taken
    assert compared["test_stored"].forwards == 3
    assert runs["stock"]["test_small.py::test_fails"]["why"] == "OSError: not on this machine"
    assert not runs["stock"]["test_small.py::test_trains[0.1]"]["half"]


def test_tests_that_pass_are_no_proof(runs):
    """TRL's own assertions let log-probs x 0.99 through; the comparison does not."""
    wrong = compare(runs["stock"], runs["wrong"])
    assert [each.patched for each in wrong] == [each.stock for each in wrong]
    faulty = [each.test.split("::")[1] for each in wrong if each.faults]
    assert faulty == ["test_trains[0.1]", "test_trains[0.5]", "test_half", "test_stored"]
    assert "logps differ by 1.0e-02, allowed is 1e-05" in wrong[0].faults


def record(**more):
    forward = {"log_probs": [-2.0, -3.0], "entropy": [1.0, 2.0]}
    metrics = {"rewards/margins": 0.0, "rewards/accuracies": 0.0, "logps/chosen": -5.0}
    base = {"outcome": "passed", "why": "", "half": False, "modes": ["shared"], "logged": [[["loss"]]]}
    base |= {"forwards": [forward], "gradients": [{"w": 3.0, "b": 4.0}], "metrics": [metrics]}
    return copy.deepcopy(base | more)


def faults(stock, patched):
    return compare({"t": stock}, {"t": patched})[0].faults


def test_what_is_a_fault():
    assert faults(record(), record()) == []
    assert faults(record(), record(outcome="failed", why="E")) == ["failed patched: E"]
    assert faults(record(outcome="failed"), record(outcome="failed")) == []
    assert compare({"t": record()}, {})[0].faults == ["it was not run patched"]
    assert faults(record(), record(modes=[])) == ["the patched forward never ran"]
    assert faults(record(forwards=[]), record(forwards=[])) == ["it trained, and no forward was recorded"]
    assert faults(record(), record(logged=[[["loss", "x"]]])) == ["not as many logged, or other names"]
    fewer = record()
    fewer["forwards"][0]["log_probs"].pop()
    assert faults(record(), fewer) == ["not as many forwards, or other names"]


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("forwards", 0, "log_probs", 1), -3.0002, ["logps", "tokens"]),
        (("forwards", 0, "entropy", 0), float("nan"), ["tokens"]),
        (("gradients", 0, "w"), 3.001, ["gradient", "weights"]),
        (("metrics", 0, "logps/chosen"), -5.001, ["metrics"]),
        (("metrics", 0, "rewards/accuracies"), 1.0, []),  # the margin is 0: a tie
    ],
)
def test_each_number_is_compared(where, value, said):
    patched = record()
    *path, last = where
    inner = patched
    for key in path:
        inner = inner[key]
    inner[last] = value
    assert [fault.split()[0] for fault in faults(record(), patched)] == said
    relaxed = faults(record(half=True), record(half=True) | {k: patched[k] for k in ("gradients", "metrics")})
    assert relaxed == []


def test_relative():
    assert relative(2.0, 3.0) == 0.5 and relative(0.1, 0.2, 1.0) == pytest.approx(0.1)
    assert relative(0.0, 0.0) == 0.0 and relative(0.0, 1.0) == float("inf")
    assert relative(float("nan"), float("nan")) == float("inf")
    assert all(full < half for full, half in LIMITS.values())


def test_a_run_that_records_nothing_is_an_error(work, monkeypatch):
    monkeypatch.setattr(trl_suite, "PLUGIN", "no_such_plugin")
    with pytest.raises(RuntimeError, match="no_such_plugin"):
        run_tests(work, "test_small.py", {"broken": []}, [])


def test_data_is_written_where_the_hubs_name_says(tmp_path, monkeypatch):
    """A script of TRL's kind, and the data set read as TRL's tests read it."""
    script = tmp_path / "generate.py"
    script.write_text(
        "from datasets import Dataset\n"
        "def main(test_size, push_to_hub, repo_id):\n"
        "    rows = Dataset.from_dict({'prompt': list('abcdefghij')})\n"
        "    parts = rows.train_test_split(test_size=test_size, shuffle=False)\n"
        "    parts.push_to_hub(repo_id, config_name='pref')\n"
    )
    trl_suite_models.make_data(script, tmp_path / "org" / "zen")
    monkeypatch.chdir(tmp_path)
    data = datasets.load_dataset("org/zen", "pref", cache_dir=str(tmp_path / "cache"))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 9, "test": 1}
    assert trl_suite_models.texts(tmp_path / "org" / "zen")[0] == "{'prompt': 'a'}"


def test_the_command_names_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trl_suite", str(tmp_path)])
    with pytest.raises(SystemExit):
        trl_suite.main()
    assert "has no tests/test_dpo_trainer.py" in capsys.readouterr().err
