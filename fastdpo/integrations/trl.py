"""TRL's preference trainers at our speed: `patch()` before the trainer is made, and nothing else changes.

    import fastdpo.integrations.trl as fast
    fast.patch()
    trainer = trl.DPOTrainer(model, args=..., train_dataset=..., processing_class=...)

What then differs inside: the rows of a DPO batch are un-padded and packed, each prompt is computed once for
chosen and rejected, and only completion tokens reach the lm_head, by linear_logp. Losses, metrics, PEFT,
accelerate's wrappers, saving and generation stay TRL's. In TRL's other trainers with a fused lm_head (KTO,
SFT, GRPO, RLOO) linear_logp takes its place and the rest stays; trl.experimental's CPO (with SimPO), ORPO
and TPO make full logits in their own code, and are not touched.

`FastDPOTrainer` is trl.DPOTrainer with all that (it needs no patch()) and our reference cache.
"""

from types import ModuleType
from typing import TYPE_CHECKING

import trl

from fastdpo.integrations.versions import check_version


def patch() -> None:
    """Replaces TRL's fused lm_head, for the trainers that are made from now on. ConfigError for a TRL whose
    inside we do not know."""
    _ours().patch()


def unpatch() -> None:
    """TRL as it was, in the trainers that exist too."""
    _ours().unpatch()


def _ours() -> ModuleType:
    check_version("trl", trl.__version__)
    import fastdpo.integrations.trl_forward as ours

    return ours


if TYPE_CHECKING:  # the same in words that a type checker reads
    from fastdpo.integrations.trl_trainer import FastDPOTrainer as FastDPOTrainer
else:

    def __getattr__(name: str):
        if name != "FastDPOTrainer":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        check_version("trl", trl.__version__)
        from fastdpo.integrations.trl_trainer import FastDPOTrainer

        return FastDPOTrainer
