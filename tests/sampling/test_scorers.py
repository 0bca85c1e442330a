"""Scorers by name, and every fault of one: told with the row, and before anything is sampled."""

import json
import sys

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.sampling import scorers
from fastdpo.sampling.scorers import Answer, make_scorer, scores
from tests import tiny
from tests.data.shared_data import assistant, small_tokenizer
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


def with_rows(tmp_path, body):
    (tmp_path / "judge.py").write_text(f"def f(prompts, answers, rows):\n    {body}\n")
    return f"{tmp_path}/judge.py:f"


def test_a_function_that_asks_for_the_rows_gets_one_an_answer(tmp_path):
    asked = []
    rows = lambda number: asked.append(number) or {"answer": str(number)}
    name = with_rows(tmp_path, "return [float(row['answer']) for row in rows]")
    scorer = make_scorer(name, "reward", rows)
    assert asked == [-1]  # its first try
    some = [Answer(row, "p", "a", 1) for row in (7, 7, 3)]
    assert scores(scorer, name, some, silent(), "a model", "reward") == [7.0, 7.0, 3.0]
    assert asked == [-1, 3, 7]  # each once
    scored_without = make_scorer(of_file(tmp_path, "return [1.0] * len(answers)"), "reward", rows)
    scored_without(some)
    assert asked == [-1, 3, 7]


def test_rows_that_cannot_be_read_are_their_own_error(tmp_path):
    def rows(number):
        raise DataError("data: rows.jsonl changed")

    with pytest.raises(DataError, match=r"^data: rows.jsonl changed"):
        make_scorer(with_rows(tmp_path, "return [1.0] * len(rows)"), "reward", rows)


def test_errors_begin_with_the_key_that_named_the_scorer(tmp_path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    for name in (f"{tmp_path}/none.py:f", "a.py", f"{tmp_path}/broken.py:f", of_file(tmp_path, "return 1")):
        with pytest.raises(ConfigError, match=r"^reward: "):
            make_scorer(name, "reward")
    for name in ("no/such/model/here", reward_model(tmp_path / "two", labels=2)):
        with pytest.raises(ModelError, match=r"^reward: '"):
            make_scorer(name, "reward")
    name = of_file(tmp_path, "return [float(a != 'the cat 3') or float('nan') for a in answers]")
    with pytest.raises(ConfigError, match=r"^reward: .*judge.py:f: it returned nan for row 13"):
        scores(make_scorer(name, "reward"), name, answers(), silent(), "a model", "reward")


@pytest.mark.parametrize("chat", [True, False])
def test_a_reward_model_with_another_tokenizer_equals_scoring_its_text_alone(tmp_path, chat):
    """Answers of a policy with other ids, one of them after a reset: each beside the text alone, by hand."""
    name, policys = reward_model(tmp_path / "reward", chat=chat), small_tokenizer()
    turns = [{"role": "user", "content": "good morning?"}]
    prompt = policys.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    ids = lambda text: policys(text, add_special_tokens=False)["input_ids"]
    begun, sampled = ids("gold is"), [ids(" old world<|im_end|>"), ids(" in the morning"), ids("<|im_end|>")]
    assert tiny.tokenizer().get_vocab() != policys.get_vocab()
    some = []
    for forced, rest in zip((begun, [], begun), sampled):
        text = policys.decode(forced + rest, skip_special_tokens=True)
        raw = policys.decode(prompt + forced + rest)
        some.append(Answer(0, "good morning?", text, len(forced + rest), turns, raw))
    assert some[0].text == "gold is old world"
    model, tok = AutoModelForSequenceClassification.from_pretrained(name), tiny.tokenizer(chat)
    for answer, score in zip(some, scored(name, some)):
        text = answer.raw
        if chat:
            text = tok.apply_chat_template([*turns, assistant(answer.text)], tokenize=False)
        with torch.no_grad():
            alone = model(**tok(text, add_special_tokens=not chat, return_tensors="pt")).logits
        assert score == pytest.approx(float(alone), abs=1e-4)


def test_a_reward_model_put_aside_leaves_the_gpu_and_comes_back(tmp_path, monkeypatch):
    name = reward_model(tmp_path / "reward")
    scorer, went = make_scorer(name), []
    monkeypatch.setattr(scorer.model, "to", lambda device: went.append(device))
    scores(scorer, name, answers(2), silent(), "a model")
    assert went == [scorer.device]
    monkeypatch.setattr(scorer, "device", "there")
    monkeypatch.setattr(scorer, "_scored", lambda ids: [0.0] * len(ids))
    scores(scorer, name, answers(2), silent(), "a model", put_aside=True)
    assert went[1:] == ["there", "cpu"]
    monkeypatch.setattr(scorer, "_scored", lambda ids: [float("nan")] * len(ids))
    with pytest.raises(ConfigError):
        scores(scorer, name, answers(2), silent(), "a model", put_aside=True)
    assert went[3:] == ["there", "cpu"]
