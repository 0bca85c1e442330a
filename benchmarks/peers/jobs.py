"""What every contender of a step is given: the same model, the same rows in the same steps."""

import json
import math
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import torch

from benchmarks.inputs import groups_of, pair_rows, sampled_groups
from benchmarks.models import MODELS, BenchModel, build, build_4bit, tiny
from benchmarks.peers.session import Absent
from fastdpo.data.pairs import select_pairs
from fastdpo.model.towers import beside_towers, freeze_vision
from fastdpo.records import PreferenceGroup

BETA = 0.1
CLIP = 1.0


@dataclass(frozen=True)
class Job:
    """One contender's task. `rows` is a JSON file: a list of steps, each a list of rows of
    benchmarks.inputs.random_rows, or of benchmarks.pictures.picture_rows; after the last step the first comes
    again. The option `keys` holds fastdpo's config keys; lora_rank, pure_bf16 and load_in_4bit are what the
    model is made by, whoever trains it."""

    model: str
    rows: str
    device: str
    learning_rate: float
    tiny: bool = False
    options: dict = field(default_factory=dict)

    @cached_property
    def steps(self) -> list[list[dict]]:
        return json.loads(Path(self.rows).read_text())

    @property
    def all_rows(self) -> list[dict]:
        return [row for step in self.steps for row in step]

    @cached_property
    def groups(self) -> list[list[PreferenceGroup]]:
        """The rows of each step as fastdpo's records."""
        steps, first, made = [], 0, groups_of
        if self.bench_model.vision:
            from benchmarks.pictures import picture_groups

            made = partial(picture_groups, self.bench_model)
        for rows in self.steps:
            steps.append(made(rows, first))
            first += len(steps[-1])
        return steps

    @property
    def pairs(self) -> int:
        """Pairs an optimizer step."""
        return len(self.steps[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation, by autocast: weights that train are fp32, unless pure_bf16."""
        return torch.bfloat16 if self.device == "cuda" or self.keys.get("pure_bf16") else torch.float32

    @property
    def keys(self) -> dict:
        return self.options.get("keys", {})

    @property
    def bench_model(self) -> BenchModel:
        model = MODELS[self.model]
        return tiny(model) if self.tiny else model

    @property
    def lora_rank(self) -> int | None:
        return self.keys.get("lora_rank", self.bench_model.lora_rank)

    def build(self, attention: str | None = None):
        """The model, in training mode: weights in fp32, or in the compute dtype under a LoRA."""
        fp32 = self.lora_rank is None and not self.keys.get("pure_bf16")
        if self.keys.get("load_in_4bit"):
            model = build_4bit(self.bench_model, self.device, self.dtype).train()
        else:
            model = build(self.bench_model, self.device, torch.float32 if fp32 else self.dtype).train()
        if attention is not None:
            model.set_attn_implementation(attention)
        if self.bench_model.vision:
            freeze_vision(model)
        return model

    def lora_config(self, model):
        """fastdpo's default LoRA: on all linear layers but lm_head and tower, alpha twice the rank."""
        from peft import LoraConfig

        targets = beside_towers(model, "all-linear") if self.bench_model.vision else "all-linear"
        options = dict(target_modules=targets, task_type="CAUSAL_LM")
        return LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, **options)

    def autocast(self):
        return torch.autocast(self.device, dtype=self.dtype, enabled=self.dtype != torch.float32)


class RoundJob(Job):
    """Its rows are a round's, of benchmarks.inputs.sampled_rows. The option `pairs` says which pairs train,
    as fastdpo's key does; `offline`: they are rows of a data set, with two responses each."""

    @cached_property
    def groups(self) -> list[list[PreferenceGroup]]:
        out, first = [], 0
        for rows in json.loads(Path(self.rows).read_text()):
            found = list(select_pairs(sampled_groups(rows, first), self.options["pairs"])[0])
            out.append(groups_of(pair_rows(found), first) if self.options.get("offline") else found)
            first += len(found)
        return out

    @cached_property
    def steps(self) -> list[list[dict]]:
        """Every pair as a row of its own."""
        return [pair_rows(groups) for groups in self.groups]


def job_of(message: dict) -> Job:
    """What a worker was told to do."""
    return RoundJob(**message) if "pairs" in message["options"] else Job(**message)


@torch.no_grad()
def same_lora(model) -> None:
    """Gives every LoRA's A the same random numbers in every contender (B starts at 0)."""
    starts = [p for name, p in model.named_parameters() if "lora_A" in name and p.requires_grad]
    for number, weight in enumerate(starts):
        draw = torch.Generator().manual_seed(number)
        weight.copy_(torch.randn(weight.shape, generator=draw) / math.sqrt(weight.shape[1]))


def flash_attention() -> str:
    """transformers' name of the flash-attn that is installed. Absent where none is."""
    from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

    if is_flash_attn_3_available():
        return "flash_attention_3"
    if is_flash_attn_2_available():
        return "flash_attention_2"
    raise Absent("flash-attn is not installed, or there is no GPU")


def require_liger(device: str) -> None:
    """Absent where liger-kernel's layers cannot run."""
    from transformers.utils import is_liger_kernel_available

    if not is_liger_kernel_available():
        raise Absent("liger-kernel is not installed")
    if device != "cuda":
        raise Absent("liger-kernel needs a GPU")


# of liger-kernel, on the decoder layers alone: its losses would replace the heads that are compared
LIGER_LAYERS = {
    "rope": True,
    "rms_norm": True,
    "swiglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def apply_liger(model, device: str) -> None:
    """liger-kernel's RMSNorm, rotary embeddings and SwiGLU in this model. Absent where they cannot run."""
    require_liger(device)
    from transformers.integrations.liger import apply_liger_kernel

    apply_liger_kernel(model, LIGER_LAYERS)
