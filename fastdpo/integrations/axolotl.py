"""Axolotl's DPO at our speed: one line in its YAML.

    trainer_cls: fastdpo.integrations.axolotl.FastDPOTrainer

Rows are packed, each prompt is computed once for chosen and rejected, and only response tokens reach the
lm_head. Axolotl's optimizers, schedules, LoRA, saving and callbacks stay, and so do TRL's losses and metrics.
Written against axolotl 0.19 (TRL 1.9).
"""

from typing import Any

import trl
from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

from fastdpo.errors import ConfigError
from fastdpo.integrations import trl_older


class FastDPOTrainer(AxolotlDPOTrainer, trl_older.FastDPOTrainer):
    """AxolotlDPOTrainer (rl: dpo and ipo) with packed, shared rows, and without its gc.collect() and
    torch.cuda.empty_cache() after each micro-step.

    With precompute_ref_log_probs: true the reference comes from our cache (a file in ~/.cache/fastdpo), and
    the second copy of the model, which Axolotl loads for full fine-tuning, goes before the training begins.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        if not isinstance(args, trl.DPOConfig):
            raise ConfigError("trainer_cls: fastdpo's FastDPOTrainer is for rl: dpo and rl: ipo")
        cache = "auto" if args.precompute_ref_log_probs else None
        super().__init__(model, ref_model, args=args, reference_cache=cache, **kwargs)
        if self.precompute_ref_logps:
            self.ref_model = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        return super(AxolotlDPOTrainer, self).training_step(*args, **kwargs)
