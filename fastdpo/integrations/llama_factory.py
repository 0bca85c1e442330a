"""LLaMA-Factory's DPO at our speed: `llamafactory-cli train` with another name, and nothing else changes.

    python -m fastdpo.integrations.llama_factory train config.yaml

or, before llamafactory's own `run_exp`:

    import fastdpo.integrations.llama_factory as fast
    fast.patch()

What then differs inside `stage: dpo`: the rows of a batch are un-padded and packed, each prompt is computed
once for chosen and rejected, and only scored tokens reach the lm_head, by linear_logp. Losses (sigmoid,
hinge, ipo, kto_pair, orpo, simpo, with pref_ftx, pref_bco_weight, ld_alpha), PEFT, saving and plots stay
LLaMA-Factory's, and so do the metrics but for two: logits/chosen and logits/rejected are means over the
scored tokens, where LLaMA-Factory averages over prompts and padding too. Other stages are not touched.

LLaMA-Factory pins versions below ours of datasets and transformers, on which what is imported here works:
`pip install --no-deps fastdpo` beside it. Written against 0.9.5 with transformers 5.6, trl 0.24, peft 0.18.
"""

import logging
import os
import sys
from typing import Any

import torch

from fastdpo.errors import ConfigError
from fastdpo.integrations.trl_rows import IGNORED
from fastdpo.integrations.versions import LLAMA_FACTORY, check_version

_ELSEWHERE = {
    "USE_V1": "its v1 trainers",
    "USE_MCA": "Megatron's trainers",
    "USE_RAY": "Ray, whose workers import LLaMA-Factory anew",
}
_AVERAGED = ("ipo", "orpo", "simpo")  # losses that LLaMA-Factory gives log-probs a token


def patch() -> None:
    """Replaces LLaMA-Factory's DPO trainer, for the runs that are started from now on in this process.
    ConfigError for a version whose inside we do not know."""
    module = _module()
    if not hasattr(module.CustomDPOTrainer, "fastdpo_stock"):
        module.CustomDPOTrainer = trainer_class(module.CustomDPOTrainer)


def unpatch() -> None:
    """LLaMA-Factory as it was, for trainers made from now on."""
    module = _module()
    module.CustomDPOTrainer = getattr(module.CustomDPOTrainer, "fastdpo_stock", module.CustomDPOTrainer)


def trainer_class(stock: type) -> type:
    """llamafactory.train.dpo.trainer.CustomDPOTrainer with our forward."""
    from fastdpo.integrations.packed_forward import PackedForward

    class CustomDPOTrainer(stock):
        fastdpo_stock = stock

        def __init__(self, model: Any, ref_model: Any, *args: Any, **kwargs: Any) -> None:
            for one in {id(m): m for m in (model, ref_model) if m is not None}.values():
                PackedForward(one.get_base_model() if hasattr(one, "get_base_model") else one)
            if getattr(model.config.get_text_config(), "output_router_logits", False):
                logging.getLogger("fastdpo").warning(
                    "fastdpo: the experts' balance loss is off: LLaMA-Factory's DPO adds none, patched or not"
                )
            super().__init__(model, ref_model, *args, **kwargs)

        def concatenated_forward(
            self, model: Any, batch: dict[str, torch.Tensor], is_ref_model: bool = False
        ) -> dict[str, torch.Tensor]:
            """LLaMA-Factory's dict, with the logits [B, S, V] given as one mean logit a scored token."""
            if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
                raise ConfigError(
                    "fsdp: FSDP1 with LLaMA-Factory is not tested; take FSDP2 (accelerate's fsdp_version: 2, "
                    "or version: 2 in fsdp_config), DDP or DeepSpeed ZeRO-2, or llamafactory-cli"
                )
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            labels = batch["labels"]
            out = model(**inputs, use_cache=False, fastdpo_labels=labels)
            scored = labels[:, 1:] != IGNORED
            logps = row_sums(out["logp"], scored, None if is_ref_model else self.ld_alpha)
            lengths, averaged = scored.sum(-1), self.loss_type in _AVERAGED
            chosen, rejected = (logps / lengths if averaged else logps).chunk(2)
            means = [mean[mask] for mean, mask in zip(out["mean_logit"].chunk(2), scored.chunk(2))]
            return {
                "chosen_logps": chosen,
                "rejected_logps": rejected,
                "chosen_logits": means[0],
                "rejected_logits": means[1],
                "chosen_logps_avg": chosen if averaged else chosen / lengths.chunk(2)[0],
            }

    return CustomDPOTrainer


def row_sums(logp: torch.Tensor, scored: torch.Tensor, ld_alpha: float | None) -> torch.Tensor:
    """f32[2B] of per-token log-probs f32[2B, S - 1] where `scored`. LD-DPO (arXiv 2409.06411) weighs by
    ld_alpha what lies beyond as many positions as the pair's shorter response has scored tokens."""
    logp = logp * scored
    if ld_alpha is None:
        return logp.sum(-1)
    chosen, rejected = scored.sum(-1).chunk(2)
    shared_end = scored.int().argmax(-1) + torch.minimum(chosen, rejected).repeat(2)
    beyond = torch.arange(scored.shape[1], device=logp.device) >= shared_end[:, None]
    return torch.where(beyond, ld_alpha * logp, logp).sum(-1)


def _module() -> Any:
    try:
        from llamafactory.extras.env import VERSION
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "llamafactory":
            raise
        raise ConfigError(
            f"fastdpo.integrations.llama_factory: LLaMA-Factory is not installed here: {LLAMA_FACTORY}"
        ) from None
    check_version("llama_factory", VERSION)
    for variable, whose in _ELSEWHERE.items():
        if os.environ.get(variable, "0").lower() in ("1", "true", "y"):
            raise ConfigError(f"{variable}: it selects {whose}, which fastdpo does not reach; unset it")
    import llamafactory.train.dpo.trainer as module

    return module


def main() -> None:
    """`llamafactory-cli train ...`, patched; where that starts torchrun, in every process."""
    if sys.argv[1:2] != ["train"]:
        raise SystemExit(
            "usage: python -m fastdpo.integrations.llama_factory train config.yaml [key=value ...]\n"
            "(llamafactory-cli has the other commands)"
        )
    try:
        patch()
    except ConfigError as error:
        raise SystemExit(f"error: {error}") from None
    if "LOCAL_RANK" in os.environ:  # a process that torchrun made
        from llamafactory.train.tuner import run_exp

        del sys.argv[1]
        run_exp()
        return
    from llamafactory import cli, launcher

    # the launcher gives its own file to torchrun, as one of several words: ours patches first
    launcher.__file__ = "-m fastdpo.integrations.llama_factory train"
    cli.main()


if __name__ == "__main__":
    main()
