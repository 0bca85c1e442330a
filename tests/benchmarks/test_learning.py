"""benchmarks.learning: the world's reward and KL, runs that start and step alike, frontiers, a whole run."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.learning import curriculum as learning_curriculum
from benchmarks.learning import flips as learning_flips
from benchmarks.learning import frontier as learning_frontier
from benchmarks.learning import run as learning
from benchmarks.learning import train as learning_train
from benchmarks.learning import world
from benchmarks.learning.train import QUICK, QUIET, Run, Sizes, execute, make_base, settings
from fastdpo.records import Pair, PreferenceGroup, Response

ids = lambda text: np.array([world.ID[word] for word in text.split()])
FLAT = "the film was superb and the cast felt dull . <eos>"  # valences 1 and 0.4


@pytest.fixture(scope="module")
def base():
    torch.set_num_threads(1)
    return make_base(replace(QUICK, sft_steps=30), seed=0)


def test_reward_is_the_mean_valence():
    assert world.reward(ids(FLAT)) == pytest.approx(0.7) and world.score(ids(FLAT)) == pytest.approx(1.7)
    assert world.reward(ids("the cast felt dull .")) == world.score(ids("the cast felt dull .")) == 0.4
    assert world.reward(ids(". <eos>")) == 0.5
    group = world.ranked_group(3, ids("the"), [ids("dull ."), ids("superb ."), ids("plain .")])
    assert group.pairs == (Pair(1, 0), Pair(1, 2))  # dull and plain are worth the same
    text = " ".join(world.WORDS[i] for i in world.reviews(1, 5)[0])
    assert text.startswith("<bos> the ") and text.endswith(". <eos>")


@torch.no_grad()
def test_samples_are_the_policys_and_their_kl_is_exact(base):
    other = base.start()
    for p in other.trained():
        p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    prompts = base.prompts[:6]
    completions, logps = world.sample(other, prompts, seed=3)
    again, _ = world.sample(other, prompts, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(completions, again))
    found = world.sequence_kl(logps, prompts, completions, base.policy)
    for prompt, some, row, kl in zip(prompts, completions, logps, found):
        text = torch.from_numpy(np.concatenate([prompt, some]))[None, :-1]
        p, q = (
            policy.core(input_ids=text).logits[0, world.PROMPT - 1 :].double().log_softmax(-1)
            for policy in (stock(other), stock(base.policy))
        )
        assert torch.allclose(row[: len(some)].double(), p, atol=1e-4)
        assert kl == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)
    assert found.min() > 0.01
    itself, logps = world.sample(base.policy, prompts, seed=3)
    assert abs(world.sequence_kl(logps, prompts, itself, base.policy)).max() < 1e-4


def stock(policy):
    policy.set_sharing(False)
    return policy


def test_samples_have_the_policys_frequencies(base):
    prompts = base.prompts[:1].repeat(1500, 0)
    completions, logps = world.sample(base.policy, prompts, seed=0)
    for t in (0, 2):
        going = np.array([len(c) > t for c in completions])
        drawn = np.bincount([c[t] for c in completions if len(c) > t], minlength=len(world.WORDS))
        wanted = logps[going, t].exp().mean(0).numpy()
        assert abs(drawn / going.sum() - wanted).max() < 0.04 and going.sum() > 500


def run(arm="one pair", **keys):
    config = learning_curriculum.with_pairs(arm, 0.1, 0, 6)
    return Run("curriculum", arm, config, (2, 6), ("accuracies",), **keys)


def test_runs_repeat_and_leave_the_base_alone(base):
    before = [p.clone() for p in base.policy.trained()]
    first, second = execute(run(), base), execute(run(), base)
    assert first == second and [m["step"] for m in first] == [2, 6]
    assert all(torch.equal(a, b) for a, b in zip(before, base.policy.trained()))


def test_arms_take_equal_steps_and_refer_as_they_say(base, monkeypatch):
    made, trained = [], []
    plain, train = learning_train.reference, learning_train.train
    monkeypatch.setattr(learning_train, "reference", lambda *a: made.append(1) or plain(*a))

    def seen(policy, stage):
        start = [p.clone() for p in policy.trained()]
        (loss,) = [stage.objective.whole(stage.score(b).detached()) for b in stage.in_row_order(stage.groups)]
        trained.append((float(loss), {len(g.responses) for g in stage.groups}, stage.total))
        assert all(torch.equal(a, b) for a, b in zip(start, policy.trained()))
        yield from train(policy, stage)

    monkeypatch.setattr(learning_train, "train", seen)
    for arm, stages, references in (
        ("one pair", 1, 0),
        ("all pairs", 1, 0),
        ("curriculum", 3, 2),
        ("curriculum, first reference", 3, 0),
    ):
        made.clear(), trained.clear()
        found = execute(run(arm, **learning_curriculum.kept(arm)), base)
        assert found[-1]["step"] == 6 == sum(steps for *_, steps in trained)
        assert (len(trained), len(made)) == (stages, references), arm
        assert all(sizes == {2} for _, sizes, _ in trained) == (arm != "all pairs")
        at_log2 = [abs(loss - np.log(2)) < 1e-5 for loss, *_ in trained]
        assert at_log2 == [True] * 3 if arm == "curriculum" else at_log2[0], (arm, trained)
        if arm.endswith("first reference"):
            assert not any(at_log2[1:])


def test_rows_with_few_responses(base):
    two = learning_train.training_rows(replace(run(), responses=2, rows=16), base)
    assert len(two) == 16 and all(len(g.responses) == 2 and len(g.pairs) == 1 for g in two)
    with pytest.raises(ValueError, match="rows have a pair, 1000 are wanted"):
        learning_train.training_rows(replace(run(), rows=1000), base)


def test_a_frontier_is_what_nothing_beats():
    points = [(1.0, 0.6), (0.5, 0.5), (2.0, 0.55), (3.0, 0.8), (0.5, 0.4)]
    assert learning_frontier.pareto(points) == [(0.5, 0.5), (1.0, 0.6), (3.0, 0.8)]
    assert learning_frontier.reward_at(points, 2.0) == pytest.approx(0.7)
    assert learning_frontier.reward_at([*points, (4.0, 0.7)], 3.5) == 0.8  # less KL than allowed will do
    assert learning_frontier.reward_at(points, 0.4) is None is learning_frontier.reward_at(points, 3.1)


def test_gains_pair_the_seeds():
    runs, results = [], []
    for seed, lift in ((0, 0.1), (1, 0.3)):
        for arm, more in (("DPO, 30 pairs", 0), ("ODPO, 30 pairs", lift), ("DPO, 100 pairs", 0.5)):
            runs.append(Run("odpo", arm, settings(seed=seed), (1,), ()))
            results.append([{"kl": kl, "reward": seed + kl / 10 + more} for kl in (0.2, 1.2)])
    found = learning_frontier.summary(runs, results)
    assert found["reward_at_kl"]["DPO, 30 pairs"]["1"] == pytest.approx([0.1, 1.1])
    assert found["reward_at_kl"]["DPO, 30 pairs"]["2"] == []
    assert list(found["gain_over_dpo_at_kl"]) == ["ODPO, 30 pairs"]
    assert found["gain_over_dpo_at_kl"]["ODPO, 30 pairs"]["0.5"] == pytest.approx([0.1, 0.3])
    assert learning_frontier.spread([0.1, 0.3], sign=True) == "+0.200 ± 0.141 (2)"


def test_flips_are_trained_on_and_never_measured_on(base, monkeypatch):
    sizes = replace(QUICK, seeds=(0,))
    runs = learning_flips.runs(sizes)
    assert {r.config.flip_pairs for r in runs} == set(learning_flips.SHARES)
    assert len(runs) == 20 and all(r.marks == (1, 4) for r in runs)
    seen = []
    stage = learning_train.Stage
    monkeypatch.setattr(learning_train, "Stage", lambda *a: seen.append(a) or stage(*a))
    execute(next(r for r in runs if r.config.flip_pairs == 0.4), base)
    wrong = lambda g: g.responses[g.pairs[0].winner].score < g.responses[g.pairs[0].loser].score
    (_, _, trained, _), *measured = seen
    assert 2 <= sum(map(wrong, trained)) <= 12 and not any(wrong(g) for *_, held in measured for g in held)
    results = [[{"accuracy": 0.5 + i / 100}, {"accuracy": 0.6}] for i in range(len(runs))]
    gain = learning_flips.summary(runs, results)["accuracy"]["beta 0.1, 1 epoch"]["gain"]
    assert gain["40%"] == pytest.approx([0.01])


def test_four_of_many_by_rank():
    responses = [
        Response(np.array([i]), np.ones(1, bool), score=s) for i, s in enumerate((3, 9, 1, 7, 5, 4, 2))
    ]
    group = learning_curriculum.four(PreferenceGroup(0, np.array([0]), tuple(responses), ()))
    assert [r.score for r in group.responses] == [9, 5, 3, 1] and len(group.pairs) == 6


@pytest.mark.parametrize("shared", [True, False])
def test_the_whole_run(tmp_path, capsys, monkeypatch, shared):
    if not shared:
        monkeypatch.setattr(learning_curriculum, "RANKED", tmp_path / "absent.jsonl")
    elif learning_curriculum.ranked_absent():
        pytest.skip("needs ../shared")
    monkeypatch.setattr(learning_flips, "SHARES", (0.0, 0.4))
    for module in (learning_flips, learning_curriculum):
        monkeypatch.setattr(module, "BETAS", (0.1,))
    arms = {arm: learning_curriculum.ARMS[arm] for arm in ("one pair", "curriculum")}
    monkeypatch.setattr(learning_curriculum, "ARMS", arms)
    sizes: Sizes = replace(QUICK, seeds=(0,), betas=(1.0,))
    names = list(learning.STUDIES) if shared else ["ranked", "odpo"]
    path = learning.run(names, sizes, 0, tmp_path, QUIET)
    record = json.loads(path.read_text())
    assert list(record["studies"]) == (names if shared else ["odpo"])
    assert list(record["skipped"]) == ([] if shared else ["ranked"])
    plots = {p.stem for p in (tmp_path / "plots").glob("*.svg")}
    assert {f"{path.stem}_{name}" for name in record["studies"] if name != "flips"} <= plots
    if shared:
        ends = record["studies"]["ranked"]["end"]["beta 0.1"]
        assert set(ends) == set(learning_curriculum.ARMS)
        # of 12 rows: by the rounding of one processor all may be right
        assert all(0 <= a <= 1 for of in ends.values() for a in of["accuracy"])
