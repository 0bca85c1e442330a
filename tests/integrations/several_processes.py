"""One of the two processes that tests/integrations/test_several_processes.py has torchrun start.

    torchrun --nproc_per_node 2 -m tests.integrations.several_processes FOLDER WRAPPER CASE...

Trains each case with TRL's trainer as it is and then with ours, on the same rows, under one of WRAPPERS, and
leaves what both came to in FOLDER/WRAPPER-CASE-RANK.pt. Of FSDP2's GATHERED cases TRL's own is run under DDP:
where it finds a trained lm_head sharded, TRL 1.16 leaves each process its own gradient of it.
"""

import os
import sys
from pathlib import Path
from unittest import mock

import peft
import torch
import torch.distributed as dist

from benchmarks.peers.trl_dpo import ExactTrainer
from fastdpo.errors import ConfigError
from fastdpo.integrations import trl_forward
from fastdpo.integrations.trl_trainer import FastDPOTrainer
from tests.integrations.trl_runs import make, patched
from tests.integrations.wrappers import SGD, WRAPPERS, Keep, as_on_gpus
from tests.tiny import rows

LORA = dict(r=4, target_modules="all-linear", exclude_modules=["lm_head"], task_type="CAUSAL_LM")
GATHERED = ("saved", "opt")


class ExactFast(ExactTrainer, FastDPOTrainer):
    """FastDPOTrainer."""


class Silent:
    """A collator whose first batch has nothing to score."""

    def __init__(self, collator):
        self.collator, self.calls = collator, 0

    def __call__(self, examples):
        batch, self.calls = self.collator(examples), self.calls + 1
        if self.calls == 1:
            batch["completion_mask"].zero_()
        return batch


def options(case: str) -> dict:
    """What make() is given for a case, but for what is ours."""
    out = {"folder": "tied", "data": rows(12), "more": {}} | SGD
    if case in ("untied", "opt"):
        out["folder"] = case
    if case in ("lora", "saved"):
        saved = {"modules_to_save": ["lm_head"]} if case == "saved" else {}
        out |= {"folder": "untied", "more": {"peft_config": peft.LoraConfig(**LORA, **saved)}}
    if case == "accumulation":
        out |= dict(gradient_accumulation_steps=2, per_device_train_batch_size=1, gradient_checkpointing=True)
    if case == "bf16":
        out["bf16"] = True
    if case == "repeats":  # in the first process's first batch
        out["data"][1] |= {name: out["data"][0][name] for name in ("prompt", "chosen")}
    return out


def train(root: Path, wrapper: str, case: str, ours: bool) -> dict:
    given = options(case)
    made_by = ExactFast if ours and case in ("trainer", "cache") else ExactTrainer
    if made_by is ExactFast:
        given["more"]["reference_cache"] = "auto" if case == "cache" else None
    ways, heads, keep = [], [], Keep()
    decide, token_logp = trl_forward.FusedForward.decide, trl_forward.token_logp

    def seen(hidden, weight, *args, **kwargs):
        heads.append(tuple(weight.shape))
        assert type(weight) in (torch.Tensor, torch.nn.Parameter)
        return token_logp(hidden, weight, *args, **kwargs)

    with (
        mock.patch.dict(os.environ),
        as_on_gpus(wrapper),
        patched(ours and made_by is ExactTrainer),
        mock.patch.object(trl_forward.FusedForward, "decide", lambda *a: ways.append(decide(*a)) or ways[-1]),
        mock.patch.object(trl_forward, "token_logp", seen),
    ):
        trainer = make(root / given.pop("folder"), make_trainer=made_by, **given | WRAPPERS[wrapper])
        trainer.step_losses = []
        if case == "silent" and dist.get_rank() == 1:
            trainer.data_collator = Silent(trainer.data_collator)
        trainer.add_callback(keep)
        trainer.train()
    return keep.result | {"ways": ways, "heads": heads}


def main(folder: str, wrapper: str, *cases: str) -> None:
    root = Path(folder)
    dist.init_process_group("gloo")
    for case in cases:
        stock = "ddp" if wrapper == "fsdp2" and case in GATHERED else wrapper
        found = {"stock": train(root, stock, case, False)}
        try:
            found["ours"] = train(root, wrapper, case, True)
        except ConfigError as error:
            found["refused"] = str(error)
        torch.save(found, root / f"{wrapper}-{case}-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
