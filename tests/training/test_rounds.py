"""Rounds, end to end: what trains is what was sampled and scored, and the numbers say so."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from fastdpo.data.groups import Limits
from fastdpo.data.load import load_groups
from fastdpo.training import stage
from fastdpo.training.rounds import RoundStage
from fastdpo.training.stage import Stage
from tests.tiny import rows
from tests.training.round_runs import (
    config_of,
    events,
    inputs_in,
    lines_of,
    metrics,
    replaced,
    round_lines,
    run,
    scores_of,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return inputs_in(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@pytest.fixture
def make(inputs, tmp_path):
    return lambda name="run", **keys: config_of(inputs, tmp_path / name, **keys)


@pytest.fixture
def steps(monkeypatch):
    """The groups of each step that is taken."""
    seen, step = [], Stage.step
    keep = lambda self, groups, *rest: seen.append(list(groups)) or step(self, groups, *rest)
    monkeypatch.setattr(Stage, "step", keep)
    return seen


def test_a_rounds_numbers_are_those_of_its_file(make):
    config = make(rounds=3, lora_rank=2, eval_data=0.2, sample=dict(resets=0.5), learning_rate=1e-2)
    run(config)
    found = events(config, "round")
    assert [one["round"] for one in found] == [1, 2, 3]
    ties = lambda s: sum(a == b for a, b in itertools.combinations(s, 2))
    for one in found:
        lines = round_lines(config, one["round"])
        scores = np.array([scores_of(line) for line in lines])
        flat = [response for line in lines for response in line["responses"]]
        assert one["objective/scores"] == pytest.approx(scores.mean())
        assert one["objective/scores_std"] == pytest.approx(scores.std())
        assert one["val/contain_eos_token"] == pytest.approx(np.mean([r["ended"] for r in flat]))
        assert one["truncated"] == sum(not r["ended"] for r in flat)
        assert one["completions/mean_length"] == pytest.approx(np.mean([len(r["ids"]) for r in flat]))
        assert one["resets"] == sum(line["forced"] > 0 for line in lines) > 0
        assert one["forced_tokens"] == sum(line["forced"] for line in lines)
        assert one["tied_pairs"] == sum(map(ties, scores.tolist()))
        assert one["no_signal"] == sum(len(set(s)) == 1 for s in scores.tolist())
        assert one["best"]["score"] == scores.max() and one["worst"]["score"] == scores.min()
    kl = metrics(config, "objective/kl")
    assert kl == [one["objective/kl"] for one in found]
    assert kl[0] == 0 and min(map(abs, kl[1:])) > 1e-3
    assert metrics(config, "objective/scores") == [one["objective/scores"] for one in found]
    assert len(metrics(config, "eval_loss")) == 2  # at the start and at the end


def test_of_all_weights_the_way_from_the_start_is_not_known(make):
    config = make()
    run(config)
    assert not metrics(config, "objective/kl") and len(metrics(config, "objective/scores")) == 2


def test_ties_train_nothing_and_a_group_of_ties_is_left_out(make, steps):
    config = make(reward="of_half", objective="sigmoid", rounds=3)
    run(config)
    trained = sorted(group.row for step in steps for group in step)
    lines = [line for number in (1, 2, 3) for line in round_lines(config, number)]
    assert trained == sorted(line["row"] for line in lines if len(set(scores_of(line))) > 1)
    assert 0 < len(trained) < len(lines)
    assert sum(one["no_signal"] for one in events(config, "round")) == len(lines) - len(trained)
    for group in (group for step in steps for group in step):
        s = [response.score for response in group.responses]
        above = {(i, j) for i in range(3) for j in range(3) if s[i] > s[j]}
        assert {(pair.winner, pair.loser) for pair in group.pairs} == above


def test_rloo_learns_from_ties_only_where_it_has_a_kl(make, steps):
    run(make("off", reward="of_half", objective="rloo", objective_args={"kl_coef": 0}))
    assert all(group.pairs for step in steps for group in step)
    steps.clear()
    run(make("on", reward="of_half", objective="rloo"))
    assert not all(group.pairs for step in steps for group in step)


def test_best_and_worst_alone(make, steps):
    run(make(pairs="best_worst"))
    for group in (group for step in steps for group in step):
        s = [response.score for response in group.responses]
        assert [(s[p.winner], s[p.loser]) for p in group.pairs] == [(max(s), min(s))]


def test_its_file_can_be_read_as_ranked_rows(make, inputs):
    config = make()
    run(config)
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    path = f"{config.output_dir}/rounds/round-1.jsonl"
    groups, _ = load_groups(path, tokenizer, Limits(64), strict=True, console=Console(quiet=True))
    lines = round_lines(config, 1)
    assert [[r.score for r in group.responses] for group in groups] == [scores_of(line) for line in lines]


def test_prompts_are_distinct_and_by_seed_and_round(make):
    config, other = make(rounds=3), make("other", rounds=1, seed=1)
    run(config), run(other)
    of = lambda config, number: {line["row"] for line in round_lines(config, number)}
    first, second, third = (of(config, number) for number in (1, 2, 3))
    assert len(first) == len(second) == len(third) == 8 and not first & second
    assert third not in (first, second) and of(other, 1) != first


def test_what_trains_is_what_was_sampled_and_what_is_forced_has_no_gradient(make, monkeypatch):
    """Of the hidden states that predict a reset's tokens the gradient is exactly 0: they are in the prompt.
    The others' targets are the ids of the file."""
    batches, score = [], Stage.score

    def scored(self, batch, stats=()):
        def keep(module, args, output):
            output.register_hook(lambda grad: batches.append((batch, grad[0])))

        hook = self.policy.core.base_model.norm.register_forward_hook(keep)
        out = score(self, batch, stats)
        hook.remove()
        return out

    monkeypatch.setattr(Stage, "score", scored)
    config = make(rounds=1, sample=dict(resets=1.0), objective="rloo")
    run(config)
    lines = {line["row"]: line for line in round_lines(config, 1) if len(set(scores_of(line))) > 1}
    forced = sum(line["forced"] for line in lines.values())
    for batch, grad in batches:
        is_target = torch.zeros(len(grad), dtype=torch.bool)
        is_target[batch.score_row] = True
        assert grad[is_target].any() and not grad[~is_target].any()
        bounds = batch.cu_resp.tolist()
        ids = [batch.target[a:b].tolist() for a, b in itertools.pairwise(bounds)]
        for row, first, end in zip(batch.rows, batch.group_resp, batch.group_resp[1:]):
            line = lines.pop(row)
            assert ids[first:end] == [response["ids"] for response in line["responses"]]
            last = int(batch.score_row[bounds[first]])  # of the prompt, which predicts what comes first
            prompt = batch.input_ids[0, last + 1 - len(line["prompt_ids"]) : last + 1]
            assert prompt.tolist() == line["prompt_ids"]
            assert not is_target[last - line["forced"] : last].any()
    assert not lines and forced


def test_scores_are_of_what_is_forced_and_what_was_sampled(make, inputs, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(inputs["model"])
    reward = shutil.copy(inputs["reward"].partition(":")[0], tmp_path)
    config = make(rounds=1, sample=dict(resets=1.0), reward=f"{reward}:told")
    run(config)
    given = lines_of(tmp_path / "told.jsonl")[1:]  # the first one is the try
    chosen = {row: f"{both['prompt']}{both['chosen']}" for row, both in enumerate(rows(20))}
    expected = []
    for line in round_lines(config, 1):
        n = len(line["prompt_ids"]) - line["forced"]
        prompt = tokenizer.decode(line["prompt_ids"][:n]).strip()
        assert chosen[line["row"]].startswith(tokenizer.decode(line["prompt_ids"]).strip())
        for response in line["responses"]:
            ids = line["prompt_ids"][n:] + response["ids"]
            text = tokenizer.decode(ids, skip_special_tokens=True).strip()
            assert response["text"] == text
            expected.append([prompt, text])
    assert given == expected


@pytest.mark.parametrize("reference", ["round", "start"])
def test_a_round_refers_to_what_sampled_or_to_the_base(make, monkeypatch, reference):
    """And the ratio of rloo's clip is to what sampled, in either case."""
    begin, seen = RoundStage.begin, []

    def compared(self, number, *rest):
        begin(self, number, *rest)
        policy, groups = self.policy, self.groups
        with torch.no_grad():
            now = policy.token_logp(policy.pack(groups))
            with policy.model.disable_adapter():
                base = policy.token_logp(policy.pack(groups))
        old = None if self.old is None else self.old.of(groups)
        seen.append((self.reference.of(groups), old, now, base))

    monkeypatch.setattr(RoundStage, "begin", compared)
    run(make(lora_rank=2, objective="rloo", reference=reference, learning_rate=1e-2))
    known, old, now, base = seen[1]
    assert (now - base).abs().max() > 1e-2
    close = dict(rtol=0, atol=1e-5)
    torch.testing.assert_close(known, now if reference == "round" else base, **close)
    if reference == "start":
        torch.testing.assert_close(old, now, **close)
    else:
        assert old is None


def test_the_schedule_and_the_optimizer_go_on_over_rounds(make, monkeypatch):
    made, make_optimizer = [], stage.make_optimizer
    monkeypatch.setattr(stage, "make_optimizer", lambda *args: made.append(1) or make_optimizer(*args))
    config = make(rounds=3, num_epochs=2)  # a round: two passes in two steps each
    run(config)
    rates = metrics(config, "learning_rate")
    assert rates == pytest.approx([1e-3 * (1 - i / 12) for i in range(12)])
    assert len(made) == 1
    states = load_file(f"{config.output_dir}/checkpoints/step-12/optimizer.safetensors")
    assert {float(t) for name, t in states.items() if name.endswith("step")} == {12.0}


def test_passes_of_a_round_see_its_groups_once_each(make, steps):
    run(make(rounds=2, num_epochs=2))
    parts = [sorted(g.row for step in steps[i : i + 2] for g in step) for i in range(0, 8, 2)]
    assert parts[0] == parts[1] and parts[2] == parts[3] and parts[0] != parts[2]
    assert all(len(set(part)) == 8 for part in parts)


@pytest.mark.parametrize(
    "objective, keys",
    [
        ("rloo", {}),
        ("sigmoid", dict(batch_size=8)),  # a step a round
        ("kto", {}),
        ("simpo", {}),
        ("aot", {}),
        ({"rloo": 1.0, "sft": 0.1}, {}),
    ],
)
def test_what_objectives_train_on_samples(make, steps, objective, keys):
    config = make(objective=objective, eval_data=0.2, sample=dict(resets=0.5), **keys)
    if "rloo" in objective:
        config = replaced(config, eval_data=None)
    run(config)
    assert len(steps) == (2 if keys else 4)
    assert all(np.isfinite(metrics(config, "loss"))) and len(metrics(config, "objective/scores")) == 2


def test_sft_trains_on_the_best_of_n(make, steps):
    config = make(objective="sft", rounds=1)
    run(config)
    best = {line["row"]: max(scores_of(line)) for line in round_lines(config, 1)}
    for group in (group for step in steps for group in step):
        assert {response.score for response in group.responses} == {best.pop(group.row)}
    assert not best


@pytest.mark.parametrize("reward", ["quiet_at_first", "quiet_at_last"])
@pytest.mark.parametrize("objective, every", [("sigmoid", 1), ("simpo", 10)])
def test_a_round_without_a_signal_is_passed_over(make, steps, objective, every, reward):
    config = make(objective=objective, reward=reward, rounds=2, eval_data=4, logging_steps=every)
    run(config)
    quiet_last = reward == "quiet_at_last"
    assert [one["no_signal"] for one in events(config, "round")] == [8, 0][:: -1 if quiet_last else 1]
    assert len(steps) == 2 == metrics(config, "step")[-1]
    assert all(np.isfinite(metrics(config, "eval_loss")))
    assert len(metrics(config, "loss")) == (2 if every == 1 else 1)
