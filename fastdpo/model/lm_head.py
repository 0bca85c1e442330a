"""A model's lm_head: its tensors, what the model does to its logits, the memory that it may take."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.configuration_utils import PreTrainedConfig

from fastdpo.values import as_bytes

# How configs name a factor on the logits: (attribute, model types where it means that or None, power).
_LOGIT_FACTORS = (
    ("logit_scale", ("cohere", "cohere2"), 1),
    ("logits_scaling", ("hyperclovax",), 1),
    ("logits_scaling", None, -1),  # granite*, minicpm3
    ("output_multiplier", None, 1),
    ("lm_head_multiplier", None, 1),
)
FREE_SHARE, STEP, LEAST = 4, 256 << 20, 64 << 20  # see within_free_memory


@dataclass(frozen=True)
class Head:
    """The lm_head: its module, and what the model does to the logits after it."""

    module: Any  # torch.nn.Module
    scale: float
    softcap: float | None

    def tensors(self, dtype: torch.dtype) -> dict[str, Any]:
        """weight [V, D], bias [V] and lora (A, B, scale) as linear_logp takes them."""
        base = getattr(self.module, "base_layer", self.module)
        in_dtype = lambda t: None if t is None else t.to(dtype)
        lora = None
        if base is not self.module and not self.module.disable_adapters:
            (name,) = self.module.active_adapters
            a, b = self.module.lora_A[name].weight, self.module.lora_B[name].weight
            lora = (in_dtype(a), in_dtype(b), float(self.module.scaling[name]))
        return {"weight": in_dtype(base.weight), "bias": in_dtype(base.bias), "lora": lora}

    @property
    def trained(self) -> bool:
        return any(p.requires_grad for p in self.module.parameters())

    def main_gradient(self, dtype: torch.dtype) -> Tensor | None:
        """The fp32 .grad that linear_logp may add to where it computes in `dtype`, a half one; zeros where
        there was none. None where autograd has to bring the gradient: to hooks, to what is no plain parameter
        (DTensor); and in fp32, where the sums of `optimizer_in_backward` shall be the very same bits."""
        weight = getattr(self.module, "base_layer", self.module).weight
        plain = isinstance(weight, torch.nn.Parameter) and not hasattr(weight, "full_tensor")
        hooked = weight._backward_hooks or weight._post_accumulate_grad_hooks
        wanted = torch.is_grad_enabled() and weight.requires_grad and not hooked
        halved = dtype.itemsize == 2 and weight.dtype == torch.float32
        if not (plain and wanted and halved and weight.is_contiguous()):
            return None
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        return weight.grad


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """(scale, softcap) that this model applies to lm_head's output, in this order. Models with towers apply
    the softcap of their text model, and no factor of it."""
    scale = 1.0
    for name, model_types, power in _LOGIT_FACTORS:
        factor = getattr(config, name, None)
        if factor and (model_types is None or config.model_type in model_types):
            scale = float(factor) ** power
            break
    return scale, getattr(config.get_text_config(), "final_logit_softcapping", None)


def named_budget(head_memory: str | None) -> int | None:
    """The config's head_memory in bytes."""
    return None if head_memory is None else as_bytes("head_memory", head_memory)


def within_free_memory(budget: int, free: int | None) -> int:
    """At most a quarter of the bytes that are free on the card, in steps of 256 MiB: what else runs there
    takes a little more or less from run to run, and microbatches should be cut alike."""
    if free is None or budget <= free // FREE_SHARE:
        return budget
    return max(LEAST, free // FREE_SHARE // STEP * STEP)
