"""As several_processes, for LLaMA-Factory's DPO.

torchrun --nproc_per_node 2 -m tests.integrations.llama_factory_processes FOLDER WRAPPER CASE...
"""

import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from llamafactory.train.tuner import run_exp

import fastdpo.integrations.llama_factory as fast
from fastdpo.integrations.packed_forward import PackedForward
from tests.integrations.test_llama_factory import settings
from tests.integrations.wrappers import SGD, WRAPPERS, Keep, as_on_gpus

CASES: dict[str, dict] = {
    "full": {},
    "orpo": {"pref_loss": "orpo", "model_name_or_path": "tied"},
    "lora": {"finetuning_type": "lora", "lora_rank": 4},
    "lora on the lm_head": {"finetuning_type": "lora", "lora_target": "q_proj,lm_head"},
    "lm_head trained": {"finetuning_type": "lora", "additional_target": "lm_head"},
}


def train(root: Path, wrapper: str, case: str, ours: bool) -> dict:
    AcceleratorState._reset_state(reset_partial_state=True)
    ways, heads, keep = [], [], Keep()
    decide, score = PackedForward.decide, PackedForward.score

    def seen(self, model, hidden, target):
        heads.append(type(model.get_output_embeddings()).__name__)
        return score(self, model, hidden, target)

    fast.patch() if ours else fast.unpatch()
    config = settings(root, f"{wrapper} {case} {ours}", **CASES[case])
    config |= SGD | dict(per_device_train_batch_size=2, use_cpu=True) | WRAPPERS[wrapper]
    with (
        mock.patch.dict(os.environ),
        as_on_gpus(wrapper),
        mock.patch.object(PackedForward, "decide", lambda *a: ways.append(decide(*a)) or ways[-1]),
        mock.patch.object(PackedForward, "score", seen),
    ):
        run_exp(config, callbacks=[keep])
    return keep.result | {"ways": ways, "heads": heads}


def main(folder: str, wrapper: str, *cases: str) -> None:
    root = Path(folder)
    dist.init_process_group("gloo")
    with mock.patch.object(dist, "destroy_process_group"):  # run_exp does, and there are more runs
        for case in cases:
            found = {"stock": train(root, wrapper, case, False), "ours": train(root, wrapper, case, True)}
            torch.save(found, root / f"{wrapper}-{case}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
