"""The config: one source for YAML keys, flags and help; wrong keys and values say what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastdpo.cli import main
from fastdpo.config import names
from fastdpo.config.keys import FIELDS, Config
from fastdpo.config.reading import GROUPS, to_yaml
from fastdpo.config.stages import STAGE_KEYS
from fastdpo.errors import ConfigError
from tests.config.command_line import load_config


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def test_flags_win_over_the_file(file):
    path = file("model: m\ndata: d\nbeta: 0.5\nbatch_size: 4\n")
    config = load_config([path, "--beta", "0.2", "--batch-size=16", "--strict"])
    assert (config.beta, config.batch_size, config.strict) == (0.2, 16, True)


def test_values_are_brought_to_their_types(file):
    """YAML 1.1 reads 1e-6 as a string, and flags are all strings."""
    path = file("model: m\ndata: d\nlearning_rate: 5e-7\nbeta: 1\neval_data: 0.1\nmax_steps: 3")
    config = load_config([path, "--lora_target_modules", "[q_proj, v_proj]", "--max-steps", "null"])
    assert config.learning_rate == 5e-7 and config.beta == 1.0 and config.eval_data == 0.1
    assert config.lora_target_modules == ["q_proj", "v_proj"] and config.max_steps is None
    assert load_config([path, "--eval_data", "x.jsonl"]).eval_data == "x.jsonl"


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--strict"], "strict", True),
        (["--strict", "false"], "strict", False),
        (["--strict", "--strict", "false"], "strict", False),
        (["--strict=false", "--strict"], "strict", True),
        (["--beta", "0.3", "--beta=0.2"], "beta", 0.2),
        (["--max-steps="], "max_steps", None),
        (["--output_dir", "-x"], "output_dir", "-x"),
        (["--stages", "[{objective: sft}, {beta: 1}]"], "stages", [{"objective": "sft"}, {"beta": 1}]),
        (["--lora_target_modules", '["q", "v"]'], "lora_target_modules", ["q", "v"]),
        (["--objective", "{sigmoid: 0.8, sft: 0.2}"], "objective", {"sigmoid": 0.8, "sft": 0.2}),
        (["--objective", '{"sigmoid": 0.8}'], "objective", {"sigmoid": 0.8}),
        (["--model", "[m]"], "model", "[m]"),
        (["--bf16"], "dtype", "bf16"),  # TRL's
        (["--bf16", "false"], "dtype", "fp32"),
    ],
    ids=str,
)
def test_flags_are_read_as_yaml(words, key, value):
    """A switch may come bare; of a flag that is given again the last counts; so for other trainers' flags."""
    made = getattr(load_config(["--model=m", "--data=d", *words]), key)
    assert made == value and type(made) is type(value)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--leraning_rate", "1"], "unknown key 'leraning_rate'. Did you mean 'learning_rate'?"),
        (["--beta", "high"], "beta: expected a number, got 'high'. Its help: strength of the pull"),
        (["--batch_size", "2.5"], "batch_size: expected a whole number, got 2.5"),
        (["--batch_size", "0"], "batch_size: 0 is below 1"),
        (["--strict", "maybe"], "strict: expected true or false, got 'maybe'"),
        (["--beta"], "--beta: no value given"),
        (["beta", "1"], "unexpected argument 'beta': keys are given as --key value"),
        (["--batch_size", "-1"], "batch_size: -1 is below 1"),
        (["--beta", "-high"], "beta: expected a number, got '-high'"),
        (["--beta", "1", "2"], "unexpected argument '2': keys are given as --key value"),
        (["--beta=1", "c.yaml"], "unexpected argument 'c.yaml'"),
        (["--beta", "1", "-x"], "unknown key 'x'"),
        (["--truncation", "left"], "truncation: 'left' is not one of keep_start, keep_end, drop"),
        (["--label_smoothing", "0.5"], "label_smoothing: 0.5 is not in"),
        (["--adam_beta2", "1"], "adam_beta2: 1.0 is not below 1"),
        (["--eval_data", "1.5"], "eval_data: 1.5 is neither"),
        (["--stages", "[{modle: x}]"], "stage 1 sets 'modle'"),
        (["--stages", "[{beta: x}]"], "beta: expected a number"),
        (["--stages", "[3]"], "stage 1 is not a set of keys"),
        (["--stages", "[{lr: 1}]"], "stage 1 sets 'lr'. Did you mean 'learning_rate'?"),
        (["--lr", "1"], "unknown key 'lr'. Did you mean 'learning_rate'?"),
        (["--epochs", "1"], "unknown key 'epochs'. Did you mean 'num_epochs'?"),
        (["--bs", "1"], "unknown key 'bs'. Did you mean 'batch_size'?"),
        (["--output", "x"], "unknown key 'output'. Did you mean 'output_dir'?"),
        (["--max-seq-len", "9"], "unknown key 'max_seq_len'. Did you mean 'max_length'?"),
        (["--dataset", "rows.jsonl"], "it is no name in a dataset_info.json; did you mean data?"),
        (["--memory", "24"], "memory: 24 has no unit; 24GB?"),
        (["--head_memory", "512"], "head_memory: 512 has no unit; 512MiB?"),
        (["--optim", "adamw8bit"], "sgd. Did you mean 'adamw_8bit'?"),
        (["--optim", "adam"], "sgd. Did you mean 'adamw'?"),
        (["--dtype", "fp16"], "fp32. Did you mean 'bf16'?"),
        (["--truncation", "Keep-End"], "drop. Did you mean 'keep_end'?"),
        (["--pairs", "best"], "hard. Did you mean 'best_worst'?"),
        (["--report_to", "tensorbord"], "trackio. Did you mean 'tensorboard'?"),
    ],
)
def test_wrong_flags(file, argv, message, capsys):
    assert main(["train", file("model: m\ndata: d\n"), *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("data: d", "model: missing"),
        ("- a\n- b", "expected lines of `key: value`"),
        ("beta: 0.1\n1: 2", "YAML reads the key 1 as no text; write it in quotes"),
        ("model: [", "is not YAML"),
        ("model: m\ndata: d\nbeta: 1\nbeta: 2", "'beta' is given twice"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_wrong_files(file, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config([file(text)])


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("reference_cache: off", "reference_cache", "off"),
        ("reference_cache: no", "reference_cache", "off"),
        ("reference_cache: on", "reference_cache", "auto"),
        ("reference_cache: no.sqlite", "reference_cache", "no.sqlite"),
        ("optim: adamw_bnb_8bit", "optim", "adamw_8bit"),
        ("optim: AdamW", "optim", "adamw_torch_fused"),
        ("dtype: bfloat16", "dtype", "bf16"),
        ("lora_target_modules: all_linear", "lora_target_modules", "all-linear"),
        ("lora_target_modules: q_proj", "lora_target_modules", ["q_proj"]),
        ("lora_target_modules: q_proj, v_proj", "lora_target_modules", ["q_proj", "v_proj"]),
        ("lora_target_modules: .*q_proj", "lora_target_modules", ".*q_proj"),
    ],
)
def test_other_words_for_the_same(file, text, key, value):
    for argv in (
        [file(f"model: m\ndata: d\n{text}")],
        ["--model=m", "--data=d", "--" + text.replace(": ", "=")],
    ):
        assert getattr(load_config(argv), key) == value
    given = yaml.safe_load(text)
    assert getattr(Config(model="m", data="d", **given), key) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory: 24", "memory: 24 has no unit; 24GB?"),
        ("output_dir: 2024", "output_dir: YAML reads 2024 as no text; write it in quotes: '2024'"),
        ("adapter: true", "adapter: YAML reads True as no text"),
        (f"optim: {['w' * 200]}", f"expected text, got ['{'w' * 98}.... Its help: optimizer, by"),
        ("reference_cache: [x]", "reference_cache: expected text, got ['x']. Its help: SQLite file"),
    ],
)
def test_what_yaml_reads_as_no_text(file, text, message):
    with pytest.raises(ConfigError) as caught:
        load_config([file(f"model: m\ndata: d\n{text}")])
    assert message in str(caught.value)
    assert load_config(["--model=m", "--data=d", "--adapter", "2024"]).adapter == "2024"


SEVERAL = """
model: m
no_such: 1
beta: high
batch_size: 0
truncation: left
learning_rate: .inf
warmup_steps: .inf
load_best: true
objective: simpoo
stages: [{lr: 1}, {max_steps: 1}, {max_steps: 0, objective: sft}]
"""


def test_all_that_is_wrong_is_told_at_once(file):
    with pytest.raises(ConfigError) as caught:
        load_config([file(SEVERAL)])
    first, *lines = str(caught.value).splitlines()
    assert first == "11 problems" and [line.strip().split(". ")[0].split(" of ")[0] for line in lines] == [
        "unknown key 'no_such'",
        "beta: expected a number, got 'high'",
        "data: missing",
        "learning_rate: inf is not a finite number",
        "warmup_steps: inf is not a finite number",
        "batch_size: 0 is below 1",
        "truncation: 'left' is not one",
        "load_best: needs held-out rows to judge by; set eval_data",
        "stages: stage 1 sets 'lr'",
        "objective: 'simpoo' is not one",
        "stages: stage 3: max_steps: 0 is below 1",
    ]


def test_an_objective_is_told_with_the_rest(file):
    with pytest.raises(ConfigError) as caught:
        load_config([file("model: m\nlabel_smoothing: 0.7\nobjective_args: {ld_alpa: 1}")])
    missing, noise, args = caught.value.args
    assert "data: missing" in missing and "not in [0, 0.5)" in noise and "does not read 'ld_alpa'" in args
    with pytest.raises(ConfigError) as caught:  # what a wrong key would have said is not known
        load_config([file("model: [m]\nuse_dora: true\nlora_rank: many\nobjective: [3]")])
    assert [text.split(":")[0] for text in caught.value.args] == ["model", "lora_rank", "data", "objective"]
    with pytest.raises(ConfigError, match=r"^objective: YAML reads 3.5 as no text[^\n]*$"):
        load_config([file("model: m\ndata: d\nobjective: 3.5\nobjective_args: {simpo_gamma: 1}")])


@pytest.mark.parametrize("value", ["inf", "nan", "0", "1.5"])
def test_rows_to_hold_out_are_a_share_or_a_number(value):
    with pytest.raises(ConfigError, match=r"^eval_data: "):
        Config(model="m", data="d", eval_data=float(value))


@pytest.mark.parametrize("value", [-1, "-1", -1.0])
def test_transformers_no_limit_of_steps(value):
    assert Config(model="m", data="d", max_steps=value).max_steps is None


def test_transformers_switch_of_the_upload(file):
    assert load_config(["--model=m", "--data=d", "--push_to_hub=False"]).push_to_hub is None
    path = file("model: m\ndata: d\npush_to_hub: true")
    for argv in ([path], [path, "--push_to_hub", "True"], [path, "--push_to_hub"]):
        with pytest.raises(ConfigError, match="push_to_hub: name the repository"):
            load_config(argv)


def test_every_other_word_is_of_a_key():
    assert set(names.CALLED) | set(names.SAME) <= set(FIELDS)
    words = " ".join(names.CALLED.values()).split()
    assert len(words) == len(set(words)) and not set(words) & set(FIELDS)


def test_missing_file():
    with pytest.raises(ConfigError, match="cannot read the config file"):
        load_config(["nowhere.yaml"])


def test_stages_override_and_inherit():
    config = Config(model="m", data="d", beta=0.3, stages=[{"objective": "sft"}, {"beta": 1}])
    first, second = config.per_stage()
    assert (first.objective, first.beta) == ("sft", None)
    assert (second.objective, second.beta) == ("sigmoid", 1.0)


def test_help_names_every_key():
    command = [
        sys.executable,
        "-m",
        "fastdpo.cli",
        "train",
        "--help",
    ]  # the width is looked up once a process
    text = subprocess.run(
        command, env=os.environ | {"COLUMNS": "1000"}, capture_output=True, text=True
    ).stdout
    assert "[default: 1e-06]" in text
    for name, field in FIELDS.items():
        assert f" --{name} VALUE " in text and field.metadata["doc"] in text
    places = [text.index(f"─ {heading} ─") for heading in GROUPS]
    assert places == sorted(places)
    assert set(STAGE_KEYS) <= set(FIELDS)


def test_each_key_is_in_one_group():
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(FIELDS)


def test_resolved_config_reads_back(file):
    config = Config(model="m", data="d", learning_rate=3e-7, stages=[{"objective": "sft"}])
    assert load_config([file(to_yaml(config))]) == config


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("examples/*.yaml")), ids=lambda p: p.name
)
def test_examples_are_valid(path):
    assert load_config([str(path)]).per_stage()


def test_options_above_the_stages_reach_those_that_read_them():
    stages = [dict(objective="sft"), dict(objective="ipo"), dict(beta=0.5, objective="odpo")]
    made = Config(model="m", data="d", beta=0.2, objective_args={"alpha": 2}, stages=stages).per_stage()
    assert [stage.beta for stage in made] == [None, 0.2, 0.5]
    assert [stage.objective_args for stage in made] == [None, None, {"alpha": 2}]
    drdpo = dict(objective="drdpo", objective_args={"beta_prime": 2.0})
    (made,) = Config(model="m", data="d", objective_args={"scope": 2}, stages=[drdpo]).per_stage()
    assert made.objective_args == {"scope": 2, "beta_prime": 2.0}
    with pytest.raises(ConfigError, match="beta: no stage's objective reads it"):
        Config(model="m", data="d", beta=0.2, stages=[dict(objective="sft")])
    with pytest.raises(ConfigError, match="no stage's objective reads 'alhpa'"):
        Config(model="m", data="d", objective_args={"alhpa": 2}, stages=stages)
