"""What is wrong with rounds is told by key, row or file, and before work is lost."""

from pathlib import Path

import pytest

from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError, DataError, DeadEndError
from fastdpo.training.job import resolve
from tests.tiny import rows, write_jsonl
from tests.training.round_runs import config_of, events, inputs_in, outcome, replaced, round_lines, run

ROUNDS = dict(rounds=2, reward="length")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return inputs_in(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture
def make(inputs, tmp_path):
    return lambda name="run", **keys: config_of(inputs, tmp_path / name, **keys)


@pytest.mark.parametrize(
    "keys, text",
    [
        (dict(reward=None), "reward: rounds need what scores the samples"),
        (dict(sample={"responses": 1}), "sample: responses: 1 has nothing to be compared with"),
        (
            dict(max_length=256),
            "sample: max_new_tokens: 256 leaves no room for a prompt within max_length: 256",
        ),
        (dict(rounds=0), "rounds: 0 is below 1"),
        (dict(rounds=None, objective="rloo", reward=None), "objective: rloo trains on the policy's own"),
        (dict(rounds=None, reward=None, sample={"responses": 4}), "sample: read only with rounds"),
        (dict(rounds=None), "reward: read only with rounds"),
        (dict(rounds=None, reward=None, reference="start"), "reference: read only with rounds"),
        (dict(reference="start"), r"reference: start needs a fresh LoRA \(lora_rank\)"),
        (dict(reference="first"), "reference: .*'first'"),
        (dict(stages=[dict(max_steps=2)]), "stages: not with rounds"),
        (dict(objective="rloo", eval_data=4), "eval_data: rloo has a loss of the policy's own samples alone"),
        (dict(objective="rloo", pairs="best_worst"), "pairs: rloo looks at all samples of a prompt"),
        (dict(flip_pairs=0.1), "flip_pairs: not with rounds"),
        (dict(load_best=True), "load_best: not with rounds"),
        (dict(max_steps=9), "max_steps: not with rounds"),
        (dict(pairs="hard", pair_gap="logp"), "pair_gap: not with rounds"),
        (dict(sample={"respones": 4}), "sample: unknown option 'respones'.*responses"),
        (dict(sample={"engine": "sglang"}), "sample: engine"),
        (dict(sample={"prompts": 0}), "sample: prompts: 0 is not 1 or more"),
        (dict(sample={"prompts": 1.5}), "sample: prompts: 1.5 is not a whole number"),
        (dict(sample={"prompts": True}), "sample: prompts: True is not a whole number"),
        (dict(sample={"max_new_tokens": 0}), "sample: max_new_tokens: 0 is not 1 or more"),
        (dict(sample={"temperature": 0}), "sample: temperature: 0 is not above 0"),
        (dict(sample={"temperature": float("nan")}), "sample: temperature: nan is not above 0"),
        (dict(sample={"temperature": "hot"}), "sample: temperature: 'hot' is not a number"),
        (dict(sample={"top_p": 1.2}), r"sample: top_p: 1.2 is not in \(0, 1\]"),
        (dict(sample={"resets": -0.1}), r"sample: resets: -0.1 is not in \[0, 1\]"),
        (dict(sample={"missing_eos_penalty": -1}), "sample: missing_eos_penalty: -1 is not 0 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_config_is_refused_before_anything_is_read(keys, text):
    with pytest.raises(ConfigError, match=text):
        resolve(Config(**dict(model="none", data="none") | ROUNDS | keys))


def test_all_faults_of_sample_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        resolve(Config(model="none", data="none", **ROUNDS, sample={"top_p": 0, "resets": 2, "prompt": 3}))
    assert all(
        f"sample: {name}" in str(error.value) for name in ("top_p", "resets", "unknown option 'prompt'")
    )


@pytest.fixture
def long_row(tmp_path):
    """Row 2 has a prompt of 59 tokens, which leaves room for its own responses alone."""
    some = rows(12)
    some[2] = dict(prompt="cat" + " cat" * 58, chosen=" cat", rejected=" dog")
    return write_jsonl(tmp_path / "long.jsonl", some)


def test_a_prompt_without_room_is_left_out_and_counted(make, long_row):
    config = make(data=long_row, rounds=1, sample=dict(prompts=20))
    said = run(config)
    assert "sample: 1 row left out: row 2 has a prompt of 59 tokens, which leaves no room for" in said
    assert "sample: prompts: the rows have 11, and a round takes all of them" in said
    assert {line["row"] for line in round_lines(config, 1)} == set(range(12)) - {2}
    assert [one["rows"] for one in events(config, "no_room")] == [1]


def test_under_strict_it_ends_the_run_as_do_rows_none_of_which_has_room(make, long_row):
    with pytest.raises(DataError, match=r"sample: row 2 .* no room for max_new_tokens: 6 within 64; sample"):
        run(make(data=long_row, strict=True))
    with pytest.raises(DataError, match=r"sample: row 0 has a prompt of .* no room for max_new_tokens: 63"):
        run(make("none", sample=dict(max_new_tokens=63)))


BAD = {
    "[float('nan') if i == 4 else 1.0 for i in range(n)]": r"it returned nan for row {row}, and a finite",
    "[1.0] * (n - 1 if n > 1 else 1)": r"it returned 23 numbers for 24 answers",
    "[1 / (answer != TEXT) for answer in answers]": r"it raised ZeroDivisionError: .*\(row {row}\)",
    "None if n > 1 else [1]": "it returned None, no list of numbers",
}


@pytest.mark.parametrize("body", BAD)
def test_a_reward_that_fails_names_the_row(make, tmp_path, body):
    sampled = make("sampled", rounds=1)
    run(sampled)
    line = round_lines(sampled, 1)[1]  # whose second answer is the fifth of all
    text = f"TEXT = {line['responses'][1]['text']!r}"
    code = f"{text}\ndef f(prompts, answers):\n    n = len(answers)\n    return {body}\n"
    (tmp_path / "r.py").write_text(code)
    config = make(reward=f"{tmp_path}/r.py:f", rounds=1)
    with pytest.raises(ConfigError, match=rf"^reward: .*r\.py:f: {BAD[body].format(row=line['row'])}"):
        run(config)
    assert len(round_lines(config, 1)) == 8  # to be scored by a mended one, with --resume
    assert not (Path(config.output_dir) / "events.jsonl").exists()


def test_a_reward_that_fails_its_first_try_costs_no_sample(make, tmp_path):
    (tmp_path / "r.py").write_text("def f(prompts, answers):\n    return [None] * len(answers)\n")
    config = make(reward=f"{tmp_path}/r.py:f")
    with pytest.raises(ConfigError, match=r"reward: .* fails its first try"):
        run(config)
    assert not Path(config.output_dir).exists()


def test_two_rounds_without_a_signal_end_the_run_with_what_was_scored(make):
    config = make(reward="same", rounds=3, lora_rank=2)
    text = r"rounds 1 and 2 have no signal: .* the same \(24 in \[0\.\d+, 0\.\d+\]\)\. Look at what `reward`"
    with pytest.raises(DeadEndError, match=text):
        run(config)
    assert [one["no_signal"] for one in events(config, "round")] == [8, 8]
    with pytest.raises(DeadEndError, match=text):
        run(replaced(config, resume=True))
    assert [one["round"] for one in events(config, "round")] == [1, 2]


def test_two_rounds_without_a_signal_after_others_end_it_with_what_it_has_learnt(make):
    config = make(reward="quiet_after", rounds=5)
    said = run(config)
    assert "rounds 2 and 3 have no signal any more (24 in" in said
    assert "the run ends here, with what it has learnt before" in said
    once = make("once", rounds=1, lr_scheduler_type="constant")
    again = make("again", reward="quiet_after", rounds=5, lr_scheduler_type="constant")
    run(once), run(again)
    assert outcome(once)["weights"] == outcome(again)["weights"]
    run(replaced(again, resume=True))
    assert [one["round"] for one in events(again, "round")] == [1, 2, 3]
    assert outcome(once)["weights"] == outcome(again)["weights"]


def test_resets_without_chosen_responses_are_counted(make, tmp_path):
    data = write_jsonl(
        tmp_path / "some.jsonl", [*rows(3), *({"prompt": row["prompt"]} for row in rows(9)[3:])]
    )
    said = run(make(data=data, rounds=1, sample=dict(resets=1.0)))
    assert "sample: resets: 6 rows of 9 have no chosen response to begin with" in said


def test_samples_of_another_temperature_are_not_the_policys_own(make):
    said = run(make(rounds=1, objective="rloo", sample=dict(temperature=0.7)))
    assert "rloo takes samples for the policy's own" in said
