"""What each held-out prompt adds to a number, and the standard error of it: against numpy and a bootstrap."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdpo.data.packing import pack
from fastdpo.objectives.make import make
from fastdpo.records import Pair, ResponseLogps
from fastdpo.training.held_out import by_prompt, standard_error
from fastdpo.training.metrics import Sums, add_kl, add_pair_metrics
from tests import tiny
from tests.training.test_trainer import Run


def scored(groups, seed=0):
    """Log-probs of a policy and a reference that nobody trained, of these groups."""
    draw = torch.Generator().manual_seed(seed)
    batch = pack(groups)
    policy, reference = (-torch.rand(len(batch.target), generator=draw) for _ in range(2))
    return ResponseLogps.of(batch, policy, reference)


def means(objective, logps):
    sums = Sums()
    add_pair_metrics(sums, objective.seen(logps), objective.reward)
    add_kl(sums, logps)
    return sums.means() | {"loss": float(objective.whole(logps))}


@pytest.mark.parametrize(
    "name", ["sigmoid", "ipo", "sft", "kto", "orpo", {"sigmoid": 0.7, "sft": 0.3}, {"ipo": 1.0, "hinge": 2.0}]
)
def test_the_mean_over_prompts_is_the_number_itself(name):
    """Ranked rows, one with a single response, and two rows of one prompt."""
    groups = [tiny.group(row, 5 + row, [4, 6, 3][: 1 + row % 3]) for row in range(9)]
    groups.append(replace(groups[4], row=9))
    objective = make(name, beta=0.3) if name != "sft" else make(name)
    groups = objective.select(groups)
    logps = replace(scored(groups), context={"z0": 0.1})
    parts, whole = by_prompt(objective, logps, groups, kl=True), means(objective, logps)
    assert parts.keys() == {"loss", "kl"} | (
        {"rewards/accuracies", "rewards/margins", "logps/accuracies"}
        if len(logps.pairs) and objective.reward
        else set()
    )
    for number, values in parts.items():
        assert len(values) == 9
        assert np.mean(values) == pytest.approx(whole[number], rel=1e-5)


@pytest.mark.parametrize("name", ["drdpo", "aot", "bco"])
def test_a_loss_that_is_no_sum_over_rows_has_no_error(name):
    groups = [tiny.group(row, 5, [4, 6]) for row in range(4)]
    parts = by_prompt(make(name), scored(groups), groups, kl=False)
    assert set(parts) == {"rewards/accuracies", "rewards/margins", "logps/accuracies"}


def test_one_pair_a_prompt_is_the_textbook():
    groups = [tiny.group(row, 5, [4, 6]) for row in range(30)]
    logps = scored(groups)
    parts = by_prompt(make("sigmoid"), logps, groups, kl=False)
    margin = 0.1 * (logps.log_ratio[logps.winner] - logps.log_ratio[logps.loser]).double()
    assert parts["rewards/margins"] == pytest.approx(margin.tolist(), rel=1e-4)
    error = standard_error(parts["rewards/margins"])
    assert error == pytest.approx(float(margin.std()) / math.sqrt(30), rel=1e-4)
    share = np.mean(parts["rewards/accuracies"])
    assert standard_error(parts["rewards/accuracies"]) == pytest.approx(math.sqrt(share * (1 - share) / 29))
    assert standard_error([1.0]) is None


def test_pairs_of_one_prompt_are_no_independent_pairs():
    """Beside a bootstrap over prompts: 60 prompts with one, three or six pairs, alike within a prompt."""
    sizes = [[5, 4], [5, 4, 3, 6], [5, 4, 3, 6, 2, 7, 4]]
    all_beat_the_last = [[Pair(j, len(some) - 1) for j in range(len(some) - 1)] for some in sizes]
    groups = [tiny.group(row, 6, sizes[row % 3], pairs=all_beat_the_last[row % 3]) for row in range(60)]
    logps, draw = scored(groups), np.random.default_rng(0)
    # common to a prompt's pairs, by what loses in all of them: no winner tells which prompt a pair is of
    shift = torch.from_numpy(draw.normal(0, 5, 60).astype(np.float32))
    last = torch.from_numpy(np.cumsum([len(g.responses) for g in groups])) - 1
    token_logp = logps.token_logp.clone()
    token_logp[logps.cu_resp[last]] += shift
    logps = replace(logps, token_logp=token_logp)
    values = by_prompt(make("sigmoid"), logps, groups, kl=True)
    margin = 0.1 * (logps.log_ratio[logps.winner] - logps.log_ratio[logps.loser]).double().numpy()
    k2 = ((logps.token_logp - logps.ref_token_logp).double().square() / 2).numpy()
    of_pair = np.repeat(np.arange(60), [len(g.pairs) for g in groups])
    of_token = np.repeat(np.arange(60), [g.scored_tokens for g in groups])
    for name, each, of in (("rewards/margins", margin, of_pair), ("kl", k2, of_token)):
        sums, counts = (np.bincount(of, w, minlength=60) for w in (each, np.ones(len(each))))
        drawn = draw.integers(0, 60, (4000, 60))
        bootstrap = (sums[drawn].sum(1) / counts[drawn].sum(1)).std()
        assert standard_error(values[name]) == pytest.approx(bootstrap, rel=0.1)
    naive = margin.std(ddof=1) / math.sqrt(len(margin))
    assert standard_error(values["rewards/margins"]) > 1.5 * naive


def test_a_run_logs_them_and_a_resumed_one_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
    keys = dict(max_steps=4, eval_steps=2, save_steps=2)
    whole = Run(tmp_path, **keys)
    text = (whole.folder / "held_out.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["step"] for line in lines] == [0, 2, 4]
    for line, logged in zip(lines, whole.evals):
        for name in ("loss", "rewards/accuracies", "rewards/margins", "logps/accuracies", "kl"):
            assert len(line[name]) == 8
            assert np.mean(line[name]) == pytest.approx(logged[f"eval_{name}"], rel=1e-4, abs=1e-9)
            assert logged[f"eval_{name}_stderr"] == pytest.approx(standard_error(line[name]))
    start = json.loads((whole.folder / "events.jsonl").read_text().splitlines()[0])
    assert start["rows"].keys() == {"training", "held-out"} and len(set(start["rows"].values())) == 2
    again = Run(tmp_path, "again", **keys | {"max_steps": 2})
    Path(again.folder / "held_out.jsonl").open("a").write("a line that came after the checkpoint\n")
    resumed = Run(tmp_path, "again", **keys, resume=True)
    assert (resumed.folder / "held_out.jsonl").read_text().splitlines()[:2] == text.splitlines()[:2]
    assert [json.loads(line)["step"] for line in (resumed.folder / "held_out.jsonl").open()] == [0, 2, 4]
