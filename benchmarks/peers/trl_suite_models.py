"""What TRL's own DPO tests ask the hub for, made here: tiny random models, a tokenizer, tiny data sets.

A hub id is a path where such a folder exists in the working directory: `build(folder, checkout)` makes
`trl-internal-testing/<name>` in it. The models follow scripts/generate_tiny_models of TRL's repository, with
a vocabulary of 800 tokens, and weights large enough for log-probs that differ from token to
token; the data sets are made by the checkout's own scripts. No images, so no vision models.
"""

import runpy
import shutil
import sys
from pathlib import Path
from unittest import mock

import datasets
import tokenizers
import torch
import transformers
import trl
import yaml

ORGANISATION = "trl-internal-testing"
VOCAB = 800
PAD, END = "<|endoftext|>", "<|im_end|>"
SPECIAL = [PAD, END, "<|im_start|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]
SIZES = dict(hidden_size=8, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
SIZES |= dict(intermediate_size=32)
_LFM2 = dict(conv_L_cache=3, layer_types=["conv", "full_attention"], use_cache=False)
_MAMBA = dict(mamba_num_heads=8, mamba_head_dim=4, mamba_n_groups=1, mamba_d_conv=4, mamba_expand=2)
_MAMBA |= dict(ssm_state_size=16, layers_block_type=["mamba", "attention", "moe"])
_EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
_YARN = dict(rope_type="yarn", rope_theta=500000, factor=8.0, attention_factor=1.2, beta_fast=32.0)
_YARN |= dict(beta_slow=1.0, original_max_position_embeddings=8192)

# folder -> (transformers' class without ForCausalLM, its config's arguments, TRL's chat template)
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2", {}, "qwen2_5"),
    "tiny-Cohere2ForCausalLM": ("Cohere2", dict(logit_scale=0.5), "cohere2"),
    "tiny-Glm4MoeForCausalLM": (
        "Glm4Moe",
        _EXPERTS | dict(n_routed_experts=4, head_dim=2, attention_bias=True, use_qk_norm=True),
        "glm4moe",
    ),
    "tiny-GptOssForCausalLM": ("GptOss", dict(num_local_experts=4, num_experts_per_tok=2), "gptoss"),
    "tiny-Qwen3MoeForCausalLM": (
        "Qwen3Moe",
        _EXPERTS | dict(num_experts=4, head_dim=128, norm_topk_prob=True),
        "qwen3",
    ),
    "tiny-NemotronHForCausalLM-nano": (
        "NemotronH",
        _MAMBA | _EXPERTS | dict(hidden_size=16, n_routed_experts=4, moe_shared_expert_intermediate_size=32),
        "nemotron_3_nano",
    ),
    "tiny-Olmo3ForCausalLM": (
        "Olmo3",
        dict(max_position_embeddings=65536, rope_parameters=_YARN, use_cache=False),
        "qwen3",
    ),
    "tiny-Lfm2ForCausalLM": ("Lfm2", _LFM2 | dict(block_multiple_of=8), "lfm2"),
    "tiny-Lfm2ForCausalLM-2.5": ("Lfm2", _LFM2 | dict(block_auto_adjust_ff_dim=False), "lfm2_2_5"),
}
DATA = {"zen": "zen", "toolcall": "toolcall", "harmony": "harmony"}  # folder -> generate_<...>_dataset.py


def build(folder: Path, checkout: Path) -> None:
    """All of it under `folder`. A checkout without TRL's scripts is FileNotFoundError."""
    home = folder / ORGANISATION
    for name, script in DATA.items():
        make_data(checkout / "scripts" / f"generate_{script}_dataset.py", home / name)
    tokenizer = make_tokenizer([line for name in DATA for line in texts(home / name)])
    for name, (family, options, template) in MODELS.items():
        config = getattr(transformers, f"{family}Config")(**token_ids(tokenizer) | SIZES | options)
        save(getattr(transformers, f"{family}ForCausalLM")(config), tokenizer, template, home / name)
    make_remote(checkout, tokenizer, home / "tiny-RemoteForCausalLM")


def make_data(script: Path, folder: Path) -> None:
    """Runs a script that pushes data sets to the hub, and writes them to a folder instead."""
    configs = []

    def write(self: datasets.DatasetDict, _, config_name: str) -> None:
        (folder / config_name).mkdir(parents=True)
        files = [{"split": split, "path": f"{config_name}/{split}.parquet"} for split in self]
        for split, rows in self.items():
            rows.to_parquet(folder / config_name / f"{split}.parquet")
        configs.append({"config_name": config_name, "data_files": files})

    with mock.patch.object(datasets.DatasetDict, "push_to_hub", write):
        runpy.run_path(str(script))["main"](0.1, True, folder.name)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def texts(folder: Path) -> list[str]:
    """All text of a folder's data sets."""
    found = []
    for path in folder.glob("*/train.parquet"):
        found += [str(row) for row in datasets.Dataset.from_parquet(str(path))]
    return found


def make_tokenizer(lines: list[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE of VOCAB tokens."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(lines, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=PAD, eos_token=END)


def token_ids(tokenizer) -> dict:
    """A config's vocabulary."""
    names = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return names | {"bos_token_id": None, "vocab_size": len(tokenizer)}


@torch.no_grad()
def save(model, tokenizer, template: str, folder: Path) -> None:
    """Writes model and tokenizer, in bf16 as TRL's; what a model keeps in fp32 stays so."""
    draw = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.copy_(torch.randn(weight.shape, generator=draw) * weight.shape[-1] ** -0.5)
            weight.data = weight.data.bfloat16()
        elif not getattr(weight, "_no_weight_decay", False):  # Mamba's A_log and D
            weight.data = weight.data.bfloat16()
    model.save_pretrained(folder)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text()
    tokenizer.save_pretrained(folder)


def make_remote(checkout: Path, tokenizer, folder: Path) -> None:
    """A model whose code lies beside its weights: TRL's, from the checkout."""
    code = folder.parent / "remote_code"
    source = checkout / "scripts" / "generate_tiny_models" / "for_causal_lm" / "_remote_code"
    shutil.copytree(source, code / "tiny_remote")
    with mock.patch.object(sys, "path", [str(code), *sys.path]):
        from tiny_remote.configuration_remote import RemoteConfig
        from tiny_remote.modeling_remote import RemoteForCausalLM
    RemoteConfig.register_for_auto_class()
    RemoteForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    save(RemoteForCausalLM(RemoteConfig(**token_ids(tokenizer) | SIZES)), tokenizer, "llama3", folder)
    shutil.rmtree(code)
