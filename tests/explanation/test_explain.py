"""`fastdpo explain` end to end on tiny models: identities of what it says, each option, what it writes."""

import numpy as np
import pyarrow.parquet as pq
import pytest

import fastdpo
from tests import tiny
from tests.explanation.runs import MIXTURE, json_of, rows, save_moved
from tests.training.test_samples import silent

RUNS = ("full", "lora", "gpt2/run")
WHAT = {"before", "ablated", "constant", "token", "parts", "random", "after"}
WRITTEN = {"explain.html", "explain.json", "neurons.parquet"}


@pytest.fixture(params=RUNS)
def kept(place, request):
    """(what is said of a run, its folder)"""
    return place.kept(request.param, causes=30)


def row_of(found, name):
    (row,) = (row for row in found["causes"]["rows"] if row["name"] == name)
    return row


def test_all_parts_of_a_run(kept, place):
    found, folder = kept
    assert {path.name for path in folder.iterdir()} == WRITTEN
    assert found == json_of(folder) and found["changed"]
    assert found["data"] == {
        "rows": 30,
        "prompts": 29,
        "pairs": 30,
        "tokens": found["data"]["tokens"],
        "causes_pairs": 29,
        "source": str(place.folder / "rows.jsonl"),
    }
    assert found["direction"]["found"] and found["direction"]["kind"] == "pairs"
    assert found["weights"]["reason"] is None and 0 < found["weights"]["relative"] < 1
    assert found["seconds"].keys() == {"before", "after", "recording", "behaviour", "causes"}
    page = (folder / "explain.html").read_text()
    for title in ("Weights", "Behaviour", "Direction", "Where", "Neurons", "Causes"):
        assert f">{title}</h2>" in page


def test_the_parts_are_the_whole_change(kept):
    """Of the projection: by embedding, attentions and MLPs; and what MLPs changed, by neurons and bias."""
    found, _ = kept
    where, neurons, direction = found["where"], found["neurons"], found["direction"]
    assert where["exact"] < 1e-5 and abs(where["total"]) > 1e-3
    assert where["sum"] == pytest.approx(
        where["embedding"] + sum(where["attention"]) + sum(where["mlp"]), rel=1e-9
    )
    assert where["total"] == pytest.approx(direction["after"] - direction["before"], rel=1e-9)
    assert neurons["net"] + neurons["bias"] == pytest.approx(sum(where["mlp"]), abs=1e-5)
    assert (neurons["bias"] != 0) == (len(where["mlp"]) == 2 and neurons["neurons"] == 512)  # GPT-2's
    assert neurons["gross"] + neurons["raised"] == pytest.approx(neurons["net"], abs=1e-9)
    assert neurons["activation"] + neurons["value"] == pytest.approx(neurons["net"], abs=1e-9)
    for number, layer in enumerate(neurons["by_layer"]):
        if not neurons["bias"]:
            assert layer["lowered"] + layer["raised"] == pytest.approx(where["mlp"][number], abs=1e-5)


def test_the_table_of_neurons(kept):
    found, folder = kept
    table, neurons = pq.read_table(folder / "neurons.parquet"), found["neurons"]
    assert (
        table.num_rows == neurons["neurons"] == len(set(zip(*map(table_column(table), ("layer", "neuron")))))
    )
    change = np.subtract(*map(table_column(table), ("projection_after", "projection_before")))
    assert change.sum() == pytest.approx(neurons["net"], abs=1e-9)
    assert change[change > 0].sum() == pytest.approx(neurons["gross"], abs=1e-9)
    groups = table_column(table)("group")
    for group in neurons["groups"]:
        assert (groups == group["name"]).sum() == group["count"]
        assert change[groups == group["name"]].sum() == pytest.approx(group["sum"], abs=1e-9)
    assert (groups == "still").sum() == neurons["still"]
    named = [one for some in neurons["top"].values() for one in some]
    assert named and all(len(one["tokens"]) == 5 for one in named)


def table_column(table):
    return lambda name: table[name].to_numpy(zero_copy_only=False)


def test_all_patched_is_the_model_after(kept):
    found, _ = kept
    assert {row["what"] for row in found["causes"]["rows"]} == WHAT
    everything, after = row_of(found, "everything"), row_of(found, "after training")
    for column in ("projection", "margins", "logps/accuracies", "kl", "perplexity"):
        for part in ("value", "error"):
            assert everything[column][part] == pytest.approx(after[column][part], rel=1e-4, abs=1e-5)
    assert everything["margins"]["share"] == pytest.approx(1, abs=1e-4)
    before = row_of(found, "before training")
    assert before["margins"]["value"] == before["kl"]["value"] == 0


def test_random_sets_are_as_large_as_theirs(kept):
    """Random sets have the size of the set that they stand behind, and each is another one."""
    found, _ = kept
    rows = found["causes"]["rows"]
    for row in rows:
        if row["what"] == "random":
            (of,) = [one for one in rows if (one["what"], one["group"]) == (row["how"], row["group"])]
            assert row["size"] == of["size"] > 0 and row["seeds"] == 3
            assert row["margins"]["spread"] > 0 and row["margins"]["value"] != of["margins"]["value"]
        else:
            assert row["seeds"] is None and row["margins"]["spread"] is None


def test_behaviour_is_what_the_evaluation_says(kept, place):
    found, _ = kept
    numbers = found["behaviour"]["numbers"]
    run = found["settings"]["after"]
    keys = dict(console=silent(), output=place.folder / "eval", overwrite=True, beta=0.1)
    theirs = fastdpo.evaluate(run, str(place.folder / "rows.jsonl"), **keys)["numbers"]
    model, reference = theirs["model"], theirs["reference"]
    assert numbers["margins"]["value"] == pytest.approx(10 * model["rewards/margins"]["value"], rel=1e-4)
    assert numbers["margins"]["error"] == pytest.approx(10 * model["rewards/margins"]["stderr"], rel=1e-3)
    assert numbers["accuracies"]["value"] == model["rewards/accuracies"]["value"]
    for name, one in (("before", reference), ("after", model)):
        ours = numbers[f"logps/accuracies/{name}"]
        assert ours["value"] == pytest.approx(one["logps/accuracies"]["value"])
    assert min(numbers["kl/forward"]["value"], numbers["kl/reverse"]["value"]) > 0


# ---- nothing changed


def test_before_is_after(place):
    found = place("model", "model", data="rows.jsonl", max_length=64, causes=4, page=True)
    assert found["changed"] is False and found["weights"]["relative"] == found["weights"]["changed"] == 0
    numbers = found["behaviour"]["numbers"]
    for name in ("log_ratio/chosen", "log_ratio/rejected", "margins", "kl/forward", "kl/reverse"):
        assert numbers[name]["value"] == numbers[name]["error"] == 0
    where, neurons = found["where"], found["neurons"]
    assert not any([where["embedding"], *where["attention"], *where["mlp"], where["total"]])
    assert neurons["still"] == neurons["neurons"] == 192
    assert neurons["gross"] == neurons["raised"] == neurons["bias"] == 0
    assert not any(group["count"] for group in neurons["groups"])
    assert "no effect to recover" in found["causes"]["reason"]
    assert "Nothing changed" in (place.folder / "out/explain.html").read_text()


def test_an_adapter_that_does_nothing(place):
    """Nor does the same adapter twice, of whose weights nothing is said."""
    found = place("lora", "lora", data="rows.jsonl")
    assert found["weights"]["relative"] is None and found["changed"] is False


# ---- options


def test_no_causes(place):
    found = place("lora", causes=0)
    assert found["causes"] == {"reason": "none were asked for (--causes 0)"}
    assert found["data"]["causes_pairs"] == 0 and "recording" not in found["seconds"]
    kept, _ = place.kept("lora", causes=30)
    assert found["neurons"] == kept["neurons"] and found["where"] == kept["where"]


def test_a_probe_of_labelled_texts(place):
    found = place("lora", probe="labels.jsonl", causes=3)
    direction = found["direction"]
    assert (direction["kind"], direction["towards"], direction["found"]) == ("labels", "down", True)
    assert direction["fitted"] == direction["tested"] == 20
    names = [group["name"] for group in found["neurons"]["groups"]]
    assert names == ["TP-", "TN+", "AP+", "AN-", "TP+", "TN-", "AP-", "AN+"]
    assert -found["neurons"]["net"] == pytest.approx(sum(found["where"]["mlp"]), abs=1e-5)
    assert {row["group"] for row in found["causes"]["rows"]} >= {"TP-", "all four"}


def test_a_probe_that_is_given(place):
    found = place("lora", probe="vector.safetensors", plain=True)
    assert found["direction"]["kind"] == "vector" and found["direction"]["accuracy"] is None
    assert found["direction"]["space"] == "plain" and found["where"]["exact"] < 1e-5
    folded = place("lora", probe="vector.safetensors")
    assert folded["direction"]["before"] == pytest.approx(found["direction"]["before"])  # norms of 1 fold so


def test_the_direction_down_mirrors_up(place):
    up, _ = place.kept("lora", causes=30)
    down = place("lora", direction="down")
    assert down["where"] == up["where"]
    of = {group["paper"][:2] + str(group["lowers"]): group for group in up["neurons"]["groups"]}
    turn = {"T": "A", "A": "T"}
    for group in down["neurons"]["groups"]:
        other = of[turn[group["paper"][0]] + group["paper"][1] + str(not group["lowers"])]
        assert group["count"] == other["count"] and group["sum"] == pytest.approx(-other["sum"])
    assert down["neurons"]["gross"] == pytest.approx(-up["neurons"]["raised"])


def test_groups_of_the_other_version(place):
    found = place("lora", groups="v3")["neurons"]
    assert found["definition"] == "v3" and all(group["against"] == 0 for group in found["groups"])
    lowers = [group["sum"] for group in found["groups"] if group["lowers"]]
    assert sum(lowers) == pytest.approx(found["gross"])
    assert sum(group["share"] for group in found["groups"] if group["lowers"]) == pytest.approx(1)


def test_models_own_answers(place):
    found, given = place("lora", text="own"), place.kept("lora", causes=30)[0]
    assert found["behaviour"] == given["behaviour"] and found["where"] != given["where"]
    assert found["where"]["exact"] < 1e-5
    assert found["neurons"]["net"] == pytest.approx(sum(found["where"]["mlp"]), abs=1e-5)
    assert found["direction"]["accuracy"] == given["direction"]["accuracy"]


def test_lengths_that_are_matched_and_another_seed(place):
    tiny.write_jsonl(place.folder / "many.jsonl", rows(60, seed=9))
    base, matched, seeded = (
        place("lora", data="many.jsonl", **keys)["direction"]
        for keys in ({}, {"match_length": True}, {"seed": 1})
    )
    assert matched["fitted"] < base["fitted"] == 60 and matched["tested"] == base["tested"] == 30
    assert base["before"] != seeded["before"]


def test_a_part_of_the_pairs(place):
    found = place("lora", pairs=10)
    assert found["data"]["pairs"] == 10 and found["data"]["rows"] == 10
    assert found["notes"] == ["10 of 30 pairs were read, from all over the rows; --pairs 30 reads all"]


def test_rows_without_a_pair_are_left_out(place):
    """Of two data sets, one of unpaired rows."""
    more = [{"prompt": "a cat", "completion": " dog", "label": True}] * 2
    files = [tiny.write_jsonl(place.folder / "unpaired.jsonl", more), str(place.folder / "rows.jsonl")]
    found = place("lora", data=files)
    assert found["data"]["rows"] == 30 and found["notes"] == ["2 rows without a pair are left out"]
    assert found["data"]["source"] == ", ".join(files)


def test_a_scorer_of_answers(place, tmp_path):
    """By answers' lengths, of models that are patched with constants; a scorer gets the rows, too."""
    keys = dict(causes=2, samples=2, max_new_tokens=4, random_sets=1)
    found = place("lora", scorer="length", **keys)
    rows = {row["name"]: row for row in found["causes"]["rows"]}
    assert found["causes"]["columns"][-1] == "score"
    for row in rows.values():
        answers = row["what"] in ("before", "after", "ablated", "constant") or row["how"] in (
            "ablated",
            "constant",
        )
        assert ("score" in row) == answers
        assert not answers or 1 <= row["score"]["value"] <= 4
    (tmp_path / "judge.py").write_text(
        "def f(prompts, answers, rows):\n    return [len(row['chosen']) for row in rows]\n"
    )
    judged = place("lora", scorer=f"{tmp_path}/judge.py:f", **keys)["causes"]
    scores = {row["score"]["value"] for row in judged["rows"] if "score" in row}
    assert len(scores) == 1 and judged["effect"]["score"]["value"] == 0


def test_a_mixture_of_experts(place):
    """Its weights, its behaviour and its parts are told; of its neurons that they are not."""
    start = tiny.save_model(place.folder / "mixture", "mixtral", **MIXTURE)
    save_moved(start, place.folder / "mixture-after")
    found = place("mixture", "mixture-after", data="rows.jsonl", max_length=64, causes=4, page=True)
    assert found["weights"]["relative"] > 0 and found["behaviour"]["numbers"]["kl/reverse"]["value"] > 0
    assert found["where"]["exact"] < 1e-4 and abs(found["where"]["total"]) > 1e-3
    said = "mixtures of experts, whose neurons are not looked at"
    assert said in found["neurons"]["reason"] and said in found["causes"]["reason"]
    assert said in (place.folder / "out/explain.html").read_text()
