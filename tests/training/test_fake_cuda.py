"""Whole training steps on a CUDA device without a GPU (fake_cuda.py): nothing waits for the device but what
is named here, nothing mixes devices, and a microbatch goes over as one copy."""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

pytest.importorskip("triton")
import torch

from fastdpo.config.keys import Config
from fastdpo.objectives.catalogue import NAMES
from fastdpo.planning.allocations import Tracker
from fastdpo.planning.fake_model import fake_policy
from fastdpo.planning.target import Target
from fastdpo.training import stage
from fastdpo.training.job import stage_job
from fastdpo.training.stage import Stage
from tests.tiny import group, model_config
from tests.training.fake_cuda import CUDA
from tests.training.fake_driver import fake_cuda

STEPS = 2
# Waits by design, {(where, what): how often in STEPS logged steps of two microbatches each}.
# Before an update: whether the loss and the gradient are numbers.
FINITE = {("stage.Stage.step", "read"): STEPS}
# Of a log line: all sums at once.
LOGGED = {("metrics.Sums.means", "read"): STEPS}
# Once a stage: how far the cached reference is from the policy at the first step.
DRIFT = {("stage.Stage.run", "read"): 1}
# Dr. DPO: whether a microbatch's weights, the first one's left out, would overflow beside those before.
REBASED = {("accumulate._RunningWeights.add", "read"): STEPS}
# BCO: its running mean is a number of the checkpoint.
MEAN = {("batch.bco_remember", "read"): STEPS}
# Before a backward that updates weights, which nothing could undo.
BEFORE = {("accumulate.Accumulator._before_backward", "read"): STEPS}
# Each evaluation's sums and what its prompts add to them, before the first step and after each.
HELD_OUT = LOGGED | {("evaluating.evaluate", "read"): STEPS + 1, ("held_out.by_prompt", "read"): STEPS + 1}
# transformers' Adafactor makes a weight's states on the host, when it first steps it.
MADE = {("library.Library.step", "blocking copy"): 18}
# transformers' own: GPT-2 looks for padding in ids that come without a mask; a mask of padded rows is looked
# at for whether it masks anything.
UNMASKED = {("policy.Policy.hidden", what): 2 * STEPS for what in ("read", "index on the host")}
PADDED = {("policy.Policy.hidden", "read"): STEPS}


def rows():
    """Eight pairs with ratings and token weights, of which four are two microbatches of max_tokens=60."""
    some = [group(row, 6, [7, 4 + row % 3]) for row in range(8)]
    weighted = lambda r, score: replace(r, score=score, token_weight=torch.ones(len(r.ids)).numpy())
    return [
        replace(g, responses=tuple(weighted(r, 4.0 - i) for i, r in enumerate(g.responses))) for g in some
    ]


def make_stage(device, model="llama", groups=None, n_eval=0, share=True, **keys) -> Stage:
    """A stage of a one-layer model on the device, with a reference in the host's memory."""
    keys = dict(batch_size=4, max_tokens=60, max_steps=STEPS, logging_steps=1, warmup_steps=1) | keys
    config = Config(model="m", data="d", **keys)
    small = model_config(model, **{"n_layer" if model == "gpt2" else "num_hidden_layers": 1})
    policy = fake_policy(config, small, Target(capability=(9, 0)), device, Tracker(), CUDA)
    policy.stock_attention = "sdpa"
    policy.set_sharing(share)  # by our attention, not by the plan's stand-in for it
    groups = rows() if groups is None else groups
    made = Stage(stage_job(config), policy, groups, groups[:n_eval])
    if made.objective.needs_reference:
        of = lambda some: torch.zeros(sum(g.scored_tokens for g in some))
        made.reference = SimpleNamespace(per_token=True, of=of)
    return made


def train(made: Stage, device) -> None:
    """Stage.run, with all of a run's surroundings but its files."""
    run = MagicMock()
    run.log.bar.return_value.__exit__.return_value = False
    run.log.track = lambda batches, total, what: batches
    run.log.train = lambda step, epoch, window, left: window.sums.means()
    run.place.first, run.stopping.requested.return_value = 0, None
    with device:
        made.run(run)


def waits_of(capability=(9, 0), **keys) -> tuple[dict, Stage]:
    """({(where, what): how often the host waited there}, the stage)."""
    with fake_cuda(capability) as device:
        made = make_stage(device, **keys)
        train(made, device)
    busy_host = made.job.optim.offload_optimizer or made.job.optim.optimizer_in_backward
    assert bool(device.jobs) == busy_host
    if not busy_host:  # which is sent gradients, and sends weights
        assert {copy.where for copy in device.copies} == {"moving.to_device"}
    return device.counts(), made


def expected(made: Stage, more=None) -> dict:
    return FINITE | LOGGED | (DRIFT if made.reference else {}) | (more or {})


def test_the_rows_are_two_microbatches_a_step():
    with fake_cuda() as device:
        made = make_stage(device)
        train(made, device)
        cuts = [len(made.cut(groups)[0]) for groups in stage.step_groups(made.groups, made.job, STEPS)]
    assert cuts == [2, 2]
    assert len(device.copies) == 4  # 21 tensors each, the reference's log-probs among them
    assert device.launched["head_tiles"]


MORE = {"drdpo": REBASED, "bco": MEAN}


@pytest.mark.parametrize("name", NAMES)
def test_every_objective(name):
    counts, made = waits_of(objective=name, **({"label_smoothing": 0.01} if name == "exo_pair" else {}))
    assert counts == expected(made, MORE.get(name))


OPTIONS = {
    "ld_alpha": dict(objective_args={"ld_alpha": 0.5}),
    "gamma": dict(objective_args={"gamma": 0.5}),
    "weighting": dict(objective_args={"use_weighting": True, "clamp_weights": True}),
    "forward_kl": dict(objective_args={"f_divergence_type": "forward_kl"}),
    "js": dict(objective_args={"f_divergence_type": "js_divergence"}),
    "alpha": dict(objective_args={"f_divergence_type": "alpha_divergence"}),
    "odpo linear": dict(objective="odpo", objective_args={"scaling": "linear"}),
    "drdpo in scopes": dict(objective="drdpo", objective_args={"scope": 2}),
    "drdpo of ipo": dict(objective="drdpo", objective_args={"base_loss": "ipo"}),
    "aot with ld_alpha": dict(objective="aot", objective_args={"ld_alpha": 0.5}),
    "coupled mixture": dict(objective={"aot": 1.0, "kto": 0.5}),
    "mixture": dict(objective={"sigmoid": 1.0, "sft": 0.5}, objective_args={"ld_alpha": 0.5}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_objectives(name):
    counts, made = waits_of(**OPTIONS[name])
    assert counts == expected(made, REBASED if name == "drdpo of ipo" else None)


WAYS = {
    "lora": dict(lora_rank=4),
    "lora on the head": dict(lora_rank=4, lora_target_modules=["q_proj", "lm_head"]),
    "4 bits": dict(lora_rank=4, load_in_4bit=True),
    "dora": dict(lora_rank=4, use_dora=True),
    "checkpointing": dict(gradient_checkpointing=True),
    "selective": dict(gradient_checkpointing="selective"),
    "offloading": dict(activation_offloading=True),
    "tiled": dict(tiled_mlp=True),
    "pure_bf16": dict(pure_bf16=True),
    "fp32": dict(dtype="fp32", batch_size=2, max_tokens=30),
    "sgd": dict(optim="sgd"),
    "adafactor": dict(optim="adafactor"),
    "rmsprop": dict(optim="rmsprop"),
    "unclipped": dict(max_grad_norm=0),
    "gpt2": dict(model="gpt2"),
    "softcap, windows": dict(model="gemma2", batch_size=2, max_tokens=30),
    "held-out rows": dict(n_eval=3, eval_steps=1),
    "held-out rows of KTO": dict(n_eval=3, eval_steps=1, objective="kto"),
    "one prompt of KTO": dict(objective="kto", groups=[group(0, 6, [7, 6])] * 8),
    "separate rows": dict(share=False, max_tokens=100),
    "offloaded optimizer": dict(offload_optimizer=True),
    "in the backward": dict(optimizer_in_backward=True, max_grad_norm=0),
    "AOT in the backward": dict(optimizer_in_backward=True, max_grad_norm=0, objective="aot"),
}
MORE_OF_WAYS = {
    "adafactor": MADE,
    "gpt2": UNMASKED,
    "separate rows": PADDED,
    "held-out rows": HELD_OUT,
    "held-out rows of KTO": HELD_OUT,
    "in the backward": BEFORE,
    "AOT in the backward": BEFORE,
}


@pytest.mark.parametrize("name", WAYS)
def test_ways_to_train(name):
    counts, made = waits_of(**WAYS[name])
    assert counts == expected(made, MORE_OF_WAYS.get(name))
