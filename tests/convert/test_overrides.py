"""What comes over another trainer's config: flags, keys to ignore; and all that is wrong with it, at once."""

import pytest
import yaml

import fastdpo
from fastdpo import api
from fastdpo.cli import main
from fastdpo.config.keys import Config
from fastdpo.config.reading import to_yaml
from fastdpo.convert.convert import config_of, drafted
from fastdpo.errors import ConfigError
from tests.config.command_line import load_config

TRL = """
model_name_or_path: m
dataset_name: d
loss_type: ipo
beta: 0.2
use_peft: true
lora_r: 8
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
num_train_epochs: 2
max_steps: 50
load_in_8bit: false
"""
AXOLOTL = """
base_model: m
rl: dpo
datasets: [{path: d, type: chatml.intel}]
micro_batch_size: 1
adapter: lora
lora_r: 8
lora_alpha: 16
"""


@pytest.fixture
def file(tmp_path):
    def write(text, **more):
        path = tmp_path / "theirs.yaml"
        path.write_text(text + yaml.safe_dump(more) if more else text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("flags", "key", "value"),
    [
        (["--gradient_accumulation_steps", "4"], "batch_size", 8),  # times the file's
        (["--gradient-accumulation-steps", "null"], "batch_size", 2),
        (["--num_train_epochs="], "num_epochs", 1.0),  # max_steps says when to stop
        (["--batch_size", "3"], "batch_size", 3),
        (["--max_steps", "-1"], "max_steps", None),  # transformers' no limit
        (["--max_steps", "-1"], "num_epochs", 2.0),
        (["--max_steps", "null"], "num_epochs", 2.0),
        (["--max_steps", "-1", "--num_train_epochs", "null"], "num_epochs", 3.0),  # TRL's default
        (["--loss_type", "sigmoid", "sft"], "objective", {"sigmoid": 1.0, "sft": 1.0}),
        (
            ["--loss_type", "sigmoid", "sft", "--loss_weights", "1", "0.5"],
            "objective",
            {"sigmoid": 1.0, "sft": 0.5},
        ),
        (["--objective", "sigmoid", "sft"], "objective", ["sigmoid", "sft"]),
        (["--lora_target_modules", "q_proj", "v_proj"], "lora_target_modules", ["q_proj", "v_proj"]),
        (["--rl", "orpo"], "objective", "orpo"),  # Axolotl's
        (["--push_to_hub", "--hub_model_id", "me/m"], "push_to_hub", "me/m"),
        (["--push_to_hub", "me/m"], "push_to_hub", "me/m"),
        (["--push_to_hub", "False", "--hub_model_id", "me/m"], "push_to_hub", None),
        (["--model", "other"], "model", "other"),
        (["--model", "other"], "num_epochs", 1.0),
    ],
    ids=str,
)
def test_flags_over_a_file_of_trl(file, flags, key, value):
    assert getattr(load_config([file(TRL), *flags]), key) == value


def test_a_flag_reaches_into_what_is_nested(file):
    config = load_config([file(AXOLOTL), "--datasets.path", "other", "--datasets.split=test"])
    assert (config.data, config.data_format) == ("other#test", "intel")


def test_a_word_of_ours_that_is_another_of_theirs_means_ours(file):
    """Axolotl's adapter says that there is a LoRA, ours names one to go on from."""
    config = load_config([file(AXOLOTL), "--adapter", "folder"])
    assert (config.adapter, config.lora_rank) == ("folder", None)


def test_what_a_flag_replaced_is_not_told(file, capsys):
    load_config(
        [file(TRL), "--gradient_accumulation_steps", "4", "--learning_rate", "1e-5", "--model", "other"]
    )
    said = capsys.readouterr().err
    assert "gradient_accumulation_steps 4 (of one device) -> batch_size 8" in said and "-> model" not in said


@pytest.mark.parametrize(
    ("wrong", "flags", "key", "value"),
    [
        ({"load_in_8bit": True}, ["--load_in_8bit", "null"], "load_in_4bit", False),
        ({"load_in_8bit": True}, ["--load_in_4bit", "true"], "load_in_4bit", True),
        ({"dataset_mixer": {}, "datasets": [1, 2]}, ["--data", "mine"], "data", "mine"),
        ({"per_device_train_batch_size": "auto"}, ["--batch_size", "4"], "batch_size", 4),
        ({"optim": "lion_8bit"}, ["--optim", "adafactor"], "optim", "adafactor"),
        ({"loss_type": "no_such"}, ["--objective", "ipo"], "objective", "ipo"),
    ],
    ids=str,
)
def test_what_a_flag_replaces_may_be_wrong(file, wrong, flags, key, value):
    theirs = file(yaml.safe_dump(yaml.safe_load(TRL) | wrong))
    with pytest.raises(ConfigError):
        load_config([theirs])
    assert getattr(load_config([theirs, *flags]), key) == value


def test_what_a_flag_replaced_is_no_problem_to_tell(file, capsys):
    theirs = yaml.safe_load(TRL) | {"optim": "lion_8bit", "per_device_train_batch_size": "auto"}
    load_config([file(yaml.safe_dump(theirs)), "--batch_size=4", "--optim=adafactor"])
    said = capsys.readouterr().err
    assert "read as a config of TRL" in said and "lion_8bit" not in said and "auto" not in said


def test_what_a_launcher_reads_is_no_config_of_a_trainer():
    for values in (
        {"compute_environment": "LOCAL_MACHINE", "bf16": True},
        {"zero_optimization": {"stage": 3}},
    ):
        for read in (drafted, lambda values: config_of(values, {"model": "m", "data": "d"})):
            with pytest.raises(
                ConfigError, match="not of a trainer; give the trainer's own, with --num_processes"
            ):
                read(values)


def test_from_python(file, monkeypatch):
    asked = []
    monkeypatch.setattr(api.trainer, "train", lambda config, *_: asked.append(config))
    theirs = file(TRL.replace("8bit: false", "8bit: true"))
    fastdpo.train(theirs, load_in_8bit=None, gradient_accumulation_steps=1)
    fastdpo.train(theirs, ignore="load_in_8bit")
    fastdpo.train(model_name_or_path="m", dataset_name="d", loss_type=["sigmoid", "sft"])
    assert [config.batch_size for config in asked] == [2, 16, 8]
    assert [config.ignore for config in asked] == [None, {"load_in_8bit": True}, None]
    assert (asked[2].objective, asked[2].num_epochs) == ({"sigmoid": 1.0, "sft": 1.0}, 3.0)


def test_flags_alone_are_a_whole_config():
    theirs = ["--model_name_or_path", "m", "--dataset_name", "d", "--loss_type", "ipo", "--push_to_hub"]
    config = load_config([*theirs, "--hub_model_id", "me/m"])
    assert (config.model, config.data, config.objective, config.num_epochs) == ("m", "d", "ipo", 3.0)
    assert config.push_to_hub == "me/m"
    config = load_config(["--model", "m", "--data", "d", "--per_device_train_batch_size", "4"])
    assert (config.batch_size, config.num_epochs) == (4, 1.0)  # ours, with a word of theirs


def test_the_file_by_name(file, capsys):
    path = file(TRL)
    assert (
        load_config(["--config", path])
        == load_config([path])
        == load_config(["--beta=0.2", "--config", path])
    )
    assert main(["data", path, "--config", path]) == 2
    assert f"--config: a config is given already, {path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lora_r", "4", "more.yaml"], "unexpected argument 'more.yaml'"),
        (["--data", "d", "more.yaml"], "unexpected argument 'more.yaml'"),
        (["--beta.x", "4"], "a key has no dots in it: beta.x"),
        (["--datasets", "d", "--datasets.path", "e"], "--datasets: given as a whole and with dots"),
        (["--ignore"], "--ignore: no value given"),
        (["--push_to_hub"], "push_to_hub: true: name the repository"),
        (["--no_such", "1"], "unknown key 'no_such'"),
    ],
)
def test_wrong_flags(file, flags, said, capsys):
    assert main(["data", file(TRL), *flags]) == 2
    assert said in capsys.readouterr().err


WRONG = {"load_in_8bit": True, "no_such": 1, "neftune_noise_alpha": 5, "optim": "lion_8bit", "seed": -1}


def test_all_that_is_wrong_is_told_at_once(file):
    with pytest.raises(ConfigError) as caught:
        load_config([file(yaml.safe_dump(yaml.safe_load(TRL) | WRONG))])
    first, *lines, last = str(caught.value).splitlines()
    assert (
        first == "5 problems"
        and last == "To go on without them: --ignore load_in_8bit,neftune_noise_alpha,no_such"
    )
    assert {line.split(":")[0].strip() for line in lines} == set(WRONG)


def test_a_key_that_is_not_known_can_be_unset(file):
    assert load_config([file(TRL, no_such=1), "--no_such", "null"]).objective == "ipo"


def test_one_problem_is_one_line(file):
    with pytest.raises(
        ConfigError, match=r"^load_in_8bit: true: .*\. To go on without it: --ignore load_in_8bit$"
    ):
        load_config([file(TRL.replace("8bit: false", "8bit: true"))])
    with pytest.raises(
        ConfigError, match=r"^use_pef: .* Did you mean 'use_peft'\? To go on without it: .*_pef$"
    ):
        load_config([file(TRL, use_pef=True)])


def test_a_flag_that_is_refused_is_not_to_be_ignored(file):
    with pytest.raises(ConfigError, match=r"set load_in_4bit: true$"):
        load_config([file(TRL.replace("load_in_8bit: false", "")), "--load_in_8bit", "true"])


def test_a_file_of_ours_with_a_word_of_theirs_stays_ours(file):
    path = file("model: m\ndata: d\nper_device_train_batch_size: 4\n")
    config = load_config([path, "--model", "other", "--gradient_accumulation_steps", "2"])
    assert (config.model, config.batch_size, config.num_epochs) == ("other", 8, 1.0)


def test_without_model_or_data_there_is_nothing_to_go_on_with(file):
    wrong = yaml.safe_load(TRL) | {"datasets": [1, 2]}
    with pytest.raises(ConfigError) as caught:
        load_config([file(yaml.safe_dump(wrong))])
    assert "--ignore" not in str(caught.value) and "missing" not in str(caught.value)


@pytest.mark.parametrize("way", ["flag", "flags", "yaml", "text", "both", "words"])
def test_keys_that_are_ignored(file, way, capsys):
    wrong = yaml.safe_load(AXOLOTL) | {"load_in_8bit": True, "no_such": {"a": 1}}
    wrong["datasets"][0]["odd"] = 1
    names = ["load_in_8bit", "no_such", "datasets.odd"]
    flags = {
        "flag": ["--ignore", ",".join(names)],
        "flags": [word for name in names for word in ("--ignore", name)],
        "words": ["--ignore", *names],
        "both": ["--ignore", ",".join(names[1:])],
    }.get(way, [])
    given = {"yaml": {"ignore": names}, "text": {"ignore": ", ".join(names)}, "both": {"ignore": names[:1]}}
    path = file(yaml.safe_dump(wrong | given.get(way, {})))
    config = load_config([path, *flags])
    left_out = {"load_in_8bit": True, "no_such": {"a": 1}, "datasets.odd": 1}
    assert config.ignore == left_out and config.data == "d"
    assert "load_in_8bit true: ignored, as was asked for\n" in capsys.readouterr().err
    assert load_config([file(to_yaml(config))]) == config  # the run's own config.yaml
    assert "datasets.odd 1: ignored" in capsys.readouterr().err


def test_names_that_are_not_there(file):
    with pytest.raises(ConfigError, match=r"ignore: 'lora_rr' is not in the config. Did you mean 'lora_r'"):
        load_config([file(TRL), "--ignore", "lora_rr"])
    with pytest.raises(ConfigError, match=r"ignore: 'datasets.typ' .* Did you mean 'datasets.type'"):
        load_config([file(AXOLOTL), "--ignore", "datasets.typ"])
    with pytest.raises(ConfigError, match="ignore: 'lora_dropout' is not in the config"):
        load_config(["--model=m", "--data=d", "--ignore=lora_dropout"])
    with pytest.raises(ConfigError, match="is read with a config alone"):
        Config(model="m", data="d", ignore=["lora_dropout"])
    config = config_of({"model": "m", "data": "d", "no_such": 1, "ignore": "no_such"}, {})
    assert config.ignore == {"no_such": 1}


def test_a_config_is_left_as_it_was():
    theirs = yaml.safe_load(AXOLOTL) | {"ignore": ["datasets.type"]}
    before = yaml.safe_dump(theirs)
    config_of(theirs, {"datasets.path": "e"})
    assert yaml.safe_dump(theirs) == before


def test_nested_keys_of_torchtune(tmp_path):
    """A flag for the model does not answer for what else stands there, but one for that key does."""
    theirs = {"loss": {"_component_": "torchtune.rlhf.loss.DPOLoss"}, "model": {"_component_": "x", "odd": 1}}
    with pytest.raises(ConfigError, match=r"^model\.odd: 1: .* To go on without it: --ignore model\.odd$"):
        config_of(theirs, {"model": "m", "data": "d"})
    config = config_of(theirs, {"model": "m", "data": "d", "ignore": "model.odd", "loss.beta": 0.3})
    assert config.beta == 0.3 and config.ignore == {"model.odd": 1}
    assert config_of(theirs, {"model": "m", "data": "d", "model.odd": None}).ignore is None
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(theirs))
    with pytest.raises(ConfigError, match=r"^model: missing"):
        load_config([str(tmp_path / "c.yaml"), "--model.odd", "null", "--data", "d"])


def test_how_replaced_data_is_read_is_no_problem():
    wrong = [{"path": "d", "type": "no.such"}]
    with pytest.raises(ConfigError, match=r"datasets\.type"):
        config_of(yaml.safe_load(AXOLOTL) | {"datasets": wrong}, {})
    assert config_of(yaml.safe_load(AXOLOTL) | {"datasets": wrong}, {"data": "e"}).data == "e"


def test_a_secret_is_shown_and_kept_nowhere(file, capsys):
    path = file(TRL, my_api_key="sk-123", hf_token="sk-123", pad_token="seen")
    with pytest.raises(ConfigError, match="my_api_key: not a key that is known of TRL") as error:
        load_config([path])
    config = load_config([path, "--ignore", "my_api_key,hf_token,pad_token"])
    assert config.ignore == {"my_api_key": "not kept", "hf_token": "not kept", "pad_token": "seen"}
    assert main(["convert", path, "--diff"]) == 2
    assert "sk-123" not in str(error.value) + "".join(capsys.readouterr())
