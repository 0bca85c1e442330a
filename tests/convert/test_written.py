"""What `fastdpo convert` writes: their order, a comment at each key that changed or went, the same config."""

import io

import pytest
import yaml
from rich.console import Console

from fastdpo.cli import main
from fastdpo.config.keys import from_values
from fastdpo.convert.convert import converted, drafted, recognise
from fastdpo.convert.draft import Draft, Fate, as_lines
from fastdpo.convert.written import as_yaml, side_by_side
from fastdpo.errors import ConfigError
from tests.convert.test_convert import AXOLOTL, FILES, TRL
from tests.convert.translated import translate
from tests.docs.snippets import block

HEADING = "Configs of other trainers"
THEIRS = """
learning_rate: 5e-7
deepspeed: ds_config.json
gradient_accumulation_steps: 4
model_name_or_path: org/model
report_to:
fp16: false
max_length: 512
loss_type: [sigmoid, sft]
loss_weights: [1.0, 0.2]
per_device_train_batch_size: 2
gradient_checkpointing_kwargs: {use_reentrant: false}
torch_dtype: bfloat16
dataset_name: org/data
eval_strategy: steps
samples: 2
"""
WRITTEN = """
# read as a config of TRL
learning_rate: 5.0e-07
# deepspeed ds_config.json: left out, there is one device: batch_size is the whole batch, of all
#   devices together
batch_size: 8  # per_device_train_batch_size 2, gradient_accumulation_steps 4 (of one device)
model: org/model  # model_name_or_path
# report_to: left out, it is empty
# fp16 false: left out, it is so here
max_length: 512
objective: {sigmoid: 1.0, sft: 0.2}  # loss_type ['sigmoid', 'sft'], loss_weights [1.0, 0.2]
# gradient_checkpointing_kwargs {'use_reentrant': False}: left out, it changes speed or memory only
# check: torch_dtype bfloat16: left out; weights that train are kept in fp32 here, computed with in
#   dtype
data: org/data  # dataset_name
# eval_strategy steps: read with the rest of the config
samples: 2

# what the config leaves out, as TRL has it
num_epochs: 3.0  # num_train_epochs
eval_data: org/data#test  # dataset_test_split test
beta: 0.1
"""


def values_of(text: str) -> dict:
    return yaml.safe_load(text)


def text_of(values: dict) -> str:
    return converted(values, drafted(values))


def test_the_order_of_theirs_and_a_comment_at_each_key():
    assert text_of(values_of(THEIRS)).splitlines() == WRITTEN.strip().splitlines()


@pytest.mark.parametrize("tool", FILES)
def test_it_is_read_back_the_same(tool):
    values = values_of(FILES[tool])
    text = text_of(values)
    assert yaml.safe_load(text) == translate(values)[0]
    assert from_values(yaml.safe_load(text)) == from_values(translate(values)[0])
    comments = " ".join(line.partition("# ")[2].strip() for line in text.splitlines())
    for key in values:
        assert key in comments or f"\n{key}: " in text, key


ODD = ["two\nlines", "a\u2028b", "\x85", "#no", " # no", "x" * 300, "\u00e4 \U0001f600"]


@pytest.mark.parametrize("odd", ODD)
def test_no_value_of_theirs_breaks_the_yaml(odd):
    values = values_of(TRL) | {"logging_dir": odd, "output_dir": f"o {odd}", "run_name": f"{odd} {odd}"}
    assert yaml.safe_load(text_of(values)) == translate(values_of(TRL))[0] | {"output_dir": f"o {odd}"}


def test_the_documented_example():
    values = values_of(block("configs.md", HEADING, "yaml"))
    text = converted(values, drafted(values, ["neftune_noise_alpha"]))
    assert text == block("configs.md", HEADING, "yaml", 1)


def test_a_key_that_is_ignored(theirs, capsys):
    theirs.write_text(THEIRS + "sync_ref_model: true\n")
    assert main(["convert", str(theirs), "--ignore", "sync_ref_model", "--ignore", "samples"]) == 0
    out = capsys.readouterr().out
    assert "\n# sync_ref_model true: ignored, as was asked for; samples 2: ignored, as was asked for\n" in out
    kept = {k: v for k, v in yaml.safe_load(WRITTEN).items() if k != "samples"}
    assert yaml.safe_load(out) == kept | {"ignore": {"sync_ref_model": True, "samples": 2}}
    assert main(["convert", str(theirs), "--ignore", "sync_ref_modle"]) == 2
    assert "'sync_ref_modle' is not in the config. Did you mean 'sync_ref_model'?" in capsys.readouterr().err


def test_a_key_within_others_is_ignored():
    values = values_of(AXOLOTL) | {"datasets": [{"path": "org/data", "shards": 4}]}
    assert drafted(values).problems and not drafted(values, ["datasets.shards"]).problems
    assert values["datasets"][0]["shards"] == 4


def test_what_is_long_is_wrapped_between_words_and_an_empty_end_has_no_heading():
    values = {"loss_type": "ipo", "model_name_or_path": "m", "beta": 0.3, "data": "d"}
    values |= {"num_train_epochs": 2, "run_name": "ab-cd/" * 30, "per_device_train_batch_size": 4}
    text = text_of(values)
    assert "ab-cd/" * 30 in text and "leaves out" not in text
    del values["num_train_epochs"]
    assert "leaves out" in text_of(values)


def test_what_fastdpo_cannot_run_is_not_written():
    values = values_of(TRL)
    with pytest.raises(ConfigError, match="optim: 'lion_8bit' is not one of"):
        text_of(values | {"optim": "lion_8bit"})
    with pytest.raises(ConfigError, match=r"(?s)sync_ref_model: true: .*\n  neftune_noise_alpha: 5: "):
        text_of(values | {"sync_ref_model": True, "neftune_noise_alpha": 5})
    with pytest.raises(ConfigError, match="all its keys are fastdpo's own already"):
        drafted({"model": "m", "data": "d"})
    with pytest.raises(ConfigError, match="none of its keys is of a tool that is known; known are TRL, "):
        drafted({"odd": 1})
    with pytest.raises(ConfigError, match=r"(?s)sync_ref_model: true: .*\n  seed: -1 is below 0"):
        text_of(values | {"sync_ref_model": True, "seed": -1})


def test_a_null_of_ours_and_nested_values_stay_in_order():
    values = {"loss_type": "sigmoid", "model_name_or_path": "m", "data": "d", "eval_data": None}
    values |= {"data_format": {"prompt": "q", "chosen": "b", "rejected": "a"}}
    draft = drafted(values)
    assert list(yaml.safe_load(as_yaml(values, draft))["data_format"]) == ["prompt", "chosen", "rejected"]


def shown(values: dict, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(side_by_side(values, drafted(values)))
    return console.file.getvalue()


def test_both_beside_each_other():
    """A row a key, in their order; plain, and no wider than the terminal."""
    values = values_of(THEIRS) | {"sync_ref_model": True}
    for width in (80, 200):
        text = shown(values, width)
        assert "\x1b" not in text and max(map(len, text.splitlines())) <= width
    rows = [[cell.strip() for cell in (line[:75], line[75:133], line[133:])] for line in text.splitlines()]
    rows = {theirs or ours: (ours, became) for theirs, ours, became in rows if not theirs.startswith("─")}
    assert rows["learning_rate: 5e-07"] == ("learning_rate: 5e-07", "")
    assert rows["gradient_accumulation_steps: 4"] == (
        "batch_size: 8",
        "per_device_train_batch_size 2 (of one device)",
    )
    assert rows["per_device_train_batch_size: 2"] == ("", "in batch_size")
    assert rows["fp16: false"] == ("", "left out, it is so here")
    assert rows["sync_ref_model: true"][1].startswith("refused: the reference does not move here")
    assert rows["torch_dtype: bfloat16"][1].startswith("check: left out; weights that train")
    assert rows["num_epochs: 3"] == ("num_epochs: 3", "num_train_epochs (TRL's default)")
    assert [key for key in rows if key.partition(":")[0] in values] == [
        line for line in rows if line.partition(":")[0] in values
    ]


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(THEIRS)
    return path


def test_diff_writes_nothing_unless_it_is_told_to(theirs, tmp_path, capsys):
    assert main(["convert", str(theirs), "--diff"]) == 0
    assert "what became of it" in capsys.readouterr().out
    assert main(["convert", str(theirs), "--diff", "--output", str(tmp_path / "ours.yaml")]) == 0
    assert "what became of it" in capsys.readouterr().out
    assert (tmp_path / "ours.yaml").read_text().splitlines() == WRITTEN.strip().splitlines()


def test_diff_shows_what_is_refused(theirs, capsys):
    theirs.write_text(THEIRS + "sync_ref_model: true\n")
    assert main(["convert", str(theirs), "--diff"]) == 2
    out, err = capsys.readouterr()
    assert "refused:" in out and err.startswith("error: sync_ref_model: true: ")


def test_a_value_that_several_keys_make_is_told_with_theirs():
    values = {"loss_type": "ipo", "model_name_or_path": "m", "dataset_name": "d", "beta": 0.3}
    made = "per_device_train_batch_size 8 (TRL's default), gradient_accumulation_steps 1 (TRL's default)"
    assert made in shown(values, 400)


def test_lines_before_a_run():
    """What is left out for one reason shares a line; what is to be checked stands last."""
    told = ["check: c: so", "a 1: left out, it is slow", "x 2 -> y 2", "b 3: left out, it is odd"]
    told += ["d: left out, it is slow", "x 2 -> y 2", "check: e 4: left out, it is odd", ""]
    assert as_lines([Fate((), text) for text in told]) == [
        "x 2 -> y 2",
        "left out, it is slow: a 1, d",
        "b 3: left out, it is odd",
        "check: c: so",
        "check: e 4: left out, it is odd",
    ]


def test_keys_within_others_have_places_of_their_own_where_the_tool_reads_them_so():
    values = {"loss": {"kind": "dpo", "beta": 0.2}, "seed": 1}
    draft = Draft(recognise({"loss_type": "ipo"}), {"loss.kind": "dpo", "loss.beta": 0.2, "seed": 1}, {})
    draft.set("seed", 1, "seed")
    draft.set("beta", 0.2, "loss.beta")
    draft.leave("loss.kind", "it is so here")
    lines = ["# loss.kind dpo: left out, it is so here", "beta: 0.2  # loss.beta", "seed: 1"]
    assert as_yaml(values, draft).splitlines()[1:] == lines
