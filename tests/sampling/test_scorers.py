"""Scorers by name, and every fault of one: told with the row, and before anything is sampled."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from fastdpo.errors import ConfigError, ModelError
from fastdpo.sampling import scorers
from fastdpo.sampling.scorers import Answer, make_scorer, scores
from tests import tiny
from tests.training.test_samples import silent


def answers(n=5):
    return [
        Answer(10 + i, f"prompt {i}", f"the cat {i}", 3 + i, raw=f"prompt {i} the cat {i}") for i in range(n)
    ]


def of_file(tmp_path, body):
    (tmp_path / "judge.py").write_text(f"def f(prompts, answers):\n    {body}\n")
    return f"{tmp_path}/judge.py:f"


def scored(name, some=None):
    return scores(make_scorer(name), name, some or answers(), silent(), "a model")


def test_length_and_a_file_of_ones_own(tmp_path):
    assert scored("length") == [3, 4, 5, 6, 7]
    name = of_file(tmp_path, "return [len(p) + 100 * a.count('cat') for p, a in zip(prompts, answers)]")
    assert scored(name) == [108.0] * 5
    (tmp_path / "judge.py").write_text("import numpy\nf = lambda prompts, answers: numpy.ones(len(prompts))")
    assert scored(name) == [1.0] * 5


def test_vader(monkeypatch):
    pytest.importorskip("vaderSentiment")
    good, bad = (Answer(0, "", text, 1) for text in ("What a wonderful day!", "This is a terrible crime."))
    assert scored("vader", [good])[0] > 0.5 and scored("vader", [bad])[0] < -0.5
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match=r"pip install 'fastdpo\[learn\]'"):
        make_scorer("vader")


FAULTS = {  # the body of a function -> what is said of its first try
    "return None": "it returned None, no list of numbers",
    "return [1.0, 2.0]": "it returned 2 numbers for 1 answers",
    "return [float('nan')]": "it returned nan, and a finite number is needed",
    "return ['good']": "it returned 'good', and a finite number is needed",
    "return [None]": "it returned None, and a finite number",
    "return 1 / 0": "it raised ZeroDivisionError: division by zero",
}


@pytest.mark.parametrize("body", FAULTS)
def test_a_wrong_function_is_found_on_its_first_try(tmp_path, body):
    with pytest.raises(ConfigError) as found:
        make_scorer(of_file(tmp_path, body))
    assert f"fails its first try, on an answer to 'Hello.': {FAULTS[body]}" in str(found.value)
    assert "row" not in str(found.value)


@pytest.mark.parametrize(
    "body, said",
    [
        ("return [1.0 if a != 'the cat 3' else float('nan') for a in answers]", "it returned nan for row 13"),
        ("return [1 / (a != 'the cat 3') for a in answers]", r"ZeroDivisionError: .* \(row 13\)"),
        ("return [1.0]", r"1 numbers for 5 answers \(rows 10, 11, 12, 13, 14\)"),
        ("return [len(a) for a in answers] if len(answers) < 5 else 7", r"returned 7, no list .*\(rows 10, "),
    ],
)
def test_a_later_fault_names_its_row(tmp_path, body, said):
    with pytest.raises(ConfigError, match=said):
        scored(of_file(tmp_path, body))


def test_wrong_names(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    for name, said in (
        (f"{tmp_path}/none.py:f", "there is no file"),
        (f"{tmp_path}/judge.py", "which function of it"),
        (of_file(tmp_path, "return 1").replace(":f", ":g"), "has no function 'g'"),
        (f"{tmp_path}/broken.py:f", "cannot be run: ModuleNotFoundError"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_scorer(name)
    with pytest.raises(ModelError, match="scorer: 'no/such/model/here' does not exist here"):
        make_scorer("no/such/model/here")


def reward_model(folder, labels=1, chat=True):
    tok = tiny.tokenizer(chat)
    config = tiny.model_config("llama", vocab_size=len(tok), num_labels=labels, pad_token_id=None)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("chat", [True, False])
def test_a_reward_model_is_given_the_chat_templates_text(tmp_path, chat):
    """Its own template's, where it has one and the turns are known: beside the model called by hand."""
    name = reward_model(tmp_path / "reward", chat=chat)
    turns = [{"role": "user", "content": "the red cat"}]
    some = [Answer(i, "", "the dog" + " likes" * i, 4, turns, f"raw {i}") for i in range(11)]
    found = scored(name, some)
    model, tok = AutoModelForSequenceClassification.from_pretrained(name), tiny.tokenizer(chat)
    for answer, score in zip(some, found):
        text = answer.raw
        if chat:
            text = tok.apply_chat_template(
                [*turns, {"role": "assistant", "content": answer.text}], tokenize=False
            )
        ids = torch.tensor([tok(text, add_special_tokens=not chat)["input_ids"]])
        with torch.no_grad():
            assert score == pytest.approx(float(model(input_ids=ids).logits), abs=1e-4)
    assert len({round(score, 6) for score in found}) > 5


def test_what_is_no_reward_model(tmp_path):
    with pytest.raises(
        ModelError, match=r"has 2 outputs .LlamaForSequenceClassification.; a reward model has"
    ):
        make_scorer(reward_model(tmp_path / "two", labels=2))
    with pytest.raises(ModelError, match="has 2 outputs"):
        make_scorer(tiny.save_model(tmp_path / "causal"))
    folder = tmp_path / "headless"
    tiny.save_model(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"id2label": {"0": "score"}}))
    assert AutoConfig.from_pretrained(folder).num_labels == 1
    with pytest.raises(ModelError, match=r"it lacks score.weight, which would start at random"):
        make_scorer(str(folder))


def test_an_answer_beyond_its_positions(tmp_path, monkeypatch):
    scorer = make_scorer(reward_model(tmp_path / "reward", chat=False))
    monkeypatch.setattr(scorer, "limit", 8)
    some = [Answer(3, "", "", 1, raw="cat"), Answer(4, "", "", 1, raw="cat " * 20)]
    with pytest.raises(ConfigError, match=r"row 4: \d+ tokens, and it has 8 positions"):
        scores(scorer, "reward", some, silent(), "a model")


def test_numbers_of_numpy_and_torch():
    assert scorers._checked(lambda _: torch.tensor([1.5, 2.5]), answers(2), "s") == [1.5, 2.5]
    assert scorers._checked(lambda _: [np.float32(1.5), True], answers(2), "s") == [1.5, 1.0]
