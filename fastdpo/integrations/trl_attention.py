"""Our attention in a model that keeps its own: switched on, module by module, by the layout in a call."""

from torch import nn
from transformers import AttentionInterface

from fastdpo.model.attention import prefix_attention
from fastdpo.records import PrefixLayout

NAME = "fastdpo_prefix_trl"
# probabilities that transformers' layers keep as plain numbers, which TRL's disable_dropout leaves alone
_RATES = ("attention_dropout", "activation_dropout", "dropout", "hidden_dropout", "layerdrop")


class Sealed:
    """A layout that wrappers hand on as it is: FSDP would copy a dataclass field by field for each layer."""

    def __init__(self, layout: PrefixLayout):
        self.layout = layout

    def to(self, device, **_) -> "Sealed":
        """For accelerate, where the layers of a model lie on several devices."""
        return Sealed(self.layout.to(device))


def _attention(*args, fastdpo_layout: Sealed, output_router_logits=None, **kwargs):
    """prefix_attention. A mixture of experts hands its layers a wish that is none of the attention's."""
    return prefix_attention(*args, fastdpo_layout=fastdpo_layout.layout, **kwargs)


AttentionInterface.register(NAME, _attention)


def switch_attention(model) -> list:
    """Hooks that give a module our attention while it is called with a layout, and its own otherwise.

    They sit on the modules that look the attention up, so that a checkpoint's recompute in the backward,
    which repeats the module's call and nothing around it, finds ours too.
    """
    before = []

    def enter(module, args, kwargs):
        if isinstance(kwargs.get("fastdpo_layout"), Sealed):
            before.append((module.config, module.config._attn_implementation))
            module.config._attn_implementation_internal = NAME

    def leave(module, args, kwargs, output):
        if isinstance(kwargs.get("fastdpo_layout"), Sealed):
            config, name = before.pop()
            config._attn_implementation_internal = name

    hooks = []
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_attn_implementation_internal"):
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True, always_call=True))
    return hooks


def random_module(model) -> str | None:
    """The name of a module that drops out in training."""
    for name, module in model.named_modules():
        rates = [getattr(module, rate, None) for rate in _RATES]
        if isinstance(module, nn.Dropout):
            rates.append(module.p)
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return name or type(model).__name__
    return None
