"""TRL's DPOTrainer on CPU in float32: the peer our trainer is measured against.

    python -m benchmarks.peers.trl_dpo --model DIR --tokenizer DIR --rows FILE.jsonl \\
        --batch-size 1 --accumulation 8 --steps 4 --out result.json

Run it in a process of its own: the peak it reports is the whole process's resident memory.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
import transformers
import trl

from benchmarks.process import peak_bytes, restart_peak, versions

COLUMNS = ("prompt", "chosen", "rejected")
CPU_FP32 = {
    "use_cpu": True,
    "bf16": False,  # DPOConfig's default is True
    "gradient_checkpointing": False,  # its default is True too: one more forward a step
    "train_sampling_strategy": "sequential",  # the supported way to keep the rows' order
    "lr_scheduler_type": "constant",
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


@dataclass
class TrainingRun:
    """What one run leaves: an entry an optimizer step, then the trained parameters by name."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)  # before clipping
    seconds: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


class ExactTrainer(trl.DPOTrainer):
    """DPOTrainer that keeps what some releases round when they log: a step's loss and norm."""

    step_loss = last_grad_norm = 0.0

    def training_step(self, *args, **kwargs):
        """TRL's own. Its loss already carries 1/accumulation, so micro losses just add up."""
        loss = super().training_step(*args, **kwargs)
        self.step_loss += loss.item()
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        self.last_grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.last_grad_norm


class StepRecorder(transformers.TrainerCallback):
    """Times a step, first forward to zero_grad: without collation and logging, in TRL's favour."""

    def __init__(self, run: TrainingRun, trainer: ExactTrainer):
        self.run, self.trainer = run, trainer

    def on_step_begin(self, *_, **__):
        """Once the step's batches are collated."""
        self.trainer.step_loss, self.start = 0.0, time.perf_counter()

    def on_step_end(self, *_, **__):
        """After optimizer.step and zero_grad."""
        self.run.seconds.append(time.perf_counter() - self.start)
        self.run.losses.append(self.trainer.step_loss)
        self.run.grad_norms.append(float(self.trainer.last_grad_norm))


def make_trainer(
    model,
    tokenizer,
    rows,
    *,
    batch_size,
    accumulation,
    max_steps,
    learning_rate,
    output_dir,
    precompute_ref=True,
    ref_model=None,
    **settings,
) -> ExactTrainer:
    """A DPOTrainer in float32 on the CPU that reads `rows` in the given order, over and over.

    Rows are dicts in TRL's explicit format: prompt, chosen, rejected (other keys are dropped).
    `settings` are DPOConfig's: beta, loss_type, label_smoothing, max_length, seed, ... Whatever
    is named neither here nor in CPU_FP32 keeps TRL's default. Without `precompute_ref`, give a
    `ref_model` unless `model` came from a folder that TRL can load again.
    """
    config = trl.DPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=max_steps,
        learning_rate=learning_rate,
        precompute_ref_log_probs=precompute_ref,
        **(CPU_FP32 | settings),
    )
    data = datasets.Dataset.from_list([{key: row[key] for key in COLUMNS} for row in rows])
    trainer = ExactTrainer(model.float(), ref_model, config, train_dataset=data, processing_class=tokenizer)
    kept, pairs = len(trainer.train_dataset), batch_size * accumulation
    if kept < len(rows) or kept % pairs:
        raise ValueError(
            f"TRL kept {kept} of {len(rows)} rows: it must keep them all (max_length), and they "
            f"must fill whole steps of {pairs} pairs, or an epoch would end in a smaller one"
        )
    return trainer


def run_training(trainer: ExactTrainer) -> TrainingRun:
    """Train to max_steps. The weights are the live parameters (a tied one once), not copies."""
    run = TrainingRun()
    trainer.add_callback(StepRecorder(run, trainer))
    trainer.train()
    run.weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return run


def token_counts(trainer: ExactTrainer) -> dict:
    """Tokens of each row, and in all: real ones, with padding, and those with a loss."""
    rows = trainer.train_dataset
    lengths = {name: [len(ids) for ids in rows[f"{name}_ids"]] for name in COLUMNS}
    padded = sum(batch["input_ids"].numel() for batch in trainer.get_train_dataloader())
    prompt, scored = sum(lengths["prompt"]), sum(lengths["chosen"] + lengths["rejected"])
    return {**lengths, "real": 2 * prompt + scored, "padded": padded, "scored": scored}


def measure(args: argparse.Namespace, folder: str) -> dict:
    """One warm-up step and args.steps timed ones, over the first args.num_rows rows."""
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.tokenizer)
    with args.rows.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, args.num_rows)]
    names = ("batch_size", "accumulation", "learning_rate", "max_length")
    settings = {name: getattr(args, name) for name in names} | {"max_steps": args.steps + 1}
    trainer = make_trainer(model, tokenizer, rows, output_dir=folder, **settings)
    tokens = token_counts(trainer)
    before, run = restart_peak(), run_training(trainer)
    pairs = args.batch_size * args.accumulation
    return {
        "pairs_per_second": pairs / statistics.median(run.seconds[1:]),
        **peak_bytes(),
        "bytes_before_training": before,
        "seconds": run.seconds,
        "losses": run.losses,
        "grad_norms": run.grad_norms,
        "tokens": tokens,
        "settings": {**settings, "beta": trainer.beta, "threads": torch.get_num_threads()},
        "versions": versions(),
    }


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--model", "--tokenizer", "--rows", "--out"):
        parser.add_argument(name, type=Path, required=True)
    numbers = {"--batch-size": 1, "--accumulation": 8, "--steps": 4, "--num-rows": 16}
    numbers |= {"--max-length": 1024, "--learning-rate": 1e-5, "--threads": os.cpu_count()}
    for name, default in numbers.items():
        parser.add_argument(name, type=type(default), default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(args, folder)
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
