"""A config run by its own trainer, and by fastdpo from what `fastdpo convert` writes: the same losses."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.process import python_path
from fastdpo.api import train
from fastdpo.cli import main
from tests.tiny import rows, save_model, write_jsonl

pytestmark = pytest.mark.peer
STEPS = 4
THEIRS = {
    "num_train_epochs": STEPS,  # 8 rows in one batch: no order of rows can matter
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.25,  # a share; transformers 5 knows no warmup_ratio
    "weight_decay": 0.01,
    "max_grad_norm": 0.5,
    "logging_steps": 1,
    "logging_first_step": True,
    "save_strategy": "no",
    "report_to": "none",
    "bf16": False,
    "seed": 7,
}
OF_TRL = {"dataset_num_proc": 1, "eval_strategy": "no", "gradient_checkpointing": True, "max_length": 128}
OF_LLAMA_FACTORY = {"stage": "dpo", "do_train": True, "finetuning_type": "full", "template": "zephyr"}
OF_LLAMA_FACTORY |= {"cutoff_len": 128, "learning_rate": 2e-3, "overwrite_output_dir": True}
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 16}
LORA |= {"lora_target_modules": ["q_proj", "v_proj", "down_proj"]}
TRL = {
    "full, sigmoid": {"loss_type": "sigmoid", "beta": 0.3, "learning_rate": 2e-3},
    "full, ipo": {"loss_type": "ipo", "beta": 0.2, "learning_rate": 2e-3, "precompute_ref_log_probs": True},
    "full, three losses": {  # TRL takes bco_pair's mean and sft's tokens of a microbatch, fastdpo of a step
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
        "learning_rate": 1e-3,
    },
    "LoRA, sigmoid": LORA | {"learning_rate": 2e-2, "lora_dropout": 0.0},
    "LoRA, ipo": LORA | {"loss_type": "ipo", "learning_rate": 2e-2, "use_rslora": True, "lora_dropout": 0.0},
}

LLAMA_FACTORY = {  # not hinge and ipo: LLaMA-Factory 0.9.5 calls TRL 0.24's dpo_loss without pref_loss
    "sigmoid": {"pref_beta": 0.3},
    "sigmoid and pref_ftx": {"pref_ftx": 0.5},
    "orpo": {"pref_loss": "orpo"},
    "simpo": {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 0.5},
}
OF_AXOLOTL = {
    **{
        "rl": "dpo",
        "rl_beta": 0.3,
        "sequence_len": 128,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 2,
    },
    **{"num_epochs": STEPS, "learning_rate": 2e-3, "lr_scheduler": "cosine", "warmup_steps": 2, "seed": 7},
    **{"optimizer": "adamw_torch", "weight_decay": 0.01, "max_grad_norm": 0.5, "logging_steps": 1},
    **{"bf16": False, "fp16": False, "tf32": False, "saves_per_epoch": 1, "val_set_size": 0.0},
}
AXOLOTL = {
    "full": {},
    "full, ipo": {"rl": "ipo", "rl_beta": 0.2},
    "LoRA": {
        "adapter": "lora",
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_target_linear": True,
        "learning_rate": 2e-2,
    },
}
ZEPHYR = (
    "<|system|>\nYou are Zephyr, a helpful assistant.{{ eos_token }}{% for m in messages %}"
    "<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@pytest.fixture
def same_start(monkeypatch):
    """A LoRA's first weights are drawn with each trainer's own generator: here they come from their shape."""

    def fixed(weight, *args, **kwargs):
        generator = torch.Generator().manual_seed(weight.numel())
        with torch.no_grad():
            return weight.copy_(torch.rand(weight.shape, generator=generator) * 0.2 - 0.1)

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", fixed)


def run_by_trl(path, monkeypatch) -> list[float]:
    """The loss of each step of `python -m trl.scripts.dpo --config FILE --use_cpu true`."""
    trl = pytest.importorskip("trl", reason="needs trl")
    from trl.scripts import dpo

    from benchmarks.peers.trl_dpo import ExactTrainer, StepRecorder, TrainingRun

    run = TrainingRun()

    class Recorded(ExactTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(StepRecorder(run, self))

    AcceleratorState._reset_state(reset_partial_state=True)  # it outlives a trainer
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setattr(os, "environ", os.environ)  # TRL's script puts another object there
    monkeypatch.setattr(trl, "DPOTrainer", Recorded)
    more = ["--use_cpu", "true", "--disable_tqdm", "true"]
    monkeypatch.setattr(sys, "argv", ["dpo", "--config", str(path), *more])
    dpo.main(*dpo.make_parser().parse_args_and_config(fail_with_unknown_args=True))
    return run.losses


def converted_and_trained(theirs: dict, tmp_path) -> list[float]:
    """The loss of each step by `fastdpo train`, of what `fastdpo convert` writes of a config."""
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    assert main(["convert", str(tmp_path / "theirs.yaml"), "--output", str(tmp_path / "ours.yaml")]) == 0
    folder = train(tmp_path / "ours.yaml", Console(quiet=True), output_dir=str(tmp_path / "run"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS and max(losses) - min(losses) > 0.1  # so that agreeing means something
    return losses


@pytest.mark.parametrize("case", TRL)
def test_trl(case, tmp_path, monkeypatch, same_start):
    start = save_model(tmp_path / "model")
    (tmp_path / "rows").mkdir()
    write_jsonl(tmp_path / "rows/train.jsonl", rows(8))
    names = {"model_name_or_path": start, "dataset_name": str(tmp_path / "rows")}
    theirs = names | THEIRS | OF_TRL | TRL[case] | {"output_dir": str(tmp_path / "trl")}
    losses = converted_and_trained(theirs, tmp_path)
    assert losses == pytest.approx(run_by_trl(tmp_path / "theirs.yaml", monkeypatch), abs=1e-4)


@pytest.mark.skipif(
    find_spec("llamafactory") is None, reason="needs LLaMA-Factory, which pins older packages"
)
@pytest.mark.parametrize("case", LLAMA_FACTORY)
def test_llama_factory(case, tmp_path):
    """In its environment (tests/integrations/test_llama_factory.py); the tokenizer writes as its template."""
    start = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(start)
    tokenizer.chat_template = ZEPHYR
    tokenizer.save_pretrained(start)
    pairs = [{"instruction": r.pop("prompt"), "input": ""} | r for r in rows(8)]
    (tmp_path / "rows.json").write_text(json.dumps(pairs))
    columns = {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"}
    info = {"pairs": {"file_name": "rows.json", "ranking": True, "columns": columns}}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    names = {"model_name_or_path": start, "dataset": "pairs", "dataset_dir": str(tmp_path)}
    theirs = (
        names | THEIRS | OF_LLAMA_FACTORY | LLAMA_FACTORY[case] | {"output_dir": str(tmp_path / "theirs")}
    )
    losses = converted_and_trained(theirs, tmp_path)
    command = [sys.executable, "-m", "llamafactory.cli", "train", str(tmp_path / "theirs.yaml")]
    environment = os.environ | python_path() | {"FORCE_TORCHRUN": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1500:]
    history = json.loads((tmp_path / "theirs/trainer_state.json").read_text())["log_history"]
    assert losses == pytest.approx([log["loss"] for log in history if "loss" in log], abs=2e-4)  # rounded


@pytest.mark.skipif(find_spec("axolotl") is None, reason="needs Axolotl, which pins older packages")
@pytest.mark.parametrize("case", AXOLOTL)
def test_axolotl(case, tmp_path, monkeypatch, same_start):
    """In its environment (tests/integrations/test_axolotl.py), by what `axolotl train` launches."""
    start, data = save_model(tmp_path / "model"), write_jsonl(tmp_path / "train.jsonl", rows(8))
    names = {"base_model": start, "datasets": [{"path": data, "ds_type": "json", "split": "train"}]}
    names |= {"dataset_prepared_path": str(tmp_path / "prepared"), "output_dir": str(tmp_path / "theirs")}
    losses = converted_and_trained(names | OF_AXOLOTL | AXOLOTL[case], tmp_path)
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    from axolotl.cli.train import do_cli

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(sys, "argv", ["axolotl"])
    do_cli(config=str(tmp_path / "theirs.yaml"), device_map="cpu", use_cpu=True)
    state = tmp_path / f"theirs/checkpoint-{STEPS}/trainer_state.json"
    history = json.loads(state.read_text())["log_history"]
    assert losses == pytest.approx([log["loss"] for log in history if "loss" in log], abs=2e-4)  # rounded
