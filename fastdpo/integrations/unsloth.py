"""Unsloth's DPO at our speed: `patch()` after `import unsloth`, and nothing else changes.

    import unsloth
    import trl
    import fastdpo.integrations.unsloth as fast

    fast.patch()
    trainer = trl.DPOTrainer(model, args=..., train_dataset=..., processing_class=...)

Unsloth writes a DPOTrainer of its own from TRL's source, which it puts in the place of trl.DPOTrainer. That
one has TRL's fused lm_head, by a name of its own that fastdpo.integrations.trl.patch() does not reach; this
does. Losses, metrics, PEFT, saving and Unsloth's precision rules stay as they are.

Models that transformers runs share prompts and are packed, as with TRL. Unsloth's fast models compute
attention outside transformers' AttentionInterface, so they run on padded separate rows, which is said once:
what is left is our lm_head on the scored tokens alone.

Written against 2026.10.9 with TRL 1.15.
"""

import os
import sys
import warnings
from typing import Any

from fastdpo.errors import ConfigError
from fastdpo.integrations.versions import check_version

# by Unsloth's PeftModel, as None or 0, and no wish of the caller
_ALWAYS_GIVEN = ("causal_mask", "num_logits_to_keep", "logits_to_keep")


def patch() -> None:
    """Replaces the fused lm_head of Unsloth's DPOTrainer, and TRL's, for the trainers that are made from now
    on. ConfigError where Unsloth is not imported, or with a TRL or DPOTrainer whose inside we do not know."""
    module, ours = _modules()
    ours.patch()
    module.add_fused_lm_head = add_fused_lm_head


def unpatch() -> None:
    """Unsloth and TRL as they were, in the trainers that exist too."""
    module, ours = _modules()
    ours.unpatch()
    module.add_fused_lm_head = ours.STOCK_ADD


def add_fused_lm_head(model: Any, *args: Any, **kwargs: Any) -> None:
    """trl_forward.add_fused_lm_head, for models as Unsloth makes and calls them."""
    from fastdpo.integrations import trl_forward as ours
    from fastdpo.integrations.packed_forward import bind

    if len({parameter.device for parameter in model.parameters()}) > 1:
        warnings.warn(
            "fastdpo: the model lies on several devices, so Unsloth's own forward runs", stacklevel=2
        )
        ours.STOCK_ADD(model, *args, **kwargs)
        return
    ours.add_fused_lm_head(model, *args, **kwargs)
    fused = model.forward

    def forward(model: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if fused_lm_head:
            unsaid = lambda value: value is None or (isinstance(value, int) and value == 0)
            kwargs = {k: v for k, v in kwargs.items() if k not in _ALWAYS_GIVEN or not unsaid(v)}
        return fused(*args, fused_lm_head=fused_lm_head, **kwargs)

    bind(model, forward)


def _modules() -> tuple[Any, Any]:
    """Where trl.DPOTrainer looks add_fused_lm_head up (the module that Unsloth generated, or on a machine
    without a GPU, where it generates none, TRL's own), and trl_forward."""
    if "unsloth" not in sys.modules:
        raise ConfigError(
            "fastdpo.integrations.unsloth: `import unsloth` comes first: it replaces TRL's trainers"
        )
    if os.environ.get("UNSLOTH_RETURN_HIDDEN_STATES", "0") == "1":
        raise ConfigError("UNSLOTH_RETURN_HIDDEN_STATES: it gives hidden states for logits; unset it")
    import trl

    check_version("trl", trl.__version__)
    module = sys.modules[trl.DPOTrainer.__module__]
    if not hasattr(module, "add_fused_lm_head"):
        raise ConfigError(
            f"fastdpo.integrations.unsloth: the DPOTrainer of {module.__name__} has no fused lm_head; this "
            "knows what Unsloth 2026.10.9 makes of TRL 1.15: pip install unsloth==2026.10.9 trl==1.15.0"
        )
    from fastdpo.integrations import trl_forward

    return module, trl_forward
