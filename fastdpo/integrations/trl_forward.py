"""TRL's fused forward, computed our way: rows un-padded and packed, prompts shared, only scored rows in the
lm_head. Takes the place of TRL's `add_fused_lm_head` and gives what that gives, on [rows, length - 1].
"""

import warnings
import weakref
from typing import Any

import trl.trainer.dpo_trainer as dpo_trainer
import trl.trainer.utils as trl_utils
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from fastdpo.integrations import images
from fastdpo.integrations.head import token_logp
from fastdpo.integrations.packed_forward import Packed, bind
from fastdpo.integrations.split import whole
from fastdpo.integrations.trl_rows import IGNORED
from fastdpo.model.lm_head import logit_transform

STOCK_ADD: Any = getattr(trl_utils, "add_fused_lm_head", None)  # TRL before 1.15: see trl_older.py
STOCK_KERNEL = trl_utils._ChunkedLogProbFunction
_STATS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
FIELDS = ("log_probs", *_STATS)
_LIVE: "weakref.WeakSet[FusedForward]" = weakref.WeakSet()  # what unpatch() switches off


class FusedLogProb:
    """In the place of TRL's ChunkedLogProbFunction: the same arguments and results, by linear_logp.

    is_top1 differs where tokens tie exactly: ours is True for each of them. Under ZeRO-3 TRL's own runs: it
    gathers the head's shards once more in the backward.
    """

    @staticmethod
    def apply(
        hidden,  # [M, D]
        weight,  # [V, D]
        bias,
        targets,  # i64[M]
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=tuple(_STATS),
    ):
        if is_deepspeed_zero3_enabled():
            rest = (temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
            return STOCK_KERNEL.apply(hidden, weight, bias, targets, *rest)
        asked = [name for name in _STATS if name in outputs]
        options = {"scale": logit_scale, "softcap": final_logit_softcapping, "temperature": temperature}
        stats = [_STATS[name] for name in asked]
        logp, found = token_logp(hidden, weight, bias, targets, stats=stats, **options)
        values = {name: found[_STATS[name]] for name in asked}
        if "is_top1" in values:
            values["is_top1"] = values["is_top1"] > 0.5
        return logp, *(values.get(name) for name in _STATS)


def add_fused_lm_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """TRL's add_fused_lm_head with packed and shared prompts. What it cannot do that way TRL's own does."""
    STOCK_ADD(model, temperature, cast_lm_head_to_fp32, outputs)
    if temperature != 1.0 or cast_lm_head_to_fp32:
        return
    fused = FusedForward(model, outputs)
    _LIVE.add(fused)

    def forward(model, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head or not fused.hooks:
            return fused.own(*args, fused_lm_head=fused_lm_head, **kwargs)
        return fused.run(model, *args, **kwargs)

    bind(model, forward)


def patch() -> None:
    dpo_trainer.add_fused_lm_head = add_fused_lm_head
    trl_utils._ChunkedLogProbFunction = FusedLogProb


def unpatch() -> None:
    dpo_trainer.add_fused_lm_head = STOCK_ADD
    trl_utils._ChunkedLogProbFunction = STOCK_KERNEL
    for fused in list(_LIVE):  # its model's forward is TRL's own again
        for hook in fused.hooks:
            hook.remove()
        fused.hooks = []


class FusedForward(Packed):
    """One model's forward(..., labels=..., fused_lm_head=True)."""

    understood = images.NAMES | {"input_ids", "attention_mask", "use_cache", "output_router_logits"}
    slower = ", so TRL's own forward runs: right, but slower"

    def __init__(self, model: PreTrainedModel, outputs: tuple[str, ...]):
        super().__init__(model)
        self.outputs = outputs
        self.scale, self.softcap = logit_transform(model.config.get_text_config())

    def run(self, model, *args, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        reason, unusual = None, self.unusual(kwargs)
        if args or unusual or shift_labels is not None or kwargs.get("input_ids") is None:
            reason = f"the batch brings {', '.join(unusual) or 'more than input_ids'}"
        elif getattr(model.config.get_text_config(), "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        router = bool(kwargs.get("output_router_logits"))
        found = self.scored(model, labels, kwargs, reason, router)
        if found is None:
            rest = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return self.by_trl(args, kwargs, rest)
        values, out, copies = found
        aux_loss = _balance(model, out.router_logits, copies) if router else None
        return self.finished(model, labels, num_items_in_batch, values, aux_loss)

    def by_trl(self, args: tuple, kwargs: dict, rest: dict):
        """The call as TRL computes it. `rest` is what its fused head takes and no model does."""
        return self.own(*args, **kwargs, **rest, fused_lm_head=True)

    def finished(self, model, labels, num_items_in_batch, values, aux_loss):
        """TRL's output record."""
        mask = labels[:, 1:] != IGNORED
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -values["log_probs"].sum() / count
        if aux_loss is not None:
            loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return trl_utils.FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **values)

    def score(self, model, hidden, target):
        """TRL's per-token fields: those of `outputs`."""
        head = model.get_output_embeddings()
        weight, bias = whole(head.weight), whole(head.bias)
        hidden, target = hidden.to(weight.device), target.to(weight.device)
        with trl_utils.maybe_gather_lm_head_ctx(weight, bias):
            chunk = getattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", None)
            options = (1.0, chunk, self.softcap, self.scale, self.outputs)
            fields = FusedLogProb.apply(hidden, weight, bias, target, *options)
        return {name: value for name, value in zip(FIELDS, fields) if value is not None}

    def decide(self, model, groups, images):  # type: ignore[override]  # it has its own context
        head = model.get_output_embeddings()
        around = trl_utils.maybe_gather_lm_head_ctx(head.weight, head.bias)
        return super().decide(model, groups, images, around)

    def say(self, message):
        warnings.warn(message, stacklevel=6)


def _balance(model, router_logits, copies):
    """A mixture of experts' load-balancing loss, of TRL's batch: `copies` says in how many of its rows each
    of the backbone's tokens stands."""
    config = model.config.get_text_config()
    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, copies)
