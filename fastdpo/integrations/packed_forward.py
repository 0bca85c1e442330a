"""A model's forward that gives the log-probs of labels: rows un-padded and packed, prompts shared, only
scored rows in the lm_head. For trainers that call the model themselves, whatever wraps it by then.

    PackedForward(model)
    out = model(input_ids=..., attention_mask=..., fastdpo_labels=labels)  # also through PEFT, DDP, autocast

Letters: N rows (B chosen, then their B rejected), S padded length, M scored tokens.
"""

import functools
import logging
import types

from fastdpo_kernels import linear_logp
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from fastdpo.errors import ModelError
from fastdpo.integrations.head import one_dtype
from fastdpo.integrations.inner import can_share
from fastdpo.integrations.trl_attention import Sealed, switch_attention
from fastdpo.integrations.trl_rows import IGNORED, PackedRows, pack_rows
from fastdpo.model.policy import Head, logit_transform

_LOG = logging.getLogger("fastdpo")
_UNDERSTOOD = {"input_ids", "attention_mask", "use_cache", "return_dict"}


class PackedForward:
    """Gives one model (a transformers causal LM; adapters inside it are fine) the argument fastdpo_labels.

    fastdpo_labels: i64[N, S], -100 where nothing is scored. The call then returns a dict of f32[N, S - 1],
    zero where nothing is scored: "logp", the log-prob of labels[:, 1:], and "mean_logit", over the
    vocabulary (without gradient). Without the argument the forward is the model's own.

    The first batch is compared with the model's own logits, and shows which of three ways is right:
    packed rows with shared prompts; the rows as they came, with our lm_head; the model's own logits.
    """

    def __init__(self, model: nn.Module):
        self.own = model.forward
        self.way = None
        self.told: set[str] = set()
        switch_attention(model)
        model.forward = types.MethodType(self._as_method(model), model)

    def _as_method(self, model):
        """Keeps the signature, which transformers inspects; accelerate's (device_map) hide theirs."""

        @functools.wraps(getattr(self.own, "__func__", type(model).forward))
        def forward(model, *args, fastdpo_labels=None, **kwargs):
            if fastdpo_labels is None:
                return self.own(*args, **kwargs)
            return self.run(model, fastdpo_labels, kwargs)

        return forward

    def run(self, model, labels: Tensor, kwargs: dict) -> dict[str, Tensor]:
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        reason = _refusal(model, kwargs)
        rows = None
        if reason is None:
            rows = pack_rows(kwargs["input_ids"], kwargs.get("attention_mask"), labels, whole=False)
            if isinstance(rows, str):
                reason = rows
        if reason is not None:
            if reason != "nothing is scored":
                self.tell(f"{reason}: the model's own logits are used, right but slower")
            return self.logits(model, labels, kwargs)
        if self.way is None:
            self.way = self.decide(model, rows)
        way = {"shared": self.shared, "padded": self.padded, "logits": self.logits}[self.way]
        return way(model, rows if self.way == "shared" else labels, kwargs)

    def shared(self, model, rows: PackedRows, kwargs):
        rows = rows.to(kwargs["input_ids"].device)
        out = model.base_model(
            input_ids=rows.batch.input_ids,
            position_ids=rows.batch.position_ids,
            use_cache=False,
            fastdpo_layout=Sealed(rows.batch.layout),
        )
        values = _score(model, out.last_hidden_state[0][rows.batch.score_row], rows.batch.target)
        return {name: rows.scatter(value) for name, value in values.items()}

    def padded(self, model, labels, kwargs):
        """The rows as they came, for models whose prompts cannot be shared."""
        hidden = model.base_model(**kwargs | {"use_cache": False}).last_hidden_state[:, :-1]
        target = labels[:, 1:].to(hidden.device)
        mask = target != IGNORED
        values = _score(model, hidden[mask], target[mask])
        return {k: v.new_zeros(mask.shape).masked_scatter(mask, v) for k, v in values.items()}

    def logits(self, model, labels, kwargs):
        """What needs the model's own head: every position's logits."""
        logits = self.own(**kwargs | {"use_cache": False}).logits[:, :-1].float()
        target = labels[:, 1:].to(logits.device)
        mask = target != IGNORED
        logp = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        values = {"logp": logp, "mean_logit": logits.detach().mean(-1)}
        return {name: value.where(mask, 0.0) for name, value in values.items()}

    def decide(self, model, rows: PackedRows) -> str:
        """Which way is right for this model: compares our log-probs with its own on a short pair."""
        try:
            return "shared" if can_share(model, self.own, rows.groups, self.tell) else "padded"
        except ModelError as error:
            self.tell(f"{error}: the model's own logits are used, right but slower")
            return "logits"

    def tell(self, message: str) -> None:
        """Once each; logged, for LLaMA-Factory switches all Python warnings off."""
        if message not in self.told:
            self.told.add(message)
            _LOG.warning("fastdpo: %s", message)


def _refusal(model, kwargs) -> str | None:
    """Why this call needs the model's own lm_head."""
    unusual = [name for name in kwargs if name not in _UNDERSTOOD]
    if unusual or kwargs.get("input_ids") is None:
        return f"the batch brings {', '.join(unusual) or 'no input_ids'}"
    if is_deepspeed_zero3_enabled():
        return "DeepSpeed ZeRO-3 splits the lm_head"
    return head_refusal(model.get_output_embeddings())


def head_refusal(head: nn.Module) -> str | None:
    """Why linear_logp cannot take this lm_head's place: only a linear layer's weights, and those of one
    plain LoRA on it, are what it knows."""
    base = getattr(head, "base_layer", head)
    name = type(head).__name__
    weight = getattr(base, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or not weight.is_floating_point():
        return f"the lm_head is a {name}"
    if type(weight) not in (Tensor, nn.Parameter):  # DTensor and quantized kinds
        return f"the lm_head's weight is a {type(weight).__name__}"
    if base is head or head.disable_adapters:
        return None
    active = list(head.active_adapters)
    plain = len(active) == 1 and active[0] in getattr(head, "lora_A", {}) and not head.merged
    if not plain or active[0] in head.lora_variant or head.lora_bias[active[0]]:
        return "the lm_head's adapter is not one plain LoRA"
    return None


def _score(model, hidden: Tensor, target: Tensor) -> dict[str, Tensor]:
    """logp and mean_logit, f32[M], of hidden [M, D]."""
    head = Head(model.get_output_embeddings(), *logit_transform(model.config.get_text_config()))
    (hidden,) = one_dtype(hidden)
    parts = head.tensors(hidden.dtype)
    device = parts["weight"].device
    hidden, target = hidden.to(device), target.to(device)
    options = {"scale": head.scale, "softcap": head.softcap, "stats": ("mean_logit",)}
    logp, stats = linear_logp(hidden, target=target, **parts, **options)
    return {"logp": logp, **stats}
