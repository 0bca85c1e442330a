"""The optimizers of torch, bitsandbytes, torchao and transformers behind one face: step some tensors, and
their states as plain tensors, for checkpoints.
"""

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.errors import ConfigError
from fastdpo.optim.bytes import QUANTISED
from fastdpo.optim.spec import OptimSpec

_EXTRA = "pip install 'fastdpo[quant]'"
_OTHERS = {  # the library, and its class
    "adamw_8bit": ("bitsandbytes", "AdamW8bit"),
    "paged_adamw_8bit": ("bitsandbytes", "PagedAdamW8bit"),
    "paged_adamw_32bit": ("bitsandbytes", "PagedAdamW32bit"),
    "adamw_torch_8bit": ("torchao", "AdamW8bit"),
    "adamw_torch_4bit": ("torchao", "AdamW4bit"),
}


class Library:
    """One optimizer object, stepped for any of its tensors alone or for all at once.

    States are made by the library when a tensor is first stepped. Hyperparameters that are no keys of the
    config are the libraries' common defaults; RMSprop's alpha is 0.99.
    """

    def __init__(self, spec: OptimSpec):
        self.name = spec.optim
        self.library, _ = _OTHERS.get(spec.optim, ("torch", None))
        self.optimizer: Any = _make(spec.optim, torch.nn.Parameter(torch.zeros(1)))
        if "betas" in self.optimizer.defaults:
            betas = (spec.adam_beta1, spec.adam_beta2)
            self.optimizer.defaults |= {"betas": betas, "eps": spec.adam_epsilon}
        self.optimizer.param_groups = []
        self.state = self.optimizer.state

    @property
    def elementwise(self) -> bool:
        """Whether a tensor's parts may be stepped one after the other."""
        return self.name != "adafactor"

    def divides(self, numel: int) -> bool:
        """Whether the parts of a tensor of this size have the states that the whole would have."""
        _, block = QUANTISED[self.name] if self.library == "torchao" else (None, 1)
        return self.elementwise and numel % block == 0

    def step(self, groups: Sequence[tuple[Sequence[torch.nn.Parameter], float]], rate: float) -> None:
        """Updates the tensors that have a gradient, of several (tensors, weight decay); leaves the gradients
        as they are."""
        lr = torch.tensor(rate, dtype=torch.float32) if self.library == "torchao" else rate
        own = lambda tensors, decay: {"params": list(tensors), "weight_decay": decay, "lr": lr}
        self.optimizer.param_groups = [self.optimizer.defaults | own(*group) for group in groups]
        self.optimizer.step()

    def tensors(self, tensor: torch.nn.Parameter) -> dict[str, Tensor]:
        """A tensor's states: numbers as 0-dim tensors, torchao's quantised ones as their parts."""
        out: dict[str, Tensor] = {}
        for key, value in self.state.get(tensor, {}).items():
            if hasattr(value, "tensor_attrs"):  # torchao's subclasses
                out |= {f"{key}.{part}": getattr(value, part) for part in value.tensor_attrs}
            else:
                out[key] = torch.as_tensor(value)
        return out

    def load(self, tensor: torch.nn.Parameter, saved: dict[str, Tensor]) -> None:
        """Puts back what `tensors` gave, on the tensor's device; its data must have its real shape. What is a
        library's own kind of tensor or of memory goes into buffers that the library makes."""
        state = self.state[tensor] = {}
        if self.library == "bitsandbytes":
            group = self.optimizer.defaults | {"params": [tensor]}
            self.optimizer.param_groups = [group]
            self.optimizer.init_state(group, tensor, 0, 0)
        for name, value in saved.items():
            key, _, part = name.partition(".")
            if part:  # of torchao's
                if key not in state:
                    signed = key == "exp_avg"  # the other is a mean of squares
                    state[key] = self.optimizer._new_buffer(tensor, signed)
                place = getattr(state[key], part)
                place.copy_(value.view_as(place))
            elif isinstance(state.get(key), Tensor):
                state[key].copy_(value)
            else:
                state[key] = self._placed(tensor, value)

    def _placed(self, tensor, value: Tensor):
        if value.ndim == 0 and not value.is_floating_point():
            return value.item()  # transformers and bitsandbytes count steps by an int
        if value.ndim == 0 and self.library == "torchao":
            return value.clone()  # and torchao on the CPU
        return value.to(tensor.device, copy=True)


def _make(name: str, tensor: torch.nn.Parameter) -> torch.optim.Optimizer:
    """The library's own class with the options that make learning_rate and weight_decay mean the same."""
    if name == "adamw_torch_fused":
        return torch.optim.AdamW([tensor], fused=True)
    if name == "sgd":
        return torch.optim.SGD([tensor], lr=1.0, foreach=False)  # which would copy all gradients to decay
    if name == "rmsprop":
        return torch.optim.RMSprop([tensor], foreach=False)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor([tensor], lr=1.0, relative_step=False, scale_parameter=False, warmup_init=False)
    library, kind = _OTHERS[name]
    return getattr(importlib.import_module(f"{library}.optim"), kind)([tensor])


def check_library(spec: OptimSpec) -> None:
    """Raises ConfigError where the optimizer cannot work on this machine: no library, or no GPU."""
    if spec.optim in _OTHERS:
        library, _ = _OTHERS[spec.optim]
        try:
            importlib.import_module(f"{library}.optim")
        except ImportError as error:
            raise ConfigError(
                f"optim: {spec.optim} is {library}'s, which cannot be loaded ({error}); {_EXTRA}"
            ) from None
    if spec.optim.startswith("paged_") and not torch.cuda.is_available():
        raise ConfigError(
            f"optim: {spec.optim} pages states out of a GPU's memory and there is no GPU here; "
            "use adamw_8bit or adamw_torch_fused"
        )
