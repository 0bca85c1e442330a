"""Stock and patched DPOTrainer on the same rows, fp32, CPU: what several tests compare."""

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import pytest
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastdpo.integrations.trl as fast
from benchmarks.peers.trl_dpo import CPU_FP32, ExactTrainer, TrainingRun, run_training
from tests.rounding import is_tie
from tests.tiny import rows

MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1)
MOE |= dict(norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.1)
SOFTCAP = dict(final_logit_softcapping=1.5, attn_logit_softcapping=5.0, query_pre_attn_scalar=16)
STEPS, BATCH = 3, 2
_TIMES = ("runtime", "per_second", "flos")


@dataclass
class Run:
    run: TrainingRun
    logs: list[dict]
    trainer: object


@contextmanager
def patched(on=True):
    """fast.patch() while the trainer is made and runs, and unpatch() whatever happens."""
    try:
        if on:
            fast.patch()
        yield
    finally:
        fast.unpatch()


def make(
    folder, make_trainer=ExactTrainer, data=None, model=None, ref_model=None, processor=None, more=None,
    **settings,
):  # fmt: skip
    """A trainer on the model of a folder. `more`: arguments of the trainer, settings: of its config."""
    import trl

    AcceleratorState._reset_state(reset_partial_state=True)  # both outlive a trainer
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    config = trl.DPOConfig(
        **dict(output_dir=tempfile.mkdtemp(), per_device_train_batch_size=BATCH, max_steps=STEPS)
        | dict(learning_rate=2e-3, max_length=64, per_device_eval_batch_size=BATCH)
        | CPU_FP32
        | dict(logging_strategy="steps", logging_steps=1)
        | settings,
    )
    model = AutoModelForCausalLM.from_pretrained(folder) if model is None else model
    data = rows(STEPS * BATCH) if data is None else data
    return make_trainer(
        model,
        ref_model,
        config,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=processor or AutoTokenizer.from_pretrained(folder),
        **(more or {}),
    )


def run(folder, on=True, **options) -> Run:
    with patched(on):
        trainer = make(folder, **options)
        return Run(run_training(trainer), trainer.state.log_history, trainer)


def same(stock: Run, ours: Run, tolerance=5e-4) -> None:
    """Losses, gradient norms, all logged metrics by name and value; and that the training moved at all.

    AdamW divides by the gradient's own size, and divergences take exp of sums of log-probs, so that rounding
    grows with the steps: to 2e-5 with MKL's kernels, to 1.2e-4 of a norm with sums in random order."""
    assert ours.run.losses == pytest.approx(stock.run.losses, rel=tolerance, abs=tolerance)
    assert ours.run.grad_norms == pytest.approx(stock.run.grad_norms, rel=tolerance)
    assert max(stock.run.grad_norms) > 1e-3
    assert len(ours.logs) == len(stock.logs) > 0
    for theirs, mine in zip(stock.logs, ours.logs):
        assert list(theirs) == list(mine)
        kept = [k for k in theirs if not any(word in k for word in _TIMES)]
        if "rewards/margins" in theirs and is_tie(theirs):  # the first step
            kept.remove("rewards/accuracies")
        assert [mine[k] for k in kept] == pytest.approx(
            [theirs[k] for k in kept], rel=tolerance, abs=tolerance
        )


def compare(folder, **options) -> tuple[Run, Run]:
    """Runs both. Callable `options` are called for each run, so that each has its own model."""
    fresh = lambda: {k: v() if callable(v) else v for k, v in options.items()}
    stock, ours = run(folder, False, **fresh()), run(folder, True, **fresh())
    same(stock, ours)
    return stock, ours
