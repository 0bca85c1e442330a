"""The balance loss of mixtures of experts in steps and runs, cut in any way, and beside TRL's."""

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError
from fastdpo.model import support
from fastdpo.training.job import stage_job
from fastdpo.training.stage import Progress, Stage
from tests.model.test_experts import FAMILIES, by_transformers, exact_policy
from tests.model.test_shared_prompt import assert_gradients_close, gradients
from tests.tiny import group, policy, rows, save_model, write_jsonl
from tests.training.test_step_exactness import Reference

COEF = 10.0
GROUPS = [group(row, n, lengths) for row, (n, lengths) in enumerate([(9, [7, 3]), (4, [2, 8]), (6, [1, 5])])]
MIXTURE = dict(num_local_experts=4, router_aux_loss_coef=0.05)


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


def stepped(p, coef, objective, cap):
    """(the stage, what a step logs, its gradients) with this coefficient."""
    keys = dict(batch_size=3, max_tokens=cap, max_length=64, max_grad_norm=0.0, router_aux_loss_coef=coef)
    stage = Stage(stage_job(Config(model="m", data="d", objective=objective, **keys)), p, GROUPS, [])
    stage.reference = Reference() if stage.objective.needs_reference else None
    progress = Progress()
    stage.step(stage.groups, progress, 1)
    return stage, progress.window.sums.means(), gradients(p.model)


@pytest.mark.parametrize("cap, microbatches", [(1, 3), (26, 2), (10**6, 1)])
@pytest.mark.parametrize("objective", ["sigmoid", "aot", "sft"])  # by parts, as a whole, one response a row
def test_a_step(objective, cap, microbatches):
    """The loss and every gradient are those without it, plus the mean over the microbatches of what the
    model itself gives of TRL's padded rows."""
    p = exact_policy("mixtral")
    support.prepare(p, GROUPS, Console(quiet=True))
    _, without, base = stepped(p, 0.0, objective, cap)
    stage, found, got = stepped(p, COEF, objective, cap)
    parts, total = stage.cut(stage.groups)[0], sum(len(g.responses) for g in stage.groups)
    assert len(parts) == microbatches and "aux_loss" not in without
    aux, want = 0.0, base
    for part in parts:
        share = sum(len(g.responses) for g in part) / total
        value, grads = by_transformers(p, part)  # the gradients of ten of it
        aux += share * float(value)
        want = {name: want.get(name, 0) + share * grad for name, grad in grads.items()} | {
            name: grad for name, grad in want.items() if name not in grads
        }
    assert found["aux_loss"] == pytest.approx(aux, rel=1e-6)
    assert found["loss"] == pytest.approx(without["loss"] + COEF * aux, rel=1e-6)
    assert_gradients_close(got, want, 1e-5)
    moved = [name for name in got if "mlp.gate." in name and not torch.allclose(got[name], base[name])]
    assert len(moved) == 2  # each layer's router


def test_objectives_that_rescale_leave_it_out_aloud():
    p = policy("mixtral", **FAMILIES["mixtral"])
    config = Config(model="m", data="d", objective="drdpo", batch_size=3, max_length=64)
    stage = Stage(stage_job(config), p, GROUPS, [])
    assert stage.balance is None and stage.unbalanced.startswith("drdpo rescales a step's gradient")
    scoped = replace(config, objective_args={"scope": 2})
    assert Stage(stage_job(scoped), p, GROUPS, []).balance is not None


def run(folder, model, name="run", **keys):
    """(what a run printed, its metrics) on a model folder."""
    held_out = write_jsonl(folder / "eval.jsonl", rows(6, seed=1))
    values = dict(model=model, data=write_jsonl(folder / "rows.jsonl", rows(16)), eval_data=held_out)
    values |= dict(output_dir=str(folder / name), learning_rate=5e-3, batch_size=4, max_steps=30, samples=0)
    values |= dict(max_length=64, logging_steps=1, dtype="fp32", reference_cache="off", save_steps=None)
    out = io.StringIO()
    train(Config(**values | keys), Console(file=out, width=1000))
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    return out.getvalue(), [json.loads(line) for line in lines]


def test_a_run(tmp_path):
    """It falls towards its least, as many as the experts a token is routed to, under the config's own
    coefficient; held-out rows have it too."""
    model = save_model(tmp_path / "model", "mixtral", **MIXTURE | {"router_aux_loss_coef": 1.0})
    said, metrics = run(tmp_path, model)
    assert "balance loss of 4 experts a layer: added, times 1 (router_aux_loss_coef)" in said
    values = [m["aux_loss"] for m in metrics if "aux_loss" in m]
    assert len(values) == 30 and min(values) > 2 - 1e-3
    assert sum(values[-5:]) - 10 < 0.7 * (sum(values[:5]) - 10)
    first, *_, last = [m["eval_aux_loss"] for m in metrics if "eval_aux_loss" in m]
    assert last < first
    start = next(m for m in metrics if "eval_loss" in m)
    assert start["eval_loss"] == pytest.approx(0.6931472 + start["eval_aux_loss"], abs=1e-4)


def test_a_lora_has_it_too(tmp_path):
    """With its router frozen, through layers that are computed again."""
    model = save_model(tmp_path / "model", "qwen3_moe", **FAMILIES["qwen3_moe"])
    keys = dict(max_steps=8, lora_rank=4, gradient_checkpointing=True, router_aux_loss_coef=3.0)
    _, metrics = run(tmp_path, model, **keys)
    first, *_, last = [m["eval_aux_loss"] for m in metrics if "eval_aux_loss" in m]
    assert last < first


def test_switched_off_is_said(tmp_path):
    model = save_model(tmp_path / "model", "mixtral", **MIXTURE)
    said, metrics = run(tmp_path, model, max_steps=1, router_aux_loss_coef=0.0)
    assert "experts a layer: off, as router_aux_loss_coef is 0" in said
    assert not any("aux_loss" in name for m in metrics for name in m)


def test_a_stage_may_switch_it_off(tmp_path):
    model = save_model(tmp_path / "model", "mixtral", **MIXTURE)
    stages = [dict(objective="sft"), dict(objective="sigmoid", router_aux_loss_coef=0.0)]
    said, metrics = run(tmp_path, model, max_steps=1, stages=stages)
    assert "added, times 0.05" in said and "off, as router_aux_loss_coef is 0" in said
    assert ["aux_loss" in m for m in metrics if "loss" in m] == [True, False]


def test_models_without_experts(tmp_path):
    model = save_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="but llama has no experts"):
        run(tmp_path, model, router_aux_loss_coef=0.01)
    said, metrics = run(tmp_path, model, max_steps=1)
    assert "balance" not in said and not any("aux_loss" in m for m in metrics)


def test_dr_dpo_with_a_wanted_balance_loss_is_refused(tmp_path):
    model = save_model(tmp_path / "model", "mixtral", **MIXTURE)
    with pytest.raises(ConfigError, match="router_aux_loss_coef: drdpo rescales a step's gradient"):
        run(tmp_path, model, objective="drdpo", router_aux_loss_coef=0.01)


@pytest.mark.peer
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_beside_trl(tmp_path, family):
    """aux_loss and the loss of TRL's first step, by its default coefficient, the model's."""
    trl_runs = pytest.importorskip("tests.integrations.trl_runs", reason="needs trl")
    model = save_model(tmp_path / "model", family, **FAMILIES[family], router_aux_loss_coef=0.5)
    data = rows(4)
    stock = trl_runs.run(model, False, data=data, max_steps=1, per_device_train_batch_size=4)
    _, metrics = run(
        tmp_path, model, data=write_jsonl(tmp_path / "four.jsonl", data), max_steps=1, eval_data=None
    )
    ours = next(m for m in metrics if "loss" in m)
    assert ours["aux_loss"] == pytest.approx(stock.logs[0]["aux_loss"], rel=1e-4)
    assert ours["loss"] == pytest.approx(stock.run.losses[0], rel=1e-4)
    assert ours["grad_norm"] == pytest.approx(stock.run.grad_norms[0], rel=1e-3)
