"""What a round takes before it trains: a call of generation on tensors without data, and the reward model.

Neither gradients nor activations are there then; weights and optimizer states are. vLLM samples in another
process, with whatever this one leaves it.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, DynamicCache
from transformers.generation.logits_process import TemperatureLogitsWarper, TopPLogitsWarper
from transformers.initialization import no_init_weights

from fastdpo.config.keys import Config
from fastdpo.config.rounds import SampleSpec, sample_spec
from fastdpo.errors import ModelError
from fastdpo.model.finding import find_source
from fastdpo.model.generation_cache import cache_bytes
from fastdpo.planning.allocations import BATCH, CACHE, LOGITS, REWARD, Peak
from fastdpo.planning.prediction import peaks_of
from fastdpo.planning.simulate import Load, Step
from fastdpo.planning.target import CONTEXT, Target
from fastdpo.records import PreferenceGroup, Response
from fastdpo.sampling.engine import MOST, ON_CPU, SHARE
from fastdpo.values import as_bytes

PROMPTS, LAST, SCORING = "sampling (prompts)", "sampling (last token)", "scoring"
FUNCTIONS = ("vader", "length")  # rewards that are no model
_ONE = np.zeros(1, np.int64)
_NO_ROWS = Load((PreferenceGroup(0, _ONE, (Response(_ONE, _ONE == 0),), ()),), several=False)


def without_training(config: Config) -> Config:
    """The config without those keys that only a step's forward and backward read."""
    off = replace(config, gradient_checkpointing=False, activation_offloading=False)
    return replace(off, max_tokens=1, head_memory="64MiB")


def peaks_between(
    config: Config,
    model_config,
    prompt: int,
    images: bool,
    target: Target,
    exact: bool = True,
    parts: int = 1,
) -> list[Peak]:
    """The peaks of sampling and of scoring. prompt: tokens of the longest. images: rows have some, so that
    sequences are sampled one by one. parts: that a rank keeps one of."""
    spec, config = sample_spec(config.sample), without_training(config)
    look = partial(peaks_of, config, model_config, [_NO_ROWS], target, exact)
    (kept,) = look(run=_settled)
    found = []
    if spec.engine == "transformers":
        size = 1 if images else sequences(config, model_config, prompt, kept.total // parts, target)
        found += look(run=partial(_generated, size=size, prompt=prompt, spec=spec))
    if config.reward is not None and is_model(config.reward):
        found.append(Peak(SCORING, kept.bytes | {REWARD: reward_bytes(config.reward, target, config)}))
    return found


def sequences(config: Config, model_config, prompt: int, kept: int, target: Target) -> int:
    """Sequences of one call: 64 on a CPU; on a GPU as many as their keys and values take a quarter of what is
    free, at most 256. prompt: tokens of the longest. kept: bytes of weights and optimizer states."""
    if target.is_cpu:
        return ON_CPU
    known = [size for size in (target.memory, config.memory and as_bytes("memory", config.memory)) if size]
    if not known:
        return MOST
    tokens = prompt + sample_spec(config.sample).max_new_tokens
    one = cache_bytes(model_config, tokens, target.dtype(config).itemsize)
    return min(MOST, max(1, (min(known) - CONTEXT - kept) // SHARE // max(one, 1)))


def beside(peaks: list[Peak], between: list[Peak], target: Target) -> list[Peak]:
    """All of them; on a CPU the reward model is there all the time."""
    size = max((peak.bytes[REWARD] for peak in between), default=0) if target.is_cpu else 0
    more = {REWARD: size} if size else {}
    return [Peak(peak.where, peak.bytes | more) for peak in (*peaks, *between)]


def is_model(reward: str) -> bool:
    return reward not in FUNCTIONS and ".py" not in reward


def reward_bytes(reward: str, target: Target, config: Config) -> int:
    """Of a reward model's weights, in the dtype that scorers load it in. Raises ModelError."""
    label = f"reward: {reward!r}"
    source = find_source(
        reward, label, way_out="rounds need FILE.py:function, vader, length or a reward model"
    )
    try:
        with source.reading() as (where, options):
            model_config = AutoConfig.from_pretrained(where, **options)
        with torch.device("meta"), no_init_weights():
            model = AutoModelForSequenceClassification.from_config(model_config)
    except Exception as error:  # whatever a broken folder makes transformers raise
        why = f"{type(error).__name__}: {error}"
        raise ModelError(f"reward: the weights of {reward!r} cannot be counted: {why}") from None
    itemsize = target.dtype(replace(config, dtype="auto", pure_bf16=False)).itemsize
    return sum(p.numel() for p in model.parameters()) * itemsize


def _settled(step: Step) -> list[Peak]:
    """What is there all the time."""
    with step.mode, step.tracker:
        step.settle_in()
    (peak,) = step.tracker.peaks()
    return [Peak(peak.where, peak.bytes | {BATCH: 0})]


@torch.no_grad()
def _generated(step: Step, size: int, prompt: int, spec: SampleSpec) -> list[Peak]:
    """transformers' generate, its first token of all and its last. size: sequences."""
    policy, tracker = step.policy, step.tracker
    policy.set_sharing(False)
    policy.model.eval()
    with step.mode, tracker, policy.autocast():
        step.settle_in()
        tracker.where = PROMPTS
        cache = DynamicCache(config=policy.core.config)
        _next_token(step, cache, size, prompt, prompt, spec)
        if spec.max_new_tokens > 1:
            _filled(step, cache, prompt + spec.max_new_tokens - 2)
            tracker.where = LAST
            _next_token(step, cache, size, 1, prompt + spec.max_new_tokens - 1, spec)
    return [peak for peak in tracker.peaks() if peak.where in (PROMPTS, LAST)]


def _next_token(step: Step, cache: DynamicCache, size: int, new: int, seen: int, spec: SampleSpec) -> None:
    """A forward of so many new tokens a sequence of `seen`, and a draw from its last logits [size, V]."""
    ids, mask = (torch.zeros(size, n, dtype=torch.int64) for n in (new, seen))
    out = step.policy.core(
        input_ids=ids, attention_mask=mask, position_ids=torch.zeros_like(ids), past_key_values=cache,
        use_cache=True, logits_to_keep=1,
    )  # fmt: skip
    for tensor in _tensors(cache):
        step.tracker.own(tensor, CACHE)
    step.tracker.own(out.logits, LOGITS)
    with step.tracker.owned_by(LOGITS):
        scores = out.logits[:, -1].to(torch.float32, copy=True)
        if spec.temperature != 1:
            scores = TemperatureLogitsWarper(spec.temperature)(ids, scores)
        if spec.top_p < 1:
            scores = TopPLogitsWarper(spec.top_p)(ids, scores)
        torch.multinomial(scores.softmax(-1), 1)


def _filled(step: Step, cache: DynamicCache, tokens: int) -> None:
    """The cache as so many tokens leave it."""
    with step.tracker.owned_by(CACHE):
        layer: Any
        for layer in cache.layers:
            if getattr(layer, "keys", None) is None:
                continue
            kept = min(tokens, layer.sliding_window - 1) if layer.is_sliding else tokens
            for name in ("keys", "values"):
                old = getattr(layer, name)
                setattr(layer, name, old.new_empty(*old.shape[:2], kept, old.shape[-1]))
            if layer.is_sliding:
                layer.cumulative_length = tokens


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return [tensor for tensor in kept if tensor is not None]
