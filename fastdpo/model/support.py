"""Can this model run on shared prompts, and does our path give what the model itself gives?"""

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from transformers import PreTrainedConfig

from fastdpo.data.store.stored import facts_of
from fastdpo.errors import ModelError
from fastdpo.model import attention
from fastdpo.model.policy import Policy
from fastdpo.model.rewards import RewardPolicy
from fastdpo.model.sharding import check_images
from fastdpo.model.vision import row_inputs, vision_refusal
from fastdpo.records import Groups, PreferenceGroup, Response

_LAYER_TYPES = {"full_attention", "sliding_attention"}
_PROBE_ROWS, _PROBE_TOKENS = 200, 256  # groups looked at, and the longest row that is compared
_PROBE_RESPONSES = 8  # of a group that is cut


def sharing_refusal(config: PreTrainedConfig, processor: Any = None) -> str | None:
    """Why a model of this transformers config cannot share prompts, as far as its config tells. processor:
    where rows have images."""
    text = config.get_text_config()
    if getattr(text, "attention_chunk_size", None):
        return "its attention is chunked, and the chunks live in a mask that sharing replaces"
    others = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        return f"it has {', '.join(sorted(others))} layers"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    return vision_refusal(config, processor)


def prepare(policy: Policy, groups: Groups, console: Console) -> None:
    """Switches shared prompts on where they are exact and says aloud where they are not.

    Compares the log-probs (or rewards) of two real groups, packed together, with the model's own on separate
    rows. Raises ModelError when the model's own are no numbers, and when even separate rows disagree: the
    head or the logits are then of a kind that fastdpo does not know, and nothing computed could be trusted.
    """
    check_images(policy, policy.world)
    probe = _probe(groups)
    with torch.no_grad():
        truth, limit = _stock_rewards(policy, probe) if policy.of_rewards else _stock(policy, probe)
    name, values, rows = type(policy.core).__name__, policy.gives, " and ".join(str(g.row) for g in probe)
    if not truth.isfinite().all():
        raise ModelError(
            f"{name}: the model's own {values} are not numbers (rows {rows}); its weights may be broken, "
            "or try dtype: fp32"
        )
    reason = sharing_refusal(policy.core.config, policy.processor)
    reason = reason or _try_sharing(policy, probe, truth, limit, console)
    if reason is None:
        return
    policy.set_sharing(False)
    difference, _ = _difference(policy, probe, truth)
    if not difference <= limit:
        raise ModelError(
            f"{name}: our {values} differ from the model's own by {policy.apart(difference)} "
            f"(rows {rows}); its head or logits are of an unknown kind: if dtype: fp32 does not help, "
            "fastdpo cannot train this model yet"
        )
    console.print(
        f"[yellow]prompts are not shared: {name} cannot ({escape(reason)}). "
        "Each response is computed with its own copy of the prompt, padded: right, but slower."
    )


def _try_sharing(
    policy: Policy, probe: list[PreferenceGroup], truth: Tensor, limit: float, console: Console
) -> str | None:
    """Switches sharing on; the reason where it would be wrong."""
    config = policy.core.config.get_text_config()
    try:
        policy.set_sharing(True)
        difference, seen = _difference(policy, probe, truth)
    except torch.OutOfMemoryError:
        raise
    except (attention.UnsharedAttention, TypeError, RuntimeError) as error:
        return str(error)
    if len(seen) != config.num_hidden_layers:
        return f"{len(seen)} of its {config.num_hidden_layers} layers ask AttentionInterface"
    windows, wanted = sum(window is not None for _, window in seen), _windowed_layers(config)
    if windows != wanted:
        return f"{wanted} layers have a sliding window, {windows} pass it on"
    if not difference <= limit:
        return f"its {policy.gives} would be off by {policy.apart(difference)}"
    if policy.device.type == "cuda" and any(backend == "segments" for backend, _ in seen):
        console.print(
            "[yellow]attention runs one segment at a time: right, but slower. The fast kernels take "
            "bf16, head sizes that are multiples of 8 up to 256, and softcaps only with flash-attn"
        )
    return None


def _windowed_layers(config: PreTrainedConfig) -> int:
    """How many layers of a text model have a sliding window."""
    if not getattr(config, "sliding_window", None) or not getattr(config, "use_sliding_window", True):
        return 0
    types = getattr(config, "layer_types", None)
    count: int = types.count("sliding_attention") if types else config.num_hidden_layers
    return count


def _probe(groups: Groups) -> list[PreferenceGroup]:
    """The smallest group, cut where it is long, and the largest affordable one, several responses each where
    there are; where groups have images two with and one without."""
    seen = np.flatnonzero(facts_of(groups).images)[:_PROBE_ROWS]
    some = [*groups[:_PROBE_ROWS], *(groups[i] for i in seen.tolist() if i >= _PROBE_ROWS)]
    without = [g for g in some if not g.images]
    if with_images := [g for g in some if g.images]:
        two = sorted(with_images, key=lambda g: (len(g.responses) < 2, g.input_tokens))[:2]
        return [_cut(g) for g in (*two, *without[:1])]
    several = [g for g in some if len(g.responses) > 1] or some
    smallest = min(several, key=lambda g: g.input_tokens)
    affordable = [g for g in several if _longest(g) <= _PROBE_TOKENS and g is not smallest]
    return [_cut(smallest), *sorted(affordable, key=_longest)[-1:]]


def _longest(group: PreferenceGroup) -> int:
    return len(group.prompt) + max(len(r.ids) for r in group.responses)


def _cut(group: PreferenceGroup) -> PreferenceGroup:
    """The prompt's end and each response's first scored part, _PROBE_TOKENS together at most, so that full
    logits are affordable: any tokens serve to compare two ways of computing the same. Prompts with images
    stay whole."""
    if _longest(group) <= _PROBE_TOKENS:
        return group
    half, responses = _PROBE_TOKENS // 2, []
    for response in group.responses[:_PROBE_RESPONSES]:
        scored = np.flatnonzero(response.target_mask)
        last = scored[max(0, int(np.searchsorted(scored, half)) - 1)]
        kept = slice(max(0, last + 1 - half), last + 1)
        responses.append(Response(response.ids[kept], response.target_mask[kept]))
    if group.images:
        return replace(group, responses=tuple(responses), pairs=())
    return PreferenceGroup(group.row, group.prompt[-half:], tuple(responses), ())


def _difference(
    policy: Policy, probe: list[PreferenceGroup], truth: Tensor
) -> tuple[float, list[tuple[str, int | None]]]:
    """(the largest mean difference a token of any response, the attention calls with a layout)."""
    batch = policy.pack(probe)
    seen: list[tuple[str, int | None]] = []
    if batch.layout is not None:
        batch = replace(batch, layout=replace(batch.layout, seen=seen))
    with torch.no_grad():
        ours = policy.token_logp(batch.to(policy.device))
    per_response = (ours - truth).abs().split(batch.cu_resp.diff().tolist())
    return max(float(d.mean()) for d in per_response), seen


def stock_logp(policy: Policy, group: PreferenceGroup) -> Tensor:
    """The model's own answer: full logits, one separate row a response; f32[M]."""
    return _stock(policy, [group])[0]


def _stock(policy: Policy, groups: list[PreferenceGroup]) -> tuple[Tensor, float]:
    """(the model's own log-probs f32[M], the difference that rounding explains, in nats a token)."""
    out, largest = [], 0.0
    keeps = "logits_to_keep" in inspect.signature(policy.core.forward).parameters
    with policy.stock() as model:
        for group, response in ((g, r) for g in groups for r in g.responses):
            prompt = group.prompt
            ids = torch.tensor([*prompt, *response.ids], device=policy.device)
            inputs = row_inputs(policy.core, policy.processor, group, len(response.ids) - 1)
            inputs = {name: tensor.to(policy.device) for name, tensor in inputs.items()}
            behind = len(response.ids)
            kept = {"logits_to_keep": behind} if keeps else {}  # prompts with images may be long
            call = partial(model, input_ids=ids[None, :-1], use_cache=False, **inputs, **kept)
            with policy.autocast():
                logits = policy.inside(call).logits[0]
            scored = torch.from_numpy(response.target_mask).to(policy.device)
            logits = logits[-behind:][scored].float()
            target = ids[len(prompt) :][scored]
            out.append(logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
            largest = max(largest, float(logits.detach().abs().max()))
    # bf16 logits are rounded to 2^-8 of themselves (ours are not), fp32 ones on their way to 5 units in the
    # last place, 64 are allowed; a wrong mask is far above that.
    least, share = (1e-3, 2**-17) if policy.dtype.itemsize >= 4 else (0.1, 2**-7)
    return torch.cat(out), max(least, largest * share)


def _stock_rewards(policy: Policy, groups: list[PreferenceGroup]) -> tuple[Tensor, float]:
    """(the classifier's own rewards f32[R], the difference that rounding explains)."""
    assert isinstance(policy, RewardPolicy)
    places = [(group, place) for group in groups for place in range(len(group.responses))]
    with policy.stock():
        rewards, rounding = zip(*(policy.stock_reward(group, place) for group, place in places))
    return torch.cat(rewards), max(rounding)
