"""What ranks compute in test_steps.py."""

import peft
import torch
from rich.console import Console

from fastdpo.data.dealing import deal_step
from fastdpo.distributed.shards import whole
from fastdpo.model.policy import Policy
from fastdpo.model.sharding import shard
from fastdpo.model.support import prepare
from fastdpo.objectives import make_objective
from fastdpo.training.metrics import Progress
from tests.tiny import policy
from tests.training.test_step_exactness import gradients, stage_of, step_groups, truth

QUIET = Console(quiet=True)


def place(p: Policy, world, mode: str) -> Policy:
    """The policy in this world."""
    if mode == "replicate":
        p.world = world
    else:
        shard(p, world.with_shards(hybrid=mode == "hybrid"))
    return p


def balanced_step(world, mode, cap):
    """(largest difference of a gradient of a mixture of experts from that of one process with the same
    microbatches; of its loss and balance loss), in fp64."""
    torch.manual_seed(0)
    groups = step_groups()
    p = policy("mixtral", torch.float64, num_local_experts=4)
    p.core.set_experts_implementation("eager")  # grouped products take no fp64
    prepare(p, groups, QUIET)
    made = lambda: stage_of(
        make_objective("sigmoid", {}), p, groups, max_tokens=cap, router_aux_loss_coef=0.5
    )
    stage, progress = made(), Progress()
    rounds = deal_step(groups, world.size, *stage.caps)
    stage.cut = lambda groups: ([part for one in rounds for part in one if part], False)
    stage.step(groups, progress, 1)
    want, said = gradients(p), progress.window.sums.means()
    assert said["aux_loss"] > 0
    place(p, world, mode)
    stage, progress = made(), Progress()
    stage.step(groups, progress, 1)
    apart = [float((whole(q.grad) - g).abs().max()) for q, g in zip(p.trained(), want)]
    progress.window.sums.all_to_first(world)
    means = progress.window.sums.means() or said
    return max(apart), abs(means["loss"] - said["loss"]), abs(means["aux_loss"] - said["aux_loss"])


def beside_one(world, name, options, mode, tied, lora):
    """(largest difference of a gradient from one process's, relative to the largest one; of the loss), in
    fp64 but for Llama's norms."""
    torch.manual_seed(0)
    groups, objective = step_groups(), make_objective(name, options)
    p = policy("llama", torch.float64, tie_word_embeddings=tied)
    if lora:
        settings = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        p = Policy(peft.get_peft_model(p.model, settings).train(), p.dtype)
    prepare(p, groups, QUIET)
    loss, want, _ = alone(objective, p, groups)
    place(p, world, mode)
    stage, progress = stage_of(objective, p, groups, max_tokens=70), Progress()
    stage.step(stage.groups, progress, 1)
    largest = max(float(g.abs().max()) for g in want)
    apart = max(float((whole(q.grad) - g).abs().max()) for q, g in zip(p.trained(), want)) / largest
    progress.window.sums.all_to_first(world)
    return apart, abs(progress.window.sums.means().get("loss", loss) - loss)


def alone(objective, p: Policy, groups):
    """As truth, by one process."""
    stage, progress = stage_of(objective, p, groups, max_tokens=10**6), Progress()
    stage.step(stage.groups, progress, 1)
    return progress.window.sums.means()["loss"], gradients(p), progress.memory


def one_step(world, name, options, mode, cap, unpaired=False, n_groups=7):
    """(largest difference of a gradient from the definition's, relative to the largest one; of the loss; the
    memory, and the definition's; how many microbatches this rank had), in fp64."""
    torch.manual_seed(0)
    groups = step_groups(unpaired=unpaired)[:n_groups]
    objective = make_objective(name, options)
    p = policy("gpt2", torch.float64)
    loss, want, memory = truth(objective, p, objective.select(groups), 64)
    prepare(p, groups, QUIET)
    if getattr(objective, "within", None):  # the definition is of each part of the step
        loss, want, memory = alone(objective, p, groups)
    place(p, world, mode)
    stage, progress = stage_of(objective, p, groups, max_tokens=cap), Progress()
    stage.step(stage.groups, progress, 1)
    got = [whole(q.grad) for q in p.trained()]
    largest = max(float(g.abs().max()) for g in want)
    apart = max(float((a - b).abs().max()) for a, b in zip(got, want)) / largest
    progress.window.sums.all_to_first(world)
    said = progress.window.sums.means().get("loss", float(loss))
    parts, stands_in = stage.cut(stage.groups)
    return apart, abs(said - float(loss)), progress.memory, memory, len(parts) - stands_in
