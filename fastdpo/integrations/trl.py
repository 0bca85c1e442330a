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

import contextlib

import trl

from fastdpo.errors import ConfigError

SUPPORTED = ("1.15", "1.16")


def patch() -> None:
    """Replaces TRL's fused lm_head, for the trainers that are made from now on. ConfigError for a TRL whose
    inside we do not know."""
    utils, dpo_trainer, ours = _modules()
    dpo_trainer.add_fused_lm_head = ours.add_fused_lm_head
    utils._ChunkedLogProbFunction = ours.FusedLogProb


def unpatch() -> None:
    """TRL as it was, in the trainers that exist too."""
    utils, dpo_trainer, ours = _modules()
    dpo_trainer.add_fused_lm_head = ours.STOCK_ADD
    utils._ChunkedLogProbFunction = ours.STOCK_KERNEL
    ours.switch_off_all()


@contextlib.contextmanager
def making_a_trainer():
    """Inside, a DPOTrainer that is made gets our forward; afterwards others do what they did before."""
    _, dpo_trainer, ours = _modules()
    before, dpo_trainer.add_fused_lm_head = dpo_trainer.add_fused_lm_head, ours.add_fused_lm_head
    try:
        yield
    finally:
        dpo_trainer.add_fused_lm_head = before


def check_version(version: str) -> None:
    if ".".join(version.split(".")[:2]) not in SUPPORTED:
        raise ConfigError(
            f"fastdpo.integrations.trl: TRL {version} is installed; this knows the inside of "
            f"{SUPPORTED[0]} to {SUPPORTED[-1]}: pip install 'trl>={SUPPORTED[0]},<1.17'"
        )


def _modules():
    check_version(trl.__version__)
    import trl.trainer.dpo_trainer as dpo_trainer
    import trl.trainer.utils as utils

    import fastdpo.integrations.trl_forward as ours

    return utils, dpo_trainer, ours


def __getattr__(name: str):
    if name != "FastDPOTrainer":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_version(trl.__version__)
    from fastdpo.integrations.trl_trainer import FastDPOTrainer

    return FastDPOTrainer
