"""Runs whose rows are read from disk: they train as from a list of them, and read what a step trains on."""

import random
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
from rich.console import Console

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.data.mismatched import mismatched
from fastdpo.data.packing import epoch_steps
from fastdpo.data.store.facts import Facts
from fastdpo.data.store.shards import Shard, encoded
from fastdpo.data.store.stored import StoredGroups, facts_of
from fastdpo.model import support
from fastdpo.training import trainer
from fastdpo.training.stage import Stage
from tests.tiny import group, rows, save_model, sentence, write_jsonl
from tests.training.test_resume import outcome

ROWS, STEPS, SIZE = 40, 5, 3
BY_LOGP = dict(objective="sigmoid", pairs="hard", pair_gap="logp")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder, draw = tmp_path_factory.mktemp("inputs"), random.Random(0)
    paired = [row | {"score_chosen": 4.0, "score_rejected": 1.5} for row in rows(ROWS)]
    judged = lambda i, row: {"completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
    unpaired = [{"prompt": row["prompt"]} | judged(i, row) for i, row in enumerate(rows(ROWS))]
    answers = lambda: [{"text": f" {sentence(draw, 3)} {n}", "score": n} for n in draw.sample(range(9), 4)]
    ranked = [{"prompt": sentence(draw, 5), "responses": answers()} for _ in range(ROWS)]
    data = dict(paired=paired, unpaired=unpaired, ranked=ranked)
    mixture = dict(num_local_experts=4, router_aux_loss_coef=0.05)
    return {
        "model": save_model(folder / "model"),
        "mixture": save_model(folder / "mixture", "mixtral", **mixture),
        **{name: write_jsonl(folder / f"{name}.jsonl", some) for name, some in data.items()},
    }


@pytest.fixture
def configured(inputs, tmp_path):
    def configured(name, data="paired", model="model", **keys):
        values = dict(batch_size=SIZE, max_steps=STEPS, max_tokens=60, max_length=64, learning_rate=1e-3)
        values |= dict(logging_steps=1, samples=0, dtype="fp32", reference_cache="off", eval_data=0.2)
        values |= dict(model=inputs[model], data=inputs[data], output_dir=str(tmp_path / name))
        return Config(**values | keys)

    return configured


@pytest.mark.parametrize(
    "keys",
    [
        dict(objective="sigmoid"),
        dict(objective="kto"),
        dict(objective="kto", data="unpaired", max_length=24),  # some mismatched responses are cut
        dict(objective="sft", data="ranked"),
        dict(objective="odpo"),
        dict(objective="sigmoid", data="ranked", stages=[dict(pairs="easy"), dict(pairs="hard")]),
        dict(objective="kto", data="ranked", pairs="medium", flip_pairs=0.5),
        dict(data="ranked", **BY_LOGP),
        dict(objective="sigmoid", data="ranked", flip_pairs=0.4, samples=2),
        dict(objective="bco", data="unpaired", flip_pairs=0.4),
        dict(objective="sigmoid", model="mixture"),
        dict(objective="sft", data="ranked", model="mixture"),
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_a_run_is_that_of_the_same_groups_in_memory(configured, monkeypatch, keys):
    stored, listed = configured("stored", **keys), configured("listed", **keys)
    train(stored, Console(quiet=True))
    load, kinds = trainer.load_data, []

    def as_lists(*args, **keys):
        *sets, reports = load(*args, **keys)
        kinds.extend(map(type, sets))
        return *map(list, sets), reports

    monkeypatch.setattr(trainer, "load_data", as_lists)
    train(listed, Console(quiet=True))
    assert kinds == [StoredGroups] * 2
    assert outcome(stored) == outcome(listed)


@pytest.fixture
def reads(monkeypatch):
    """How often each row was read: before the first step, and from each step's start to the next one's."""
    found = [Counter()]
    read, step = Shard.group, Stage.step

    def counted(shard, place, facts, at, *more):
        found[-1][int(facts.row[at])] += 1
        return read(shard, place, facts, at, *more)

    def begun(*args, **keys):
        found.append(Counter())
        return step(*args, **keys)

    monkeypatch.setattr(Shard, "group", counted)
    monkeypatch.setattr(Stage, "step", begun)
    return found


def steps_of(config, groups):
    """The rows of each step."""
    places = epoch_steps(len(groups), config.batch_size, config.seed)
    rows = facts_of(groups).row
    return [Counter(rows[next(places)].tolist()) for _ in range(config.max_steps)] + [Counter()] * 2


@pytest.mark.parametrize(
    "keys",
    [
        dict(objective="simpo"),
        dict(objective="sft", data="ranked"),
        dict(objective="simpo", data="ranked", pairs="medium", flip_pairs=0.3),
        dict(objective="simpo", model="mixture"),
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_a_step_reads_its_own_groups(configured, monkeypatch, reads, keys):
    """And the next one's, to begin with them early. Before the first step: what the start check compares and
    what is announced."""
    monkeypatch.setattr(support, "_PROBE_ROWS", 4)
    config = configured("run", **keys, eval_data=None)
    train(config, Console(quiet=True))
    steps = steps_of(config, [group(row, 1, [1]) for row in range(ROWS)])
    announced = steps[0]
    assert reads[0] == Counter(range(4)) + announced + steps[0] + steps[1]
    assert reads[1:] == steps[2:]


def test_kto_reads_another_row_s_response_beside_each_of_its_own(configured, monkeypatch, reads):
    """Of its reference, which computes the rows of all steps, nothing else is read either."""
    monkeypatch.setattr(support, "_PROBE_ROWS", 4)
    config = configured("run", objective="kto", data="unpaired", eval_data=None)
    train(config, Console(quiet=True))
    steps = steps_of(config, [group(row, 1, [1]) for row in range(ROWS)])
    beside = [some + Counter({(row + 1) % ROWS: 1 for row in some}) for some in steps]
    assert reads[2:] == [own + aside for own, aside in zip(steps[3:], beside[2:])]
    seen = Counter(range(4)) + sum(beside[:STEPS], Counter())
    assert set(reads[0]) <= set(seen)


@pytest.mark.parametrize("max_length", [64, 18, 13, 11])
def test_mismatched_groups_are_known_before_they_are_made(max_length):
    """Cut inside responses with gaps in what is scored, and before anything scored. The last prompt is the
    first one's, and two neighbours have one too, so that what is behind these is the same."""
    some = [group(row, 6 + row % 7, [1 + row % 13, 2]) for row in range(60)]
    for same, other in ((59, 0), (30, 31)):
        some[same] = replace(some[same], prompt=some[other].prompt)
    stored = StoredGroups([Shard(encoded(some[:25], {})), Shard(encoded(some[25:], {}))], [0, 0])
    found = mismatched(stored, max_length)
    want, known = Facts.of(found), facts_of(found)
    for column in fields(Facts):
        if column.name not in ("largest", "digest", "trained"):
            np.testing.assert_array_equal(*(getattr(facts, column.name) for facts in (known, want)))
    assert (known.largest >= want.largest).all()
    assert all(len(g.prompt) + len(g.responses[0].ids) <= max_length for g in found)
    assert all(g.responses[0].target_mask[-1] for g in found)
    assert (len(found) < 60) == (max_length < 14)
    assert facts_of(mismatched(some, max_length)).key.tolist() == known.key.tolist()
    unnamed = [replace(g, responses=(replace(g.responses[0], key=None),)) for g in found]
    both = list(zip(known.key.tolist(), Facts.of(unnamed).key.tolist()))  # of equal tokens one key
    assert len(set(both)) == len({key for key, _ in both}) == len({key for _, key in both}) < len(both)


def test_what_differs_between_mismatched_responses_is_in_their_keys():
    """Where they are cut, and where a sequence is parted into prompt and response."""
    some = [group(row, 5, [9]) for row in range(4)]
    keys = [facts_of(mismatched(some, room)).key.tolist() for room in (64, 14, 11, 10)]
    assert keys[0] == keys[1] and not set(keys[1]) & set(keys[2]) and not set(keys[2]) & set(keys[3])
    one, (response,) = some[1], some[1].responses
    longer = replace(response, ids=response.ids[1:], target_mask=response.target_mask[1:])
    prompt = np.concatenate([one.prompt, response.ids[:1]])
    parted = [some[0], one, some[0], replace(one, prompt=prompt, responses=(longer,))]
    parted = [replace(g, row=row) for row, g in enumerate(parted)]
    same = Facts.of(parted).key
    assert same[1] == same[3]  # one sequence
    first, third = (g.responses[0] for g in mismatched(parted, 12) if g.row in (0, 2))
    assert len(first.ids) == len(third.ids) == 7 and first.key != third.key
