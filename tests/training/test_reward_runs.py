"""A reward model's runs: what they write, what judges by it, killed ones, LoRAs, what is refused."""

import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastdpo.api import train_reward
from fastdpo.cli import main
from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.sampling.scorers import Answer, RewardModel
from fastdpo.training.stage import Stage
from tests import tiny
from tests.training.test_rewards import PAD, QUIET, classifier, conversations, lines, losses, reward_run


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    if "judges" not in request.node.name:
        monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


def test_a_trained_one_tells_good_from_bad_and_judges(tmp_path):
    """Its folder is a classifier with its tokenizer and template; it and its run's folder are scorers, which
    read an answer where it was trained."""
    model = tiny.save_model(tmp_path / "model")
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", conversations(tiny.rows(24, seed=5)))
    data = conversations(tiny.rows(64))
    run = reward_run(tmp_path, model, data, max_steps=16, eval_data=held_out)
    told = lines(run)
    assert told[0]["eval_accuracy"] < 0.8 and told[-1]["eval_accuracy"] > 0.95
    assert told[-1]["eval_accuracy_stderr"] < 0.1 and not any("rewards/" in name for name in told[-1])
    folder = run / "model"
    saved = AutoModelForSequenceClassification.from_pretrained(folder)
    assert saved.config.num_labels == 1 and saved.config.pad_token_id == PAD
    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "the cat"}]
    answers = [Answer(i, "", text, 1, asked) for i, text in enumerate(["a red cat", "a red dog"])]
    found = RewardModel(str(folder))(answers)
    assert found[0] > found[1] + 1 and RewardModel(str(run))(answers) == found
    for answer, reward in zip(answers, found):
        turns = [*asked, {"role": "assistant", "content": answer.text}]
        ids = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            assert float(saved(**ids).logits) == pytest.approx(reward, abs=1e-5)
    report, card = (run / "report.html").read_text(), (folder / "README.md").read_text()
    assert "a reward model writes no text" in report and "over the reference" not in report
    assert "AutoModelForSequenceClassification" in card and "text-classification" in card
    assert [one["event"] for one in lines(run, "events.jsonl")].count("reference") == 0


def test_it_is_trained_on_from_its_folder(tmp_path):
    """No new head, then: the first loss is the one it ended with."""
    folder = classifier(tmp_path / "model")
    data = tiny.rows(8)
    first = losses(reward_run(tmp_path, folder, data, seed=0))[0]
    (tmp_path / "other").mkdir()
    assert first == losses(reward_run(tmp_path / "other", folder, data, seed=7))[0]


@contextmanager
def ends_in_step(n):
    """As by SIGKILL: nothing more is written."""

    class Killed(BaseException):
        pass

    step = Stage.step

    def step_or_end(self, groups, progress, number, *rest):
        if number == n:
            raise Killed
        return step(self, groups, progress, number, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Stage, "step", step_or_end)
        yield


@pytest.mark.parametrize("keys", [{}, {"lora_rank": 2}, {"gradient_checkpointing": True}])
def test_killed_and_resumed_it_gives_the_same_bits(tmp_path, keys):
    model, weights = tiny.save_model(tmp_path / "model"), {}
    keys = keys | {"max_steps": 5, "save_steps": 2, "batch_size": 4, "max_tokens": 60, "eval_data": 0.2}
    for name in ("whole", "cut"):
        (folder := tmp_path / name).mkdir()
        if name == "cut":
            with ends_in_step(4):
                reward_run(folder, model, tiny.rows(20), **keys)
            assert not (folder / "run" / "model").exists()
        run = reward_run(folder, model, tiny.rows(20), **keys, resume=name == "cut")
        (file,) = (run / "model").glob("*.safetensors")
        weights[name] = load_file(file)
        weights[name] |= {f"loss {i}": torch.tensor(x) for i, x in enumerate(losses(run))}
    assert weights["whole"].keys() == weights["cut"].keys()
    for name, truth in weights["whole"].items():
        assert torch.equal(truth, weights["cut"][name]), name


def test_a_lora_trains_the_head_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    model = tiny.save_model(tmp_path / "model")
    data = conversations(tiny.rows(64))
    run = reward_run(tmp_path, model, data, max_steps=16, lora_rank=4, learning_rate=5e-3)
    assert lines(run)[-1]["accuracy"] > 0.9
    adapter = peft.AutoPeftModelForSequenceClassification.from_pretrained(run / "model", num_labels=1).eval()
    assert main(["merge", str(run), "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    ids = torch.tensor([[5, 9, 40, 33, 8]])
    torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=1e-4, rtol=0)
    plain = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    assert not torch.equal(merged.score.weight, plain.score.weight)
    assert RewardModel(str(tmp_path / "merged"))([Answer(0, "", "cat", 1, raw="the cat")])
    with pytest.raises(ModelError, match="is an adapter, and a reward model has to be whole: `fastdpo merge"):
        RewardModel(str(run))


def test_models_that_none_can_be_trained_on(tmp_path, monkeypatch):
    data = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(4))
    config = tiny.model_config("llama", vocab_size=len(tiny.tokenizer()), num_labels=2)
    two = tmp_path / "two"
    AutoModelForSequenceClassification.from_config(config).save_pretrained(two)
    tiny.tokenizer().save_pretrained(two)
    shared = {"data": data, "output_dir": str(tmp_path / "run"), "data_cache": "off"}
    with pytest.raises(
        ModelError, match=r"has 2 outputs .LlamaForSequenceClassification.; a reward model has"
    ):
        train_reward(shared, QUIET, model=str(two))
    other = tiny.save_model(tmp_path / "cohere", "cohere")
    with pytest.raises(
        ModelError, match="cohere, which transformers has no sequence classifier of; no reward"
    ):
        train_reward(shared, QUIET, model=other)
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"objective": "ipo"}, "objective: 'ipo' is a policy's"),
        ({"objective": {"sigmoid": 1.0, "sft": 1.0}}, "objective: .* is a policy's"),
        ({"beta": 0.1}, "beta: not for a reward model"),
        ({"stages": [{"max_steps": 1}]}, "stages: not for a reward model: run one after the other"),
        ({"adapter": "some"}, "adapter: not for a reward model: merge it"),
        ({"pairs": "hard", "pair_gap": "logp"}, "pair_gap: logp is not for a reward model"),
    ],
)
def test_keys_that_mean_nothing_are_refused(tmp_path, keys, said):
    with pytest.raises(ConfigError, match=said):
        train_reward({"model": "m", "data": "d", **keys}, QUIET)


def test_the_command_and_a_run_of_another_kind(tmp_path, capsys):
    """Its config.yaml says what it is, so that none goes on as a policy's run."""
    model, data = tiny.save_model(tmp_path / "model"), tiny.write_jsonl(tmp_path / "d.jsonl", tiny.rows(8))
    given = ["--model", model, "--data", data, "--output_dir", str(tmp_path / "run"), "--max_steps", "1"]
    given += ["--max_length", "64", "--data_cache", "off", "--reference_cache", "off"]
    assert main(["reward", *given]) == 0
    said = capsys.readouterr().out
    assert "--scorer" in said and "a new head, score, starts at random by seed" in said
    assert "reference_cache: not read: it has no reference" in said and "samples: not read" not in said
    assert "objective: bradley_terry" in (tmp_path / "run" / "config.yaml").read_text()
    assert main(["train", *given, "--resume"]) == 2
    assert "objective: the run in output_dir was started with 'bradley_terry'" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "run"), data]) == 2
    assert "run is a reward model, which says nothing; give it as --scorer" in capsys.readouterr().err


def test_rows_without_pairs_are_refused(tmp_path):
    model = tiny.save_model(tmp_path / "model")
    data = [{"prompt": "the", "completion": " cat", "label": True}] * 4
    with pytest.raises(DataError, match="row 0: an unpaired row, and this needs chosen and rejected"):
        reward_run(tmp_path, model, data)


def test_a_margin_that_is_no_number_is_that_rows_problem(tmp_path):
    model, data = tiny.save_model(tmp_path / "model"), tiny.rows(4)
    data[2]["margin"] = "much"
    run = reward_run(tmp_path, model, data)
    report = json.loads((run / "data_report.json").read_text())["data"]
    assert report["dropped"]["wrong_type"]["examples"] == [2]
