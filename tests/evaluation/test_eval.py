"""`fastdpo eval` on tiny runs: numbers beside the trainer's own and plain definitions, and all bad input."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdpo
from fastdpo.cli import main
from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.evaluation import evaluate as module
from fastdpo.evaluation import result
from fastdpo.model.support import stock_logp
from tests import tiny
from tests.evaluation.runs import WHERE, evaluated
from tests.ggufs import save_gguf
from tests.training.test_samples import silent
from tests.training.test_trainer import Run


def value(found, name, of="model"):
    return found["numbers"][of][name]["value"]


@pytest.mark.parametrize("name", ["lora", "full"])
def test_the_numbers_are_those_that_the_run_logged(place, name):
    """On the run's held-out rows: means, standard errors, and the reference out of the run's cache."""
    run = place[1] if name == "lora" else place[2]
    found = evaluated(place, name, "eval.jsonl")
    logged = run.evals[-1]
    for number in ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies", "kl"):
        one = found["numbers"]["model"][number]
        assert one["value"] == pytest.approx(logged[f"eval_{number}"], rel=1e-4, abs=1e-7)
        assert one["stderr"] == pytest.approx(logged[f"eval_{number}_stderr"], rel=1e-3, abs=1e-7)
        assert one["prompts"] == 8
    before = run.evals[0]["eval_logps/accuracies"]
    assert value(found, "logps/accuracies", "reference") == pytest.approx(before)
    assert found["objective"] == "sigmoid" and found["beta"] == (0.1 if name == "lora" else 0.3)
    assert found["names"] == {"model": str(place[0] / name), "reference": run.start}


def logps_of(place, model):
    """Per row (chosen, rejected) by the model's own logits, of separate rows."""
    from fastdpo.data.groups import Limits
    from fastdpo.data.load import load_groups
    from fastdpo.model.loading import load_policy, load_tokenizer
    from fastdpo.model.spec import ModelSpec

    spec = ModelSpec(str(model), max_length=64, dtype="fp32")
    groups, _ = load_groups(
        str(place[0] / "rows.jsonl"), load_tokenizer(spec), Limits(64), strict=False, console=silent()
    )
    policy = load_policy(spec, silent())
    policy.model.eval()
    with torch.no_grad():
        sums = [
            [float(s.sum()) for s in stock_logp(policy, g).split([len(r.ids) for r in g.responses])]
            for g in groups
        ]
    lengths = [[len(r.ids) for r in g.responses] for g in groups]
    return np.array(sums), np.array(lengths)


@pytest.fixture(scope="module")
def both(place):
    """lora against full, with the reference's and both models' answers scored."""
    keys = dict(samples=30, scorer="length", per_prompt=2, max_new_tokens=6, seed=1, versus="full")
    return evaluated(place, output=place[0] / "both", **keys)


def test_numbers_against_plain_definitions(place, both):
    folder = place[0]
    policy, lengths = logps_of(place, folder / "lora/model")
    reference, _ = logps_of(place, folder / "model")
    margin = 0.1 * ((policy - reference) @ [1, -1])
    longer, shorter = lengths[:, 0] > lengths[:, 1], lengths[:, 0] < lengths[:, 1]
    assert value(both, "rewards/margins") == pytest.approx(margin.mean(), rel=1e-3)
    assert value(both, "loss") == pytest.approx(np.log1p(np.exp(-margin)).mean(), rel=1e-4)
    alone = policy[:, 0] > policy[:, 1]
    assert value(both, "logps/accuracies") == pytest.approx(alone.mean())
    assert value(both, "logps/accuracies_longer") == pytest.approx(alone[longer].mean())
    assert value(both, "logps/accuracies_shorter") == pytest.approx(alone[shorter].mean())
    over = margin > 0
    assert value(both, "rewards/accuracies_shorter") == pytest.approx(over[shorter].mean())
    ours = reference[:, 0] > reference[:, 1]
    assert value(both, "logps/accuracies", "reference") == pytest.approx(ours.mean())
    data = both["data"]
    share = (longer + 0.5 * (lengths[:, 0] == lengths[:, 1])).mean()
    assert data["won_by_length"]["value"] == pytest.approx(share)
    assert (data["chosen_longer"], data["chosen_shorter"]) == (longer.sum(), shorter.sum())
    assert (data["rows"], data["prompts"], data["pairs"]) == (30, 29, 30)
    even = {entry["source"]: entry for entry in both["sources"]}
    assert even.keys() == set(WHERE) and even["odd"]["pairs"] == even["odd"]["rows"] == 15
    for start, source in enumerate(WHERE):
        found = even[source]["numbers"]["model"]
        assert found["rewards/margins"]["value"] == pytest.approx(margin[start::2].mean(), rel=1e-3)
        assert found["logps/accuracies"]["value"] == pytest.approx(alone[start::2].mean())


def test_paired_tests_are_of_the_differences_prompt_by_prompt(both):
    tests = {(test["number"], test["other"]): test for test in both["tests"]}
    numbers = ("logps/accuracies", "rewards/accuracies", "rewards/margins", "loss", "samples/score")
    assert tests.keys() == {(number, "versus") for number in (*numbers, "samples/wins")} | {
        (number, "reference") for number in ("logps/accuracies", "samples/score", "samples/wins")
    }
    test, by_prompt = tests["rewards/margins", "versus"], both["by_prompt"]["rewards/margins"]
    apart = np.subtract(by_prompt["model"], by_prompt["versus"])
    assert len(apart) == 29 and len(by_prompt["rows"]) == 29
    assert test["difference"] == pytest.approx(
        value(both, "rewards/margins") - value(both, "rewards/margins", "versus")
    )
    assert test["error"] == pytest.approx(apart.std(ddof=1) / math.sqrt(29))
    assert test["p"] == pytest.approx(math.erfc(abs(test["z"]) / math.sqrt(2)), abs=1e-9)


def test_answers_their_scores_and_win_rates(both):
    assert both["answered"] == 29 and len(both["answers"]) == 29  # of 30 asked for
    scores = {
        key: np.array([[one["score"] for one in entry["answers"][key]] for entry in both["answers"]])
        for key in ("model", "reference", "versus")
    }
    for key, some in scores.items():
        assert some.shape == (29, 2) and value(both, "samples/score", key) == pytest.approx(some.mean())
        assert value(both, "samples/length", key) == pytest.approx(some.mean())
        assert both["numbers"][key]["samples/score"]["stderr"] == pytest.approx(
            some.mean(1).std(ddof=1) / math.sqrt(29), abs=1e-9
        )
    a, b = scores["model"][:, :, None], scores["versus"][:, None]
    won = ((a > b) + 0.5 * (a == b)).mean()
    assert value(both, "samples/wins over versus") == pytest.approx(won)
    for entry in both["answers"]:
        for one in entry["answers"]["model"]:
            assert one["kl"] > 0 and (one["ended"] or one["tokens"] == 6)
        assert "kl" not in entry["answers"]["reference"][0]
    assert 0 < value(both, "samples/kl") and 0 < value(both, "samples/kl", "versus")


def test_the_same_seed_gives_the_same_again(place, both):
    keys = dict(samples=30, scorer="length", per_prompt=2, max_new_tokens=6, seed=1, versus="full")
    again = evaluated(place, output=place[0] / "both", overwrite=False, **keys)
    assert {k: v for k, v in again.items() if k != "time"} == {k: v for k, v in both.items() if k != "time"}


def test_the_model_itself_as_versus_is_no_difference(place):
    found = evaluated(place, "full", versus="full", samples=4, scorer="length", max_new_tokens=4)
    assert all(test["difference"] == 0 for test in found["tests"] if test["other"] == "versus")
    assert found["numbers"]["model"]["samples/wins over versus"]["value"] == 0.5


def test_a_model_that_is_its_reference(place):
    found = evaluated(place, "model", reference="model", max_length=64, samples=3, max_new_tokens=4)
    assert "rewards/accuracies" not in found["numbers"]["model"] and value(found, "kl") == 0
    assert value(found, "samples/kl") == pytest.approx(0, abs=1e-6)
    assert value(found, "loss") == pytest.approx(math.log(2)) and "all pairs tie" in found["notes"][0]


def test_a_whole_model_has_no_reference_unless_it_is_named(place):
    found = evaluated(place, "model", max_length=64, samples=3, max_new_tokens=4)
    assert set(found["numbers"]) == {"model"} and found["tests"] == [] and found["margins"] == {}
    wanted = {"logps/accuracies", "logps/accuracies_longer", "logps/accuracies_shorter"}
    assert set(found["numbers"]["model"]) == wanted | {"samples/length", "samples/ended"}
    assert "no reference that is known" in found["notes"][0]
    named = evaluated(place, "model", max_length=64, reference="full")
    assert "rewards/margins" in named["numbers"]["model"]


def test_an_adapters_reference_is_its_base(place):
    """An adapter's folder that is no run's: elsewhere, as somebody has it."""
    folder = place[0]
    shutil.copytree(folder / "lora/model", folder / "adapter")
    found, of_run = evaluated(place, "adapter", max_length=64), evaluated(place, "lora")
    assert found["numbers"] == of_run["numbers"] and found["names"]["reference"] == str(folder / "model")
    inside = evaluated(place, "lora/model")  # its run is known by the folder around it
    assert inside["numbers"] == of_run["numbers"] and inside["beta"] == 0.1


@pytest.mark.parametrize("objective", ["kto", "sft", "simpo", "bco", "drdpo", "{sigmoid: 0.8, sft: 0.2}"])
def test_other_objectives(place, objective):
    found = evaluated(place, objective=objective)
    loss = found["numbers"]["model"]["loss"]
    assert math.isfinite(loss["value"]) and (loss["stderr"] is None) == (objective in ("bco", "drdpo"))
    assert found["numbers"]["model"]["rewards/margins"]["prompts"] == 29
    assert any("does not refer to the reference" in note for note in found["notes"]) == (
        objective in ("sft", "simpo")
    )


def test_a_run_of_samples_is_seen_as_dpos(place):
    """Its own loss is of none of these rows."""
    folder, run = place[0] / "sampled", place[1]
    shutil.copytree(run.folder, folder)
    named = f"model: {run.start}\ndata: {run.data}\nlora_rank: 4\ndtype: fp32\nmax_length: 64\n"
    samples = "rounds: 2\nreward: length\nsample: {max_new_tokens: 8}\n"
    objective = "objective: rloo\nobjective_args: {kl_coef: 0.1}\n"
    (folder / "config.yaml").write_text(named + samples + objective)
    found = evaluated(place, "sampled")
    assert (found["objective"], found["rewards"], found["beta"]) == ("sigmoid", "sigmoid", 0.1)
    assert found["numbers"] == evaluated(place, "lora")["numbers"]


def test_an_adapters_reference_answers_as_the_base_alone(place):
    """Its base with the adapter off, beside the base that is loaded by itself."""
    keys = dict(samples=6, max_new_tokens=8, seed=4)
    of = [evaluated(place, name, **keys)["answers"] for name in ("lora", "full")]
    references, models = [
        [[entry["answers"][key][0]["text"] for entry in some] for some in of]
        for key in ("reference", "model")
    ]
    assert references[0] == references[1] and models[0] != models[1] and models[0] != references[0]


def test_rows_without_pairs(place):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in tiny.rows(24, seed=7)
        for side in ("chosen", "rejected")
    ]
    tiny.write_jsonl(place[0] / "unpaired.jsonl", rows)
    found = evaluated(place, data="unpaired.jsonl", objective="kto")
    assert set(found["numbers"]["model"]) == {"loss", "kl"} and found["data"]["won_by_length"] is None
    assert found["numbers"]["model"]["loss"]["prompts"] == 24 and found["tests"] == []
    with pytest.raises(DataError, match="data: row 0: an unpaired row"):
        evaluated(place, data="unpaired.jsonl")


def test_a_run_of_several_stages_says_what_its_reference_is(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *_, **__: None)
    stages = [{"objective": "sft", "max_steps": 1, "beta": None}, {"objective": "ipo", "max_steps": 1}]
    run = Run(tmp_path, stages=stages)
    found = fastdpo.evaluate(run.folder, run.data, console=silent())
    assert found["objective"] == "ipo" and "the run had 2 stages" in found["notes"][0]
    assert (run.folder / "eval/eval.json").exists()


def test_sources_that_are_none_or_too_many(place):
    folder = place[0]
    assert evaluated(place, data="eval.jsonl")["sources"] == []
    rows = tiny.rows(60, seed=5)
    tiny.write_jsonl(folder / "many.jsonl", [row | {"source": str(i)} for i, row in enumerate(rows)])
    found = evaluated(place, data="many.jsonl")
    assert found["sources"] == [] and "60 values, too many for a table" in found["notes"][-1]
    rows[0]["source"], rows[1]["source"] = {"a": 1}, 7
    tiny.write_jsonl(folder / "some.jsonl", rows)
    names = [entry["source"] for entry in evaluated(place, data="some.jsonl")["sources"]]
    assert names == ["(none)", "7", '{"a": 1}']


def test_several_data_sets_keep_their_sources(place):
    folder = place[0]
    data = [str(folder / "eval.jsonl"), str(folder / "rows.jsonl")]
    found = fastdpo.evaluate(folder / "lora", data, console=silent(), output=folder / "out", overwrite=True)
    sizes = {entry["source"]: entry["rows"] for entry in found["sources"]}
    assert sizes == {"odd": 15, "even": 15, "(none)": 8}


def argv(place, *flags, model="lora", data="rows.jsonl"):
    folder = place[0]
    return ["eval", str(folder / model), str(folder / data), "--output", str(folder / "out"), *flags]


def test_the_command(place, capsys, tmp_path):
    code = main(["eval", str(place[0] / "lora"), str(place[0] / "rows.jsonl"), "--objective", "ipo"])
    said = capsys.readouterr().out
    assert code == 0 and "accuracy of the policy" in said and "written:" in said
    made = json.loads((place[0] / "lora/eval/eval.json").read_text())
    assert made["objective"] == "ipo" and made["settings"]["objective"] == "ipo"
    assert "<table>" in (place[0] / "lora/eval/eval.html").read_text()


def test_another_evaluation_is_not_overwritten_unasked(place, capsys):
    assert main(argv(place, "--overwrite", "--beta", "0.2")) == 0
    before = (place[0] / "out/eval.json").read_text()
    assert main(argv(place, "--beta", "0.5")) == 2
    assert "holds an evaluation of other settings (beta 0.2)" in capsys.readouterr().err
    assert (place[0] / "out/eval.json").read_text() == before
    assert main(argv(place, "--beta", "0.2")) == 0  # the same one
    (place[0] / "out/eval.json").write_text(before[:100])  # damaged by somebody
    assert main(argv(place, "--beta", "0.2")) == 2
    assert main(argv(place, "--beta", "0.2", "--overwrite")) == 0


def test_what_was_killed_leaves_no_result(place, monkeypatch, capsys):
    """In the middle of the sampling, and between the two files."""
    output = place[0] / "killed"
    command = ["eval", str(place[0] / "full"), str(place[0] / "rows.jsonl"), "--samples", "2"]
    call = lambda: main([*command, "--max_new_tokens", "3", "--output", str(output)])

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    for where, left in (("add_kl", []), ("show", []), ("page", [])):
        with monkeypatch.context() as patch:
            patch.setattr(module, where, interrupt)
            assert call() == 130
        assert [path.name for path in output.iterdir()] == left
    with monkeypatch.context() as patch:
        whole = result.durable.write_text
        html_only = lambda path, text: whole(path, text) if path.suffix == ".html" else interrupt()
        patch.setattr(result.durable, "write_text", html_only)
        assert call() == 130
    assert [path.name for path in output.iterdir()] == ["eval.html"]
    assert call() == 0 and {path.name for path in output.iterdir()} == {"eval.html", "eval.json"}


BAD = {  # what is given -> (the error, what it says)
    "no data": ({"data": []}, ConfigError, "data: which rows"),
    "no model": ({"model": "nowhere/at/all"}, ModelError, "model: .*does not exist here"),
    "no reference": ({"reference": "nowhere/at/all"}, ModelError, "reference: 'nowhere/at/all' does not"),
    "no versus": ({"versus": "nowhere/at/all"}, ModelError, "versus: 'nowhere/at/all' does not exist"),
    "samples": ({"samples": -1}, ConfigError, "samples: -1 is below 0"),
    "per_prompt": ({"per_prompt": 0}, ConfigError, "per_prompt: 0 is below 1"),
    "scorer without answers": ({"scorer": "length", "samples": 0}, ConfigError, "it needs answers"),
    "objective": ({"objective": "sigmiod"}, ConfigError, "objective: 'sigmiod'.* Did you mean 'sigmoid'"),
    "beta": ({"beta": -1.0}, ConfigError, "beta: -1"),
    "rows": ({"data": "nowhere.jsonl"}, DataError, "data: '.*nowhere.jsonl' does not exist here"),
    "format": ({"data_format": "nothing"}, ConfigError, "data_format: 'nothing' is not one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_before_any_work(place, name, monkeypatch):
    monkeypatch.setattr(module, "loaded", lambda *_: pytest.fail("weights were loaded"))
    keys, error, said = BAD[name]
    good = {"model": place[0] / "lora", "data": str(place[0] / "rows.jsonl"), "output": place[0] / "bad"}
    keys = good | keys
    with pytest.raises(error, match=said):
        fastdpo.evaluate(console=silent(), **keys)
    assert not (place[0] / "bad/eval.json").exists()


def test_rows_without_what_the_objective_reads(place):
    with pytest.raises(DataError, match=r"data: row 0: .* has no score"):
        evaluated(place, objective="odpo")


def test_other_tokenizers_are_refused(place, tmp_path):
    other = tmp_path / "other"
    tiny.save_model(other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"<|im_start|>"', '"<|begins|>"'))
    for key in ("reference", "versus"):
        with pytest.raises(ConfigError, match=r"different tokenizers .token 1 is '<.im_start.>' in the one"):
            evaluated(place, **{key: other})


def test_a_scorer_that_fails_does_so_before_the_models_are_loaded(place, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "loaded", lambda *_: pytest.fail("weights were loaded"))
    (tmp_path / "judge.py").write_text("def f(prompts, answers):\n    return [0.5] * 7\n")
    with pytest.raises(ConfigError, match="fails its first try"):
        evaluated(place, scorer=f"{tmp_path}/judge.py:f")


def test_a_scorer_gets_the_rows_as_the_data_has_them(place, tmp_path):
    """By the number that `source` was numbered by, in two data sets: odd rows score 1."""
    body = "return [float(row['source'] == 'even') + 10 * ('chosen' in row) for row in rows]"
    (tmp_path / "judge.py").write_text(f"def f(prompts, answers, rows):\n    {body}\n")
    keys = dict(samples=29, max_new_tokens=2, scorer=f"{tmp_path}/judge.py:f")
    found = evaluated(place, "full", **keys)
    assert {one["row"]: one["answers"]["model"][0]["score"] for one in found["answers"]} == {
        one["row"]: 10.0 + one["row"] % 2 for one in found["answers"]
    }


def test_a_folder_that_cannot_be_written(place, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output: cannot write into the folder"):
        evaluated(place, output=tmp_path / "file/eval")


def test_a_base_that_has_gone_is_named_with_the_way_out(place, tmp_path):
    shutil.copytree(place[0] / "full", tmp_path / "full")
    config = tmp_path / "full/config.yaml"
    config.write_text(config.read_text().replace(f"model: {place[2].start}", "model: gone/for/good"))
    with pytest.raises(ModelError, match=r"reference: 'gone/for/good'.* name it by --reference"):
        fastdpo.evaluate(tmp_path / "full", str(place[0] / "rows.jsonl"), console=silent())
    assert not Path("gone").exists()


def test_a_gguf_and_a_lora_that_was_trained_on_it(tmp_path, monkeypatch):
    """The file alone has no reference; a run's is the file that it started from."""
    monkeypatch.setattr("fastdpo.api.write_report", lambda *_, **__: None)
    start = save_gguf(tmp_path / "tiny.gguf")
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(24, seed=3))
    keys = dict(max_length=64, reference_cache=str(tmp_path / "cache"), output_dir=str(tmp_path / "run"))
    keys |= dict(lora_rank=4, learning_rate=1e-2, max_steps=4, batch_size=8)
    fastdpo.train(model=start, data=str(tmp_path / "rows.jsonl"), console=silent(), **keys)
    of = lambda model: evaluated((tmp_path,), model, max_length=64, samples=2, max_new_tokens=4)
    whole, trained = of("tiny.gguf"), of("run")
    assert trained["names"]["reference"] == start
    assert "rewards/accuracies" not in whole["numbers"]["model"]
    assert value(trained, "rewards/accuracies") > 0.5
    alone = value(whole, "logps/accuracies")
    assert alone == value(trained, "logps/accuracies", "reference")
