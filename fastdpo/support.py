"""Can this model run on shared prompts, and does our path give what the model itself gives?"""

import torch
from torch import Tensor

from fastdpo import attention
from fastdpo.errors import ModelError
from fastdpo.model import Policy
from fastdpo.packing import pack
from fastdpo.records import PreferenceGroup

_LAYER_TYPES = {"full_attention", "sliding_attention"}

# Largest mean difference a token, in nats, between our path and the model's own logits. fp32 leaves
# rounding only; bf16 logits near 16 are 0.125 apart. A wrong mask is far above either.
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}


def sharing_refusal(config) -> str | None:
    """Why a model of this transformers config cannot share prompts, as far as its config tells."""
    text = config.get_text_config()
    if getattr(text, "attention_chunk_size", None):
        return "its attention is chunked, and the chunks live in a mask that sharing replaces"
    others = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    if others:
        return f"it has {', '.join(sorted(others))} layers"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    return None


def prepare(policy: Policy, groups: list[PreferenceGroup], console) -> None:
    """Switches shared prompts on where they are exact and says aloud where they are not.

    Compares per-token log-probs of one real group with the model's own logits on separate rows.
    Raises ModelError when even separate rows disagree: the head or the logits are then of a kind
    that fastdpo does not know, and nothing it computes could be trusted.
    """
    group = _smallest(groups)
    with torch.no_grad():
        truth = stock_logp(policy, group)
    reason = sharing_refusal(policy.core.config)
    if reason is None:
        reason = _try_sharing(policy, group, truth)
    if reason is None:
        if policy.device.type == "cuda" and "segments" in attention.used:
            console.print(
                "[yellow]attention runs one segment at a time: right, but slower. The fast kernels take "
                "bf16, head sizes that are multiples of 8 up to 256, and softcaps only with flash-attn"
            )
        return
    policy.set_sharing(False)
    difference = _difference(policy, group, truth)
    if not difference <= _TOLERANCE[policy.dtype]:
        raise ModelError(
            f"{type(policy.core).__name__}: our log-probs differ from the model's own by "
            f"{difference:.2g} nats a token (row {group.row}); its head or logits are of an unknown kind"
        )
    console.print(
        f"[yellow]prompts are not shared: {type(policy.core).__name__} cannot ({reason}). "
        "Each response is computed with its own copy of the prompt, padded: right, but slower."
    )


def _try_sharing(policy, group, truth) -> str | None:
    layers = policy.core.config.get_text_config().num_hidden_layers
    before = attention.calls
    try:
        policy.set_sharing(True)
        difference = _difference(policy, group, truth)
    except (attention.UnsharedAttention, TypeError) as error:
        return str(error)
    calls = attention.calls - before
    if calls != layers:
        return f"{calls} of its {layers} layers ask AttentionInterface"
    if not difference <= _TOLERANCE[policy.dtype]:
        return f"its log-probs would be off by {difference:.2g} nats a token"
    return None


def _smallest(groups):
    several = [g for g in groups[:200] if len(g.responses) > 1] or groups[:200]
    return min(several, key=lambda g: g.input_tokens)


def _difference(policy, group, truth) -> float:
    with torch.no_grad():
        ours = policy.token_logp(pack([group], policy.share).to(policy.device))
    return float((ours - truth).abs().mean())


def stock_logp(policy: Policy, group: PreferenceGroup) -> Tensor:
    """The model's own answer: full logits, one separate row a response; f32[M]."""
    out = []
    with policy.stock() as model:
        for response in group.responses:
            ids = torch.tensor([*group.prompt, *response.ids], device=policy.device)
            with policy.autocast():
                logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0]
            logp = logits.float().log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            mask = torch.from_numpy(response.target_mask).to(policy.device)
            out.append(logp[len(group.prompt) - 1 :][mask])
    return torch.cat(out)
