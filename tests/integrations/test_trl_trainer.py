"""FastDPOTrainer: stock DPOTrainer's numbers with our reference cache; KTO with our lm_head."""

from itertools import chain, pairwise

import datasets
import numpy as np
import pytest
import torch
import trl
import trl.trainer.dpo_trainer as dpo_trainer
from transformers import AutoModelForCausalLM

import fastdpo.integrations.trl as fast
from benchmarks.peers.trl_dpo import ExactTrainer, run_training
from fastdpo.errors import ConfigError
from fastdpo.integrations import trl_forward
from fastdpo.integrations.trl_trainer import PromptSampler
from fastdpo.reference import fill as ref_fill
from tests.integrations.trl_runs import Run, make, patched, run, same
from tests.tiny import rows, save_model

pytestmark = pytest.mark.peer


class ExactFast(ExactTrainer, fast.FastDPOTrainer):
    """Keeps exact losses."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def packs(monkeypatch):
    """The rows of each pack that the reference computes."""
    computed, real = [], ref_fill._computed
    monkeypatch.setattr(
        ref_fill, "_computed", lambda p, g: computed.append([x.row for x in g.read()]) or real(p, g)
    )
    return computed


def fast_run(folder, **options) -> Run:
    trainer = make(folder, make_trainer=ExactFast, **options)
    return Run(run_training(trainer), trainer.state.log_history, trainer)


CASES = {
    "plain": {},
    "LD-DPO": {"ld_alpha": 0.3},
    "prompts cut at their start": {"max_length": 7, "truncation_mode": "keep_end", "ld_alpha": 0.5},
    "short rows": {"max_length": 8},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("name", CASES)
def test_stock_numbers(folder, name, packs):
    held_out = lambda: {"eval_dataset": datasets.Dataset.from_list(rows(3, seed=9))}
    options = dict(CASES[name], eval_strategy="steps", eval_steps=1)
    stock = run(folder, False, precompute_ref_log_probs=True, more=held_out(), **options)
    ours = fast_run(folder, more=held_out(), **options)
    same(stock, ours)
    assert packs and dpo_trainer.add_fused_lm_head is trl_forward.STOCK_ADD
    for column in ("ref_chosen_logps", "ref_rejected_logps"):
        theirs = stock.trainer.train_dataset[column]
        assert ours.trainer.train_dataset[column] == pytest.approx(list(theirs), abs=1e-4)


def test_a_row_with_one_empty_response(folder):
    """Its other response keeps its reference."""

    class Tokens(ExactFast):
        def _prepare_dataset(self, dataset, *args):
            return dataset

    class StockTokens(ExactTrainer):
        _prepare_dataset = Tokens._prepare_dataset

    tokens = lambda *ids: {"prompt_ids": [3, 4], "chosen_ids": list(ids), "rejected_ids": [9, 8]}
    data = [tokens(5, 6, 7), tokens(), {**tokens(7), "rejected_ids": []}, tokens(9, 8)]
    columns = []
    for make_trainer in (StockTokens, Tokens):
        settings = dict(precompute_ref_log_probs=True, ld_alpha=0.5)
        trained = make(folder, make_trainer=make_trainer, data=data, **settings).train_dataset
        columns.append([*trained["ref_chosen_logps"], *trained["ref_rejected_logps"]])
    assert columns[1] == pytest.approx(columns[0], abs=1e-4)
    assert columns[0][1] == 0 > columns[0][0]


def test_second_run_computes_new_rows_only(folder, packs):
    make(folder, make_trainer=ExactFast)
    assert sorted(chain(*packs)) == list(range(6))
    packs.clear()
    more = {"more": {"eval_dataset": datasets.Dataset.from_list(rows(2, seed=9))}}
    settings = dict(learning_rate=1e-5, beta=0.5, ld_alpha=0.5, per_device_train_batch_size=1)
    make(folder, make_trainer=ExactFast, data=rows(6)[::-1], **settings, **more)
    assert sorted(chain(*packs)) == [0, 1]  # the held-out rows


@pytest.mark.parametrize("adapter", ["fresh", "trained before"])
def test_lora(folder, adapter, packs):
    """A fresh adapter's reference is the model without it, another one's the model with it."""
    peft = pytest.importorskip("peft", reason="needs peft")
    settings = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")

    def trained():
        torch.manual_seed(3)
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        return model

    fresh = adapter == "fresh"
    start = lambda: {"more": {"peft_config": settings}} if fresh else {"model": trained()}
    stock = run(folder, False, precompute_ref_log_probs=True, learning_rate=2e-2, **start())
    ours = fast_run(folder, learning_rate=2e-2, **start())
    same(stock, ours)
    packs.clear()
    ours.trainer.evaluate(datasets.Dataset.from_list(rows(2)))  # known rows, after training
    if fresh:
        assert not packs
    stock.trainer.evaluate(datasets.Dataset.from_list(rows(2)))
    theirs, mine = stock.trainer.state.log_history[-1], ours.trainer.state.log_history[-1]
    assert mine["eval_loss"] == pytest.approx(theirs["eval_loss"], abs=1e-4)


def test_explicit_reference_model(folder, tmp_path):
    torch.manual_seed(5)
    other = AutoModelForCausalLM.from_pretrained(folder)
    for weight in other.parameters():
        weight.data += 0.02 * torch.randn_like(weight)
    other.save_pretrained(tmp_path / "other")
    reference = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    stock = run(folder, False, precompute_ref_log_probs=True, ref_model=reference())
    same(stock, fast_run(folder, ref_model=reference()))
    assert abs(stock.run.losses[0] - 0.6931) > 1e-3


def test_reference_left_to_trl(folder, packs):
    trainer = make(folder, make_trainer=lambda *a, **k: ExactFast(*a, reference_cache=None, **k))
    assert not packs and not trainer.precompute_ref_logps
    with pytest.raises(ConfigError, match="reference_cache=None"):
        fast.FastDPOTrainer(folder, train_dataset=datasets.Dataset.from_list(rows(2)))


def test_rows_of_a_prompt_follow_each_other(folder):
    data = rows(6)
    data += [{**row, "rejected": " no dog"} for row in data[:3]]
    trainer = make(folder, make_trainer=ExactFast, data=data, train_sampling_strategy="random")
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, PromptSampler) and len(sampler) == 9
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(9))
        prompts = [data[i]["prompt"] for i in orders[-1]]
        changes = sum(a != b for a, b in pairwise(prompts))
        assert changes == 5
    assert orders[0] == orders[2] != orders[1]
    distinct = make(folder, make_trainer=ExactFast, train_sampling_strategy="random")
    assert not isinstance(distinct._get_train_sampler(), PromptSampler)
    run_training(trainer)


def test_kto(folder, tmp_path):
    """The lm_head's seam: TRL's KTOTrainer on linear_logp."""
    data = [
        {"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
        for r in rows(4)
        for side in ("chosen", "rejected")
    ]
    logs = []
    for on in (False, True):
        with patched(on):
            config = trl.KTOConfig(
                **dict(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=3, learning_rate=2e-3),
                **dict(per_device_train_batch_size=4, logging_steps=1, report_to="none", disable_tqdm=True),
            )
            trainer = trl.KTOTrainer(
                AutoModelForCausalLM.from_pretrained(folder),
                args=config,
                train_dataset=datasets.Dataset.from_list(data),
                processing_class=make(folder).processing_class,
            )
            trainer.train()
            logs.append(trainer.state.log_history)
    for theirs, mine in zip(*logs):
        assert list(theirs) == list(mine)
        kept = [k for k in theirs if "runtime" not in k and "second" not in k]
        assert [mine[k] for k in kept] == pytest.approx([theirs[k] for k in kept], rel=1e-4, abs=1e-4)
    assert np.ptp([log["loss"] for log in logs[0][:3]]) > 1e-3


def test_kernel_with_temperature():
    """GRPO's and RLOO's temperature, with a softcap under it."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=draw).requires_grad_() for n in (9, 50))
    target, outs = torch.randint(0, 50, (9,), generator=draw), []
    for kernel in (trl_forward.STOCK_KERNEL, trl_forward.FusedLogProb):
        out = kernel.apply(hidden, weight, None, target, 0.7, 32, 3.0, 0.5, tuple(trl_forward._STATS))
        grads = torch.autograd.grad(out[0].sum() + out[1].square().sum(), (hidden, weight))
        outs.append([*out, *grads])
    for a, b in zip(*outs):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b.float(), a.float(), atol=1e-5, rtol=1e-4)
    empty = trl_forward.FusedLogProb.apply(
        hidden[:0], weight, None, target[:0], 1.0, 32, None, 1.0, ("log_probs",)
    )
    empty[0].sum().backward()
    assert weight.grad.eq(0).all()
