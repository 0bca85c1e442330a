"""A model's forward that gives the log-probs of labels: rows un-padded and packed, prompts shared, only
scored rows in the lm_head. `Packed` is that for any trainer, `PackedForward` for those that call the model
themselves, whatever wraps it by then:

    PackedForward(model)
    out = model(input_ids=..., attention_mask=..., fastdpo_labels=labels)  # also through PEFT, DDP, autocast

Letters: N rows (B chosen, then their B rejected), S padded length, M scored tokens, D hidden.
"""

import functools
import logging
import types

from fastdpo_kernels import linear_logp
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from fastdpo.errors import ModelError
from fastdpo.integrations.images import BatchImages
from fastdpo.integrations.inner import Sealed, can_share, short, switch_attention
from fastdpo.integrations.split import is_split, same_everywhere
from fastdpo.integrations.trl_rows import IGNORED, PackedRows, pack_rows
from fastdpo.model.lm_head import Head, logit_transform
from fastdpo.model.vision import repeated
from fastdpo.records import PreferenceGroup


def bind(model: nn.Module, forward) -> None:
    """Gives a model this forward(model, ...), under the signature of the one it has: transformers inspects
    it, and generate() checks its arguments against it. accelerate's (device_map) hide theirs."""
    own = getattr(model.forward, "__func__", type(model).forward)
    model.forward = types.MethodType(functools.wraps(own)(forward), model)


class Packed:
    """How one model (a transformers causal LM; adapters inside it are fine) scores the tokens of labels.

    The first batch is compared with the model's own logits, and shows which of three ways is right: "shared",
    packed rows with shared prompts; "padded", the rows as they came, with our lm_head; "own", the model's
    own forward.
    """

    understood = frozenset({"input_ids", "attention_mask", "use_cache"})
    slower: str  # what follows a reason for "own"

    def __init__(self, model: nn.Module):
        self.own = model.forward
        self.ways: dict[bool, str] = {}  # once a batch has shown it; another one may do where it has images
        self.told: set[str] = set()
        self.hooks = switch_attention(model)

    def score(self, model, hidden: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The values of each token, [M], of hidden [M, D] and target i64[M]."""
        raise NotImplementedError

    def say(self, message: str) -> None:
        raise NotImplementedError

    def unusual(self, kwargs: dict) -> list[str]:
        return [name for name, value in kwargs.items() if value is not None and name not in self.understood]

    def scored(self, model, labels: Tensor, kwargs: dict, reason: str | None, router: bool = False):
        """({name: [N, S - 1], zero or False where nothing is scored}, what the backbone gave, in how many of
        the N rows each of its tokens stands), of labels[:, 1:], -100 where nothing is scored; or None where
        the model's own forward has to answer, for a `reason` of the caller's or one that is found here.

        `router`: with the router logits of all tokens.
        """
        images = BatchImages.find(model, kwargs)
        if images is not None and images.pixels and is_split(model):  # towers might wait for each other
            reason = reason or "its images come while the weights are split among processes"
        rows = reason or pack_rows(kwargs["input_ids"], kwargs.get("attention_mask"), labels, router, images)
        seen = not isinstance(rows, str) and any(group.images for group in rows.groups)
        if seen not in self.ways:
            groups = same_everywhere(model, None if isinstance(rows, str) else short(rows.groups))
            if groups is not None:
                self.ways[seen] = self.decide(model, groups, images)
        if isinstance(rows, str):
            if rows != "nothing is scored":
                self.tell(rows + self.slower)
            return None
        if self.ways.get(seen) == "shared":
            rows = rows.to(kwargs["input_ids"].device)
            return *self.shared(model, rows, router), rows.copies
        if self.ways.get(seen) == "padded":
            return *self.padded(model, labels, kwargs), kwargs.get("attention_mask")
        return None

    def shared(self, model, rows: PackedRows, router: bool):
        batch = rows.batch
        assert batch.layout is not None
        with repeated(model.base_model, batch.features):
            out = model.base_model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                fastdpo_layout=Sealed(batch.layout),
                **batch.images,
                **({"output_router_logits": True} if router else {}),
            )
        values = self.score(model, out.last_hidden_state[0][batch.score_row], batch.target)
        return {name: rows.scatter(value) for name, value in values.items()}, out

    def padded(self, model, labels: Tensor, kwargs: dict):
        """For models whose prompts cannot be shared."""
        out = model.base_model(**kwargs | {"use_cache": False})
        hidden = out.last_hidden_state[:, :-1]
        target = labels[:, 1:].to(hidden.device)
        mask = target != IGNORED
        values = self.score(model, hidden[mask], target[mask])
        spread = lambda v: v.new_zeros(mask.shape).masked_scatter(mask.to(v.device), v)
        return {name: spread(value) for name, value in values.items()}, out

    def decide(self, model, groups: list[PreferenceGroup], images: BatchImages | None, around=None) -> str:
        """Which way is right for this model: compares our log-probs with its own on a short pair, within the
        context `around`."""
        try:
            return "shared" if can_share(model, self.own, groups, images, self.tell, around) else "padded"
        except ModelError as error:
            self.tell(f"{error}{self.slower}")
            return "own"

    def tell(self, message: str) -> None:
        """Once each."""
        if message not in self.told:
            self.told.add(message)
            self.say(f"fastdpo: {message}")


class PackedForward(Packed):
    """Gives one model the argument fastdpo_labels: i64[N, S], -100 where nothing is scored. The call then
    returns a dict of f32[N, S - 1], zero where nothing is scored: "logp", the log-prob of labels[:, 1:], and
    "mean_logit", over the vocabulary (without gradient). Without the argument the forward is the model's own.
    """

    understood = frozenset({"input_ids", "attention_mask", "use_cache", "return_dict"})
    slower = ": the model's own logits are used, right but slower"
    # not by Python's warnings, which LLaMA-Factory switches off
    say = staticmethod(logging.getLogger("fastdpo").warning)  # type: ignore[assignment]

    def __init__(self, model: nn.Module):
        super().__init__(model)

        def forward(model, *args, fastdpo_labels=None, **kwargs):
            if fastdpo_labels is None:
                return self.own(*args, **kwargs)
            kwargs = {name: value for name, value in kwargs.items() if value is not None}
            found = self.scored(model, fastdpo_labels, kwargs, self.refusal(model, kwargs))
            return self.logits(model, fastdpo_labels, kwargs) if found is None else found[0]

        bind(model, forward)

    def refusal(self, model, kwargs: dict) -> str | None:
        """Why this call needs the model's own lm_head."""
        unusual = self.unusual(kwargs)
        if unusual or kwargs.get("input_ids") is None:
            return f"the batch brings {', '.join(unusual) or 'no input_ids'}"
        if is_deepspeed_zero3_enabled():
            return "DeepSpeed ZeRO-3 splits the lm_head"
        return head_refusal(model.get_output_embeddings())

    def score(self, model, hidden, target):
        head = Head(model.get_output_embeddings(), *logit_transform(model.config.get_text_config()))
        parts = head.tensors(hidden.dtype)
        device = parts["weight"].device
        hidden, target = hidden.to(device), target.to(device)
        parts |= {"scale": head.scale, "softcap": head.softcap}
        logp, stats = linear_logp(hidden, target=target, stats=("mean_logit",), **parts)
        return {"logp": logp, **stats}

    def logits(self, model, labels: Tensor, kwargs: dict) -> dict[str, Tensor]:
        """What needs the model's own head: every position's logits."""
        logits = self.own(**kwargs | {"use_cache": False}).logits[:, :-1].float()
        target = labels[:, 1:].to(logits.device)
        mask = target != IGNORED
        logp = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
        values = {"logp": logp, "mean_logit": logits.detach().mean(-1)}
        return {name: value.where(mask, 0.0) for name, value in values.items()}


def head_refusal(head) -> str | None:
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
    if any(isinstance(part[active[0]].weight, DTensor) for part in (head.lora_A, head.lora_B)):
        return "the lm_head's adapter is split among processes"
    return None
