"""An estimate of an optimizer step's time: matrix products by formula, over a share of the card's rate.

A multiply-add is 2. Letters: T places that go through the decoder layers, N weights of their linear layers, A
weights of a LoRA, M scored rows, H heads, d a head's size. Experts of a mixture are not linear layers, and
are not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from fastdpo.config.keys import Config
from fastdpo.data.packing import places, split_step
from fastdpo.model.adapters import find_start
from fastdpo.model.quantised import quantised_linears
from fastdpo.model.support import sharing_refusal
from fastdpo.optim.bytes import host_state_bytes, state_bytes
from fastdpo.planning.fake_model import head_policy, with_layers
from fastdpo.planning.target import Card, Target
from fastdpo.records import PreferenceGroup

# The share of a card's dense bf16 rate that a step's matrix products reach: an assumption, not measured yet.
SHARE = 0.4
HOST_BYTES_PER_SECOND = 25e9  # a pinned copy over PCIe 4 x16, one way: an assumption, not measured yet
_NOMINAL = Card(200e12, 1.5e12, 0, (8, 6))  # by which costs are compared where no card is known


@dataclass(frozen=True)
class StepTime:
    """seconds on a card, estimated; flops of the step's matrix products."""

    flops: int
    seconds: float


class Shape:
    """What of a model its FLOPs depend on. model_config: its transformers config."""

    def __init__(self, model_config):
        text = model_config.get_text_config()
        self.layers, self.heads = text.num_hidden_layers, text.num_attention_heads
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // self.heads
        with torch.device("meta"), no_init_weights():
            model = AutoModelForCausalLM.from_config(with_layers(model_config, 1))
            model.tie_weights()
        linears = quantised_linears(model)
        self.body = self.layers * sum(out * inside for out, inside in linears.values())
        self.sides = self.layers * sum(out + inside for out, inside in linears.values())
        self.outside = sum(p.numel() for p in model.parameters()) - self.body // self.layers


def step_time(
    config: Config, model_config, groups: Sequence[PreferenceGroup], target: Target, shape: Shape
) -> StepTime:
    """Of an average step over these groups (some hundred will do)."""
    share = sharing_refusal(model_config) is None
    policy = head_policy(config, model_config, target)
    flops = 0
    micro = 0
    steps = [groups[i : i + config.batch_size] for i in range(0, len(groups), config.batch_size)]
    moved = 0
    for step in steps:
        for part in split_step(step, config.max_tokens, policy.max_scored, share):
            T = sum(places(group, share) for group in part)
            attended = sum(map(_attended, part))
            flops += _body_flops(config, shape, T, attended)
            flops += policy.plan(sum(group.scored_tokens for group in part)).flops
            micro += 1
            moved += _offloaded(config, model_config, shape, T)
    if config.optimizer_in_backward:  # of all microbatches but a step's last the gradients go to the host
        moved += (micro - len(steps)) * _trained(config, shape) * (2 if config.pure_bf16 else 4) // 2
    card = target.card or _NOMINAL
    in_fp32 = trains_all(config) and not config.pure_bf16
    weights = shape.body * (0.55 if config.load_in_4bit else 4 if in_fp32 else 2)
    passes = 2 + bool(config.gradient_checkpointing)
    compute = max(flops / (SHARE * card.flops), micro * passes * weights / card.bandwidth) / len(steps)
    # weights are read, or cast, once a pass whatever the tokens: small microbatches pay it more often
    compute += micro / len(steps) * passes * weights / card.bandwidth
    hidden = max(compute, 2 * moved / len(steps) / HOST_BYTES_PER_SECOND)
    return StepTime(flops // len(steps), hidden + _optimizer_seconds(config, shape, card))


def trains_all(config: Config) -> bool:
    return config.lora_rank is None and find_start(config).adapter is None


def _attended(group: PreferenceGroup) -> int:
    """(query, key) pairs of a head, the prompt once."""
    prompt, causal = len(group.prompt), lambda n: n * (n + 1) // 2
    return causal(prompt) + sum(n * prompt + causal(n) for n in (len(r.ids) - 1 for r in group.responses))


def _body_flops(config: Config, shape: Shape, T: int, attended: int) -> int:
    """Forward 2 T (N + A), as much for the gradients of inputs, 2 T N or 2 T A for those of weights;
    attention 4 d H a pair forward and 8 backward; recomputed layers a forward more."""
    A = 0 if trains_all(config) else (config.lora_rank or 16) * shape.sides
    N, level = shape.body, config.gradient_checkpointing
    again = 0 if level in (False, "selective") else 1 / int(level)
    attention = 4 * shape.head_dim * shape.heads * shape.layers * attended
    weights = 2 * (N + A) + (N if trains_all(config) else A) + again * (N + A)
    if config.tiled_mlp and not again:
        weights += 2 / 3 * N  # the MLPs, about two thirds of a layer, once more
    return int(2 * T * weights + attention * (3 + again))


def _offloaded(config: Config, model_config, shape: Shape, T: int) -> int:
    """Bytes that go to the host in a forward: of recomputed layers their inputs, of others some 34 D a place
    (Korthikanti et al. 2022, section 4.1, with flash attention)."""
    if not config.activation_offloading:
        return 0
    D = model_config.get_text_config().hidden_size
    return T * D * shape.layers * (2 if config.gradient_checkpointing else 34)


def _trained(config: Config, shape: Shape) -> int:
    """Trained weights; of an adapter that is given, as if of rank 16."""
    if trains_all(config):
        return shape.body + shape.outside
    return (config.lora_rank or 16) * shape.sides


def _optimizer_seconds(config: Config, shape: Shape, card: Card) -> float:
    trained, size = _trained(config, shape), 2 if config.pure_bf16 else 4
    on_device, on_host = state_bytes(config, trained, size), host_state_bytes(config, trained, size)
    seconds = (2 * on_device + 4 * trained * size) / card.bandwidth
    if config.offload_optimizer:
        return seconds + 2 * trained * 4 / HOST_BYTES_PER_SECOND + 3 * on_host / 50e9  # ... by the host's RAM
    return seconds
