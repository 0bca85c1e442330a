"""An estimate of an optimizer step's time: matrix products by formula, over a share of the card's rate.

The formula is model/flops.py's, with what is computed again on top. Experts of a mixture are not linear
layers, and are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import numpy as np
import torch
from transformers.initialization import no_init_weights

from fastdpo.config.keys import Config
from fastdpo.data.dealing import Rounds, deal_sizes
from fastdpo.data.packing import Size, sizes_of
from fastdpo.data.store.facts import Facts
from fastdpo.model.cards import Card
from fastdpo.model.flops import attended, useful
from fastdpo.model.quantised import quantised_linears
from fastdpo.model.support import sharing_refusal
from fastdpo.model.towers import unquantised, weights_beside
from fastdpo.optim.bytes import host_state_bytes, state_bytes
from fastdpo.optim.spec import OptimSpec
from fastdpo.planning.fake_model import head_policy, trains_all, whole_model, with_layers
from fastdpo.planning.target import Target
from fastdpo.training.job import part

# The share of a card's dense bf16 rate that a step's matrix products reach: an assumption, not measured yet.
SHARE = 0.4
HOST_BYTES_PER_SECOND = 25e9  # a pinned copy over PCIe 4 x16, one way: an assumption, not measured yet
NOMINAL = Card(200e12, 1.5e12, 0, (8, 6))  # by which costs are compared where no card is known


@dataclass(frozen=True)
class StepTime:
    """seconds on a card, estimated; flops of the step's matrix products."""

    flops: int
    seconds: float
    update: float = 0.0  # of the seconds, those of the optimizer
    microbatches: float = 1.0


class Shape:
    """What of a model its FLOPs depend on, without a tower. model_config: its transformers config. processor:
    where rows have images."""

    def __init__(self, model_config, processor: Any = None):
        self.share = sharing_refusal(model_config, processor) is None
        text = model_config.get_text_config()
        self.layers, self.heads = text.num_hidden_layers, text.num_attention_heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // self.heads
        with torch.device("meta"), no_init_weights():
            model = whole_model(with_layers(model_config, 1))
        linears = quantised_linears(model, unquantised(model.config))
        self.body = self.layers * sum(out * inside for out, inside in linears.values())
        self.sides = self.layers * sum(out + inside for out, inside in linears.values())
        weights = sum(p.numel() for p in model.parameters())
        weights -= sum(p.numel() for p in weights_beside(model).values())
        self.outside = weights - self.body // self.layers

    def lora(self, config: Config) -> int:
        """Weights of a LoRA; of an adapter that is given, as if of rank 16."""
        return 0 if trains_all(config) else (config.lora_rank or 16) * self.sides


def step_time(
    config: Config, model_config, facts: Facts, target: Target, shape: Shape, ranks: int = 1, shards: int = 1
) -> StepTime:
    """Of an average step over groups of which these are the facts (some hundred will do). ranks: that the
    step's groups are dealt to; then of the slowest one, without what they exchange. shards: each updates one
    of so many."""
    policy = head_policy(config, model_config, target)
    cap = config.max_tokens, policy.max_scored, shape.share
    groups, pairs = list(starmap(Size, sizes_of(facts).tolist())), _attended(facts)
    steps = range(0, len(groups), config.batch_size)
    parts = []
    for i in steps:
        step = groups[i : i + config.batch_size]
        slowest = of_slowest(step, deal_sizes(step, ranks, *cap), in_step=shards > 1)
        parts += [[i + n for n in part] for part in slowest]
    sizes = [sum(groups[n].places(shape.share) for n in part) for part in parts]
    flops = sum(_body_flops(config, shape, T, sum(pairs[n] for n in part)) for T, part in zip(sizes, parts))
    flops += sum(policy.plan(sum(groups[n].scored for n in part)).flops for part in parts)
    all_train, size = trains_all(config), 2 if config.pure_bf16 else 4
    trained = shape.body + shape.outside if all_train else shape.lora(config)
    moved = 0  # bytes that go to the host, and come back
    if config.activation_offloading:
        # of recomputed layers their inputs, of others some 34 D a place (Korthikanti et al. 2022, section
        # 4.1, with flash attention)
        kept = 2 if config.gradient_checkpointing else 34
        moved = sum(sizes) * model_config.get_text_config().hidden_size * shape.layers * kept
    if config.optimizer_in_backward:  # of all microbatches but a step's last the gradients go to the host
        moved += (len(parts) - len(steps)) * trained * size // 2
    card = target.card or NOMINAL
    weights = shape.body * (0.55 if config.load_in_4bit else size if all_train else 2)
    passes = 2 + bool(config.gradient_checkpointing)
    compute = max(flops / (SHARE * card.flops), len(parts) * passes * weights / card.bandwidth) / len(steps)
    # weights are read, or cast, once a pass whatever the tokens: small microbatches pay it more often
    compute += len(parts) / len(steps) * passes * weights / card.bandwidth
    compute = max(compute, 2 * moved / len(steps) / HOST_BYTES_PER_SECOND)
    optim = part(OptimSpec, config)
    on_device, on_host = state_bytes(optim, trained, size), host_state_bytes(optim, trained, size)
    update = (2 * on_device + 4 * trained * size) / card.bandwidth
    if config.offload_optimizer:  # 3 passes over the states in the host's RAM
        update = update + 2 * trained * 4 / HOST_BYTES_PER_SECOND + 3 * on_host / 50e9
    update /= shards
    return StepTime(flops // len(steps), compute + update, update, len(parts) / len(steps))


def of_slowest(sizes: Sequence[Size], rounds: Rounds, in_step: bool) -> list[list[int]]:
    """The microbatches that a step waits for. in_step: ranks wait for each other in each round (shards are
    gathered together), so the largest of each; else at the step's end alone, so those of the rank with the
    most tokens."""
    tokens = lambda part: sum(sizes[i].tokens for i in part)
    if in_step:
        return [max(one, key=tokens) for one in rounds]
    ranks = [list(filter(None, parts)) for parts in zip(*rounds)]
    return max(ranks, key=lambda parts: sum(map(tokens, parts)))


def _attended(facts: Facts) -> list[int]:
    """(query, key) pairs of each group."""
    lengths = np.split(facts.length, facts.cu_resp[1:-1])
    return [attended(prompt, some.tolist()) for prompt, some in zip(facts.prompt.tolist(), lengths)]


def _body_flops(config: Config, shape: Shape, T: int, pairs: int) -> int:
    """Forward and backward, and of recomputed layers a forward more."""
    A, N, level = shape.lora(config), shape.body, config.gradient_checkpointing
    again = 0 if level in (False, "selective") else 1 / int(level)
    forward = 4 * shape.head_dim * shape.heads * shape.layers
    body, attention = useful(N, A, forward, T, pairs)
    more = again * (N + A)
    if config.tiled_mlp and not again:
        more += 2 / 3 * N  # the MLPs, about two thirds of a layer, once more
    return int(body + attention + 2 * T * more + again * forward * pairs)
