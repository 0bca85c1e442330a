"""`FastDPOTrainer` for TRL 1.9, whose DPOTrainer makes all logits itself: Axolotl's TRL.

TRL 1.15 asks the model for log-probs (`trl_forward.py` answers); 1.9 takes logits [2B, S, V] from it and asks
them for a few numbers a token. Here the model answers with `TokenScores`, which holds those numbers as our
head computes them on packed rows. Every loss and metric is TRL's own code.

Letters: N rows (2B), S padded length, V vocabulary.
"""

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import trl
import trl.trainer.dpo_trainer as dpo_trainer
from torch import Tensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from fastdpo.errors import ConfigError
from fastdpo.integrations import trl_trainer
from fastdpo.integrations.images import NAMES
from fastdpo.integrations.packed_forward import bind
from fastdpo.integrations.trl_forward import FIELDS, FusedForward
from fastdpo.integrations.trl_rows import IGNORED
from fastdpo.integrations.versions import check_version

_LABELS: ContextVar[Tensor | None] = ContextVar("labels", default=None)  # i64[N, S] of the loss in progress
_SHIFT = (Ellipsis, slice(None, -1), slice(None))  # logits[..., :-1, :]


class FastDPOTrainer(trl_trainer.FastDPOTrainer):
    """fastdpo.integrations.trl.FastDPOTrainer, for TRL 1.9: the same arguments. A `model` or `ref_model` that
    is a name, not a model, runs TRL's own forward."""

    _made_with = ()

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        check_version("trl_older", trl.__version__)
        if getattr(args, "use_liger_kernel", False):
            raise ConfigError("use_liger_kernel: Liger's loss takes the place of ours; leave it out")
        if is_deepspeed_zero3_enabled():
            raise ConfigError("deepspeed: ZeRO-3 splits the lm_head, which this needs whole; use ZeRO-1 or 2")
        weighted = getattr(args, "use_weighting", False)  # WPO, which alone reads log_sum_sq_probs
        read = tuple(name for name in FIELDS if weighted or name != "log_sum_sq_probs")
        for given, outputs in ((model, read), (ref_model, ("log_probs",))):
            if isinstance(given, torch.nn.Module):
                core = given.get_base_model() if hasattr(given, "peft_config") else given  # type: ignore[operator]
                add_scores(core, outputs)
        super().__init__(model, ref_model, args, **kwargs)

    def _compute_loss(self, model, inputs, return_outputs):
        """TRL's, on TokenScores. Who asks for the outputs (compute_metrics) gets real logits."""
        with contextlib.nullcontext() if return_outputs else _scoring(inputs):
            return super()._compute_loss(model, inputs, return_outputs)

    def compute_ref_log_probs(self, model, inputs):
        with _scoring(inputs):
            return super().compute_ref_log_probs(model, inputs)


@contextlib.contextmanager
def _scoring(inputs: dict):
    """Inside, the models that have add_scores give TokenScores of these inputs, and TRL's two functions of
    logits take them."""
    token = _LABELS.set(inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORED))
    stock_logp, stock_entropy = dpo_trainer.selective_log_softmax, dpo_trainer.entropy_from_logits
    scored = lambda logits: isinstance(logits, TokenScores)
    logp = lambda logits, index: logits.log_probs if scored(logits) else stock_logp(logits, index)
    entropy = lambda logits: logits.entropy if scored(logits) else stock_entropy(logits)
    try:
        with mock.patch.multiple(dpo_trainer, selective_log_softmax=logp, entropy_from_logits=entropy):
            yield
    finally:
        _LABELS.reset(token)


def add_scores(model, outputs: tuple[str, ...] = FIELDS) -> None:
    """Lets a causal LM answer with ScoredOutput while a loss is in progress, its `outputs` computed. Its
    forward is else its own."""
    fused = ScoringForward(model, outputs)

    def forward(model, *args, **kwargs):
        labels = _LABELS.get()
        if labels is None:
            return fused.own(*args, **kwargs)
        return fused.run(model, *args, **kwargs | {"labels": labels})

    bind(model, forward)


class ScoringForward(FusedForward):
    """One model's forward(...) inside _scoring. Images are left to the model's own."""

    understood = FusedForward.understood - NAMES

    def by_trl(self, args, kwargs, rest):
        """The model's own logits."""
        return self.own(*args, **kwargs)

    def decide(self, model, groups, images):  # type: ignore[override]  # as FusedForward's
        if hasattr(model.get_output_embeddings(), "base_layer"):
            self.tell("the lm_head has an adapter, so the model makes its logits itself: right, but slower")
            return "own"
        return super().decide(model, groups, images)

    def finished(self, model, labels, num_items_in_batch, values, aux_loss):
        return ScoredOutput(**values, labels=labels[:, 1:], aux_loss=aux_loss)


@dataclass
class ScoredOutput(ModelOutput):
    """[N, S - 1] each or None, zero (or False) where nothing is scored. Tensors, so that what wraps a model
    (DDP, FSDP, autocast) finds them; the logits that TRL asks for are made of them."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    labels: Tensor | None = None  # of the next token, -100 where nothing is scored
    aux_loss: Tensor | None = None

    @property
    def logits(self) -> "TokenScores":
        fields = {name: getattr(self, name) for name in (*FIELDS, "labels")}
        return TokenScores({name: value for name, value in fields.items() if value is not None})


class TokenScores:
    """In the place of logits [N, S, V]: what TRL 1.9 asks logits for, computed already.

    They stand for log p, which are logits but for a constant a token that no loss sees; only mean(-1), a
    metric, is that of the model's own logits. Whatever else is asked is a TypeError or AttributeError.
    """

    def __init__(self, fields: dict[str, Tensor], power: int = 1):
        self.fields, self.power = fields, power

    def __getattr__(self, name):
        if name in ("log_probs", "entropy"):
            return self.fields[name]
        raise AttributeError(f"fastdpo holds log-probs, no logits, and TRL {trl.__version__} asks for {name}")

    def _each(self, change) -> "TokenScores":
        return TokenScores({name: change(value) for name, value in self.fields.items()}, self.power)

    def __getitem__(self, key):
        if isinstance(key, Tensor):
            return self._each(lambda value: value[key])
        if key == _SHIFT:  # the fields have no entry for the last token, which predicts nothing
            return self
        raise TypeError(f"fastdpo holds log-probs, no logits to take {key} of")

    def chunk(self, chunks: int, dim: int) -> list["TokenScores"]:
        parts = {name: value.chunk(chunks, dim=dim) for name, value in self.fields.items()}
        return [TokenScores({name: part[i] for name, part in parts.items()}) for i in range(chunks)]

    def detach(self) -> "TokenScores":
        return self._each(Tensor.detach)

    def size(self, dim: int) -> int:
        return self.fields["log_probs"].size(dim)

    def mean(self, dim: int) -> Tensor:
        _over_the_vocabulary(dim)
        return self.fields["mean_logits"]

    def argmax(self, dim: int) -> Tensor:
        """The label where it is the most likely token, and -1, no token, elsewhere."""
        _over_the_vocabulary(dim)
        return self.fields["labels"].where(self.fields["is_top1"], -1)

    def __rmul__(self, factor: float) -> "TokenScores":
        return TokenScores(self.fields, int(factor)) if factor == 2 else NotImplemented

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        scores = args[0]
        if function is torch.logsumexp:  # of log p: 0; of 2 log p: log sum p^2
            _over_the_vocabulary(kwargs["dim"])
            sums = scores.fields["log_sum_sq_probs"]
            return sums if scores.power == 2 else torch.zeros_like(sums)
        if function is F.cross_entropy and kwargs["reduction"] == "mean":  # of scored tokens, their labels
            return -scores.log_probs.mean()
        return NotImplemented


def _over_the_vocabulary(dim: int) -> None:
    if dim != -1:
        raise TypeError(f"fastdpo holds a number a token, no logits to reduce over dimension {dim}")
