"""TRL's fused forward, computed our way: rows un-padded and packed, prompts shared, only scored rows in the
lm_head. Takes the place of TRL's `add_fused_lm_head` and gives what that gives, on [rows, length - 1].
"""

import functools
import types
import warnings
import weakref

from torch.distributed.tensor import DTensor
from transformers.modeling_utils import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer import utils as trl_utils

from fastdpo.errors import ModelError
from fastdpo.integrations.head import token_logp
from fastdpo.integrations.inner import can_share
from fastdpo.integrations.trl_attention import Sealed, switch_attention
from fastdpo.integrations.trl_rows import IGNORED, PackedRows, pack_rows
from fastdpo.model.policy import logit_transform

STOCK_ADD = getattr(trl_utils, "add_fused_lm_head", None)  # TRL before 1.15: see trl_older.py
STOCK_KERNEL = trl_utils._ChunkedLogProbFunction
_STATS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logit",
    "is_top1": "is_top1",
}
_UNDERSTOOD = {"input_ids", "attention_mask", "use_cache", "output_router_logits"}
_BY_TRL = "TRL's own forward runs: right, but slower"
_LIVE = weakref.WeakSet()  # what unpatch() switches off


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
        if _zero3():
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


def _zero3() -> bool:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return is_deepspeed_zero3_enabled()


def add_fused_lm_head(
    model: PreTrainedModel,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """TRL's add_fused_lm_head with packed and shared prompts. What it cannot do that way TRL's own does."""
    STOCK_ADD(model, temperature, cast_lm_head_to_fp32, outputs)
    if temperature == 1.0 and not cast_lm_head_to_fp32:
        fused = FusedForward(model, outputs)
        model.forward = types.MethodType(fused.as_method(), model)


class FusedForward:
    """One model's forward(..., labels=..., fused_lm_head=True)."""

    def __init__(self, model: PreTrainedModel, outputs: tuple[str, ...]):
        self.outputs = outputs
        self.trl_forward = model.forward  # with TRL's fused head, and without it the model's own
        self.scale, self.softcap = logit_transform(model.config.get_text_config())
        self.mode = None  # "shared", "padded" or "trl", once a batch has shown which
        self.told: set[str] = set()
        self.hooks = switch_attention(model)
        _LIVE.add(self)

    def as_method(self):
        """The forward to bind. It keeps the signature: generate() checks its arguments against it."""

        @functools.wraps(self.trl_forward.__func__)
        def forward(model, *args, fused_lm_head=False, **kwargs):
            if not fused_lm_head or not self.hooks:
                return self.trl_forward(*args, fused_lm_head=fused_lm_head, **kwargs)
            return self.run(model, *args, **kwargs)

        return forward

    def switch_off(self) -> None:
        """From now on the model's forward is TRL's own."""
        for hook in self.hooks:
            hook.remove()
        self.hooks = []

    def run(self, model, *args, labels=None, shift_labels=None, num_items_in_batch=None, **kwargs):
        rest = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        by_trl = lambda: self.by_trl(args, kwargs, rest)
        unusual = [name for name, value in kwargs.items() if value is not None and name not in _UNDERSTOOD]
        if args or unusual or shift_labels is not None or kwargs.get("input_ids") is None:
            self.tell(f"the batch brings {', '.join(unusual) or 'more than input_ids'}, so {_BY_TRL}")
            return by_trl()
        if getattr(model.config.get_text_config(), "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        router = bool(kwargs.get("output_router_logits"))
        rows = pack_rows(kwargs["input_ids"], kwargs.get("attention_mask"), labels, whole=router)
        if isinstance(rows, str):
            if rows != "nothing is scored":
                self.tell(f"{rows}, so {_BY_TRL}")
            return by_trl()
        if self.mode is None:
            self.mode = self.decide(model, rows)
        if self.mode == "trl":
            return by_trl()
        if self.mode == "shared":
            rows = rows.to(kwargs["input_ids"].device)
            out, values = self.shared(model, rows, router)
        else:
            out, values = self.padded(model, labels, kwargs)
        aux_loss = None
        if router:
            counts = rows.copies if self.mode == "shared" else kwargs.get("attention_mask")
            aux_loss = _balance(model, out.router_logits, counts)
        return self.finished(model, labels, num_items_in_batch, values, aux_loss)

    def by_trl(self, args: tuple, kwargs: dict, rest: dict):
        """The call as TRL computes it. `rest` is what its fused head takes and no model does."""
        return self.trl_forward(*args, **kwargs, **rest, fused_lm_head=True)

    def finished(self, model, labels, num_items_in_batch, values, aux_loss):
        """TRL's output record."""
        mask = labels[:, 1:] != IGNORED
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = -values["log_probs"].sum() / count
        if aux_loss is not None:
            loss = loss + getattr(model.config.get_text_config(), "router_aux_loss_coef", 0.0) * aux_loss
        return trl_utils.FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=aux_loss, **values)

    def shared(self, model, rows: PackedRows, router: bool):
        """(what the backbone gave, {TRL's name: [N, S-1]})."""
        batch = rows.batch
        options = {"output_router_logits": True} if router else {}
        out = model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            fastdpo_layout=Sealed(batch.layout),
            **options,
        )
        values = self.score(model, out.last_hidden_state[0][batch.score_row], batch.target)
        return out, {name: None if v is None else rows.scatter(v) for name, v in values.items()}

    def padded(self, model, labels, kwargs):
        """The same on the rows as they came, for models whose prompts cannot be shared."""
        out = model.base_model(**kwargs | {"use_cache": False})
        hidden = out.last_hidden_state[:, :-1]
        target = labels[:, 1:].to(hidden.device)
        mask = target != IGNORED
        values = self.score(model, hidden[mask], target[mask])
        spread = lambda v: v.new_zeros(mask.shape).masked_scatter(mask.to(v.device), v)
        return out, {name: None if v is None else spread(v) for name, v in values.items()}

    def score(self, model, hidden, target) -> dict:
        """TRL's per-token fields, f32[M] or None, of hidden [M, D]."""
        head = model.get_output_embeddings()
        weight, bias = head.weight, head.bias
        if isinstance(weight, DTensor):  # FSDP2
            weight, bias = weight.full_tensor(), bias if bias is None else bias.full_tensor()
        hidden, target = hidden.to(weight.device), target.to(weight.device)
        with trl_utils.maybe_gather_lm_head_ctx(weight, bias):
            chunk = getattr(trl_utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", None)
            options = (1.0, chunk, self.softcap, self.scale, self.outputs)
            logp, *stats = FusedLogProb.apply(hidden, weight, bias, target, *options)
        return {"log_probs": logp} | dict(zip(_STATS, stats))

    def decide(self, model, rows: PackedRows) -> str:
        """Which way is right for this model: compares our log-probs with its own on a short pair."""
        head = model.get_output_embeddings()
        gathered = trl_utils.maybe_gather_lm_head_ctx(head.weight, head.bias)
        try:
            shared = can_share(model, self.trl_forward, rows.groups, self.tell, gathered)
        except ModelError as error:
            self.tell(f"{error}, so {_BY_TRL}")
            return "trl"
        return "shared" if shared else "padded"

    def tell(self, message: str) -> None:
        """Once each."""
        if message not in self.told:
            self.told.add(message)
            warnings.warn(f"fastdpo: {message}", stacklevel=4)


def switch_off_all() -> None:
    for fused in list(_LIVE):
        fused.switch_off()


def _balance(model, router_logits, counts):
    """A mixture of experts' load-balancing loss, of TRL's batch: `counts` says in how many of its rows each
    of the backbone's tokens stands."""
    config = model.config.get_text_config()
    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, counts)
