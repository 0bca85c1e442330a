"""A mixture of experts' load-balancing loss, by the model's own function, on packed rows."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.policy import Policy
from fastdpo.records import PackedGroups, ResponseLogps

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def experts(config: PreTrainedConfig) -> int:
    """How many experts a layer of a model has, by its transformers config; 0 for a model without."""
    text = config.get_text_config()
    places = (text, getattr(text, "ffn_config", None))  # DBRX's
    found = [getattr(place, name, None) for place in places for name in _COUNTS]
    most = max((count for count in found if isinstance(count, int)), default=0)
    return most if most > 1 else 0


def coefficient(config: PreTrainedConfig, given: float | None) -> tuple[float, str]:
    """(what the balance loss is multiplied by, of a model with experts why it is off), where `given` is
    router_aux_loss_coef: without one the model's own, as in TRL. Raises ConfigError where a loss is wanted
    that the model does not have."""
    count, text = experts(config), config.get_text_config()
    wanted = getattr(text, "router_aux_loss_coef", None) if given is None else given
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if count and _function(known):
        off = "router_aux_loss_coef is 0" if wanted == 0 else "the model's config has no router_aux_loss_coef"
        return (wanted, "") if wanted else (0.0, off)
    if given and not count:
        raise ConfigError(
            f"router_aux_loss_coef: {given:g}, but {config.model_type} has no experts; leave the key out"
        )
    if given:
        raise ConfigError(
            f"router_aux_loss_coef: {given:g}, but transformers has no balance loss of {config.model_type}; "
            "leave the key out"
        )
    return 0.0, f"transformers has none of {config.model_type}" if count else ""


def _function(model_class: type | None):
    """load_balancing_loss_func of a causal LM's module, where there is one of the usual form."""
    function = getattr(
        sys.modules.get(getattr(model_class, "__module__", "")), "load_balancing_loss_func", None
    )
    arguments = ("gate_logits", "num_experts", "top_k", "attention_mask")
    code = getattr(function, "__code__", None)
    return function if code and code.co_varnames[: code.co_argcount] == arguments else None


class Balance:
    """The balance loss of one policy's forwards: experts * sum over the experts of (share of the tokens that
    are routed to it) * (its mean probability), all layers' tokens together (Switch Transformer; Fedus et al.
    2021, arXiv 2101.03961, eq. 4), as the model's own code has it.

    The tokens are those of separate rows, each prompt once a response, without padding: TRL's batch, where
    the groups are whole (PreferenceGroup.whole) and a row is a pair. A response of a ranked row counts once,
    where TRL has it in each of its pairs.
    """

    def __init__(self, policy: Policy, coef: float):
        self.policy, self.coef, core = policy, coef, policy.core
        self.function = _function(type(core))
        self.experts, self.top_k = core.num_experts, core.num_experts_per_tok

    @contextlib.contextmanager
    def recorded(self, seen: list[tuple[Tensor, ...]]) -> Iterator[None]:
        """Inside, the policy's forwards leave their router logits in the list, a tuple of layers each."""
        base = self.policy.core.base_model
        wish = lambda module, args, kwargs: (args, kwargs | {"output_router_logits": True})
        hooks = [
            base.register_forward_pre_hook(wish, with_kwargs=True),
            base.register_forward_hook(lambda module, args, out: seen.append(out.router_logits)),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def loss(self, seen: list[tuple[Tensor, ...]], batch: PackedGroups) -> Tensor:
        """The loss of one microbatch of whole groups, by what its forward left; with gradient."""
        (layers,) = seen
        if not layers:
            raise ModelError(
                f"{type(self.policy.core).__name__}: no router logits came; say router_aux_loss_coef: 0"
            )
        mask = batch.attention_mask
        if batch.layout is not None:  # its gathered keys are the separate rows, one after the other
            layers = tuple(layer.flatten(0, -2)[batch.layout.kv_index] for layer in layers)
        with self.policy.autocast():
            return self.function(layers, self.experts, self.top_k, mask)


def mean_of(microbatches: Sequence[ResponseLogps]) -> Tensor:
    """The balance loss of a batch in several microbatches: the mean of theirs, by their responses."""
    weights = [len(logps.cu_resp) - 1 for logps in microbatches]
    parts = [logps.aux_loss * n for logps, n in zip(microbatches, weights) if logps.aux_loss is not None]
    return torch.stack(parts).sum() / sum(weights)
