"""One of the two processes that tests/integrations/test_several_processes.py has torchrun start.

    torchrun --nproc_per_node 2 -m tests.integrations.several_processes FOLDER WRAPPER CASE...

Trains each case with TRL's trainer as it is and then with ours, on the same rows, under one of WRAPPERS, and
leaves what both came to in FOLDER/CASE-RANK.pt.
"""

import os
import sys
import warnings
from pathlib import Path
from unittest import mock

import accelerate.state
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from benchmarks.peers.trl_dpo import ExactTrainer, run_training
from fastdpo.integrations import packed_forward, trl_forward
from fastdpo.integrations.trl_trainer import FastDPOTrainer
from tests.integrations.trl_runs import make, patched
from tests.tiny import rows

PLAIN = {"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": "auto"}
PLAIN |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto"}
PLAIN |= {"zero_allow_untested_optimizer": True, "torch_autocast": {"enabled": False}}
WRAPPERS = {
    "ddp": {},
    "fsdp2": {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}},
    "fsdp1": {"fsdp": True, "fsdp_config": {"version": 1}},
    "zero2": {"deepspeed": PLAIN, "use_cpu": False},
}
LORA = dict(r=4, target_modules="all-linear", exclude_modules=["lm_head"], task_type="CAUSAL_LM")
CASES: dict[str, dict] = {
    "tied": {"folder": "tied"},
    "untied": {"folder": "untied"},
    "lora": {"folder": "untied", "lora": {}},
    "accumulation": {
        "folder": "tied",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
    },
    "trainer": {"folder": "tied", "trainer": True, "reference_cache": None},
    "opt": {"folder": "opt"},
    "repeats": {"folder": "tied", "repeats": True},
    "silent": {"folder": "tied", "silent": True},
    "bf16": {"folder": "untied", "bf16": True},
    "saved": {"folder": "untied", "lora": {"modules_to_save": ["lm_head"]}},
    "cache": {"folder": "tied", "trainer": True, "reference_cache": "auto"},
}


class ExactFast(ExactTrainer, FastDPOTrainer):
    """Keeps exact losses."""


class Gradients(transformers.TrainerCallback):
    """Keeps each step's gradients, whole, as the optimizer is about to take them."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def on_pre_optimizer_step(self, *_, **__):
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        self.steps.append({name: whole(grad) for name, grad in named})


class Silent:
    """A collator whose first batch has nothing to score."""

    def __init__(self, collator):
        self.collator, self.calls = collator, 0

    def __call__(self, examples):
        batch, self.calls = self.collator(examples), self.calls + 1
        if self.calls == 1:
            batch["completion_mask"].zero_()
        return batch


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def as_on_gpus():
    """accelerate's FSDP and DeepSpeed are only for GPUs; with gloo they compute on a CPU too."""
    return mock.patch.multiple(
        accelerate.state.PartialState,
        _prepare_backend=lambda *_: ("gloo", DistributedType.MULTI_GPU),
        set_device=lambda state: setattr(state, "device", torch.device("cpu")),
    )


def train(root: Path, wrapper: str, case: dict, ours: bool) -> dict:
    case, ways, heads = dict(case), [], []
    folder, lora, trainer_class = root / case.pop("folder"), case.pop("lora", None), case.pop("trainer", False)
    cache = case.pop("reference_cache", None)
    data, silent = rows(12), case.pop("silent", False)
    if case.pop("repeats", False):
        data[1] |= {"prompt": data[0]["prompt"], "chosen": data[0]["chosen"]}
    more = {"reference_cache": cache} if ours and trainer_class else {}
    if lora is not None:
        import peft

        more["peft_config"] = peft.LoraConfig(**LORA | lora)
    decide, token_logp = packed_forward.Packed.decide, trl_forward.token_logp

    def seen(hidden, weight, *args, **kwargs):
        heads.append((type(weight).__name__, tuple(weight.shape)))
        return token_logp(hidden, weight, *args, **kwargs)

    with (
        patched(ours and not trainer_class),
        mock.patch.object(
            packed_forward.Packed, "decide", lambda *a: ways.append(decide(*a)) or ways[-1]
        ),
        mock.patch.object(trl_forward, "token_logp", seen),
    ):
        trainer = make(
            folder,
            make_trainer=ExactFast if ours and trainer_class else ExactTrainer,
            data=data,
            more=more,
            **dict(optim="sgd", learning_rate=0.5, max_steps=3, ddp_backend="gloo")
            | ({"precompute_ref_log_probs": True} if cache else {})
            | WRAPPERS[wrapper]
            | case,
        )
        if silent and dist.get_rank() == 1:
            trainer.data_collator = Silent(trainer.data_collator)
        gradients = Gradients(trainer.model)
        trainer.add_callback(gradients)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            run = run_training(trainer)
    return {
        "losses": run.losses,
        "norms": run.grad_norms,
        "logs": trainer.state.log_history,
        "weights": {name: whole(weight) for name, weight in run.weights.items()},
        "gradients": gradients.steps,
        "wrapper": type(trainer.model_wrapped).__name__,
        "ways": ways,
        "heads": sorted(set(heads)),
        "said": [str(w.message) for w in said if "fastdpo" in str(w.message)],
    }


def main(folder: str, wrapper: str, *names: str) -> None:
    root = Path(folder)
    dist.init_process_group("gloo")
    with mock.patch.dict(os.environ), as_on_gpus() if wrapper != "ddp" else mock.patch.dict(os.environ):
        for name in names:
            results = {"stock": train(root, wrapper, CASES[name], False)}
            results["ours"] = train(root, wrapper, CASES[name], True)
            torch.save(results, root / f"{wrapper}-{name}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
