"""Axolotl's DPO with our trainer: the same numbers and a model on disk, by Axolotl's own config path.

Axolotl 0.19 pins older packages than ours, so that it needs an environment of its own. On a CPU, with torch
2.13 and what Axolotl imports, but for the packages that want CUDA (a GPU's environment is `pip install
axolotl==0.19.0`):

    python -m venv ax && ax/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    ax/bin/pip install trl==1.9.0 transformers==5.16.1 accelerate==1.13.0 peft==0.20.0 datasets==4.8.4 \
        huggingface_hub==1.17.0 tokenizers==0.23.1 pydantic==2.12.5 typer==0.25.1 'kernels<0.17' wandb \
        posthog==6.7.11 mistral-common==1.11.5 schedulefree==1.4.1 evaluate==0.4.1 'numba>=0.63.1' \
        s3fs==2025.10.0 antlr4-python3-runtime==4.13.2 PyYAML addict fire einops colorama scipy art fastcore \
        python-dotenv zstandard langdetect immutabledict tensorboard nvidia-ml-py sentencepiece \
        pytest pytest-timeout matplotlib rich psutil
    ax/bin/pip install --no-deps axolotl==0.19.0 axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 \
        bitsandbytes==0.50.2 torchao==0.17.0
    ax/bin/pip install --no-deps -e .
    ax/bin/python -m pytest tests/integrations/test_axolotl.py

do_cli is what `axolotl train CONFIG` launches. What needs no Axolotl is in test_integration_trl_older.py.
"""

import importlib.util
import json
import re
import sys

import pytest
import torch
import trl
import yaml
from accelerate.state import AcceleratorState
from transformers import AutoModelForCausalLM

from fastdpo.errors import ConfigError
from fastdpo.integrations import trl_forward
from tests.docs.snippets import block
from tests.tiny import rows, save_model, write_jsonl

pytestmark = [
    pytest.mark.peer,
    pytest.mark.skipif(
        importlib.util.find_spec("axolotl") is None,
        reason="axolotl is not installed (it pins older packages)",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


def documented_lines() -> dict:
    """The YAML that Axolotl's users are told to add."""
    return yaml.safe_load(block("drop_ins.md", "Axolotl 0.19", "yaml"))


@pytest.fixture
def train(folder, tmp_path, monkeypatch):
    """train(name, **keys) -> (what the trainer logged, the output folder, times the GPU's cache was emptied),
    by the function that `axolotl train` launches."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    data = write_jsonl(tmp_path / "train.jsonl", rows(12))

    def call(name, **keys):
        from axolotl.cli.train import do_cli

        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)  # TRL 1.9 draws a LoRA's start before it sets its seed
        output, emptied = tmp_path / name, []
        config = {"base_model": folder, "rl": "dpo", "rl_beta": 0.1, "output_dir": str(output), "seed": 7}
        config |= {"datasets": [{"path": data, "ds_type": "json", "split": "train"}], "sequence_len": 64}
        config |= {"dataset_prepared_path": str(tmp_path / "prepared"), "dataset_num_proc": 1}
        config |= {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 3}
        config |= {"logging_steps": 1}
        config |= {"learning_rate": 2e-3, "lr_scheduler": "constant", "optimizer": "adamw_torch"}
        config |= {"bf16": False, "fp16": False, "tf32": False, "device_map": "cpu", "num_epochs": 1, **keys}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.setattr(sys, "argv", ["axolotl"])
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
        do_cli(config=str(tmp_path / f"{name}.yaml"))
        log = json.loads((output / "checkpoint-3/trainer_state.json").read_text())["log_history"]
        return log, output, len(emptied)

    return call


LORA = {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "lora_target_linear": True}
CASES = {
    "full": {},
    "LoRA, ipo": LORA | {"rl": "ipo", "learning_rate": 2e-2, "gradient_checkpointing": True},
    "reference cache": {"precompute_ref_log_probs": True, "num_epochs": 2}
    | {"val_set_size": 0.33, "eval_steps": 1},
}


@pytest.mark.parametrize("name", CASES)
def test_axolotl(name, train, folder, monkeypatch):
    from fastdpo.integrations.axolotl import FastDPOTrainer

    made, make_one = [], FastDPOTrainer.__init__
    monkeypatch.setattr(FastDPOTrainer, "__init__", lambda t, *a, **k: made.append(t) or make_one(t, *a, **k))
    shared, real = [], trl_forward.FusedForward.shared
    monkeypatch.setattr(trl_forward.FusedForward, "shared", lambda *a: shared.append(1) or real(*a))
    stock, _, emptied = train("stock", **CASES[name])
    assert not shared
    ours, output, still_emptied = train("ours", **CASES[name], **documented_lines())
    assert len(made) == 1 and len(shared) >= 6
    assert emptied - still_emptied == 6  # once a micro-step; what is left is done while models load
    assert (made[0].ref_model is None) == (name != "full")
    check_logs(stock, ours)
    check_model(output, folder, lora="LoRA" in name)


def check_logs(stock, ours):
    """Losses, gradient norms and every metric, by name and value."""
    assert len(stock) == len(ours) and sum("loss" in entry for entry in stock) == 3
    assert max(entry.get("grad_norm", 0) for entry in stock) > 1e-2
    for theirs, mine in zip(stock, ours):
        assert list(theirs) == list(mine)
        kept = [k for k in theirs if not re.search("runtime|per_second|flos|memory|tokens_per", k)]
        for which in ("", "eval_"):
            if abs(theirs.get(f"{which}rewards/margins", 1.0)) < 1e-5:  # at first who is ahead is rounding
                kept.remove(f"{which}rewards/accuracies")
        assert [mine[k] for k in kept] == pytest.approx([theirs[k] for k in kept], rel=1e-4, abs=1e-4)


def check_model(output, folder, lora):
    """What is on disk loads, and has learned something."""
    if lora:
        peft = pytest.importorskip("peft")
        trained = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), output)
        assert max(p.abs().max() for n, p in trained.named_parameters() if "lora_B" in n) > 1e-3
        return
    trained = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(folder)
    assert max((a - b).abs().max() for a, b in zip(trained.parameters(), start.parameters())) > 1e-3


def test_axolotl_other_objectives_are_refused():
    from fastdpo.integrations.axolotl import FastDPOTrainer

    with pytest.raises(ConfigError, match="rl: dpo and rl: ipo"):
        FastDPOTrainer(None, args=trl.KTOConfig(use_cpu=True, bf16=False))
