"""TRL's DPOTrainer: the peer that our trainer is measured against, as a worker and step by step.

As a worker it trains on rows of tokens; `make_trainer` and `run_training` train on rows of text, in
float32 on the CPU, for comparing numbers. Options of the worker:
    batch_size      pairs a microbatch; the rest of a step by gradient accumulation
    best            False: DPOConfig's defaults, with a reference model computed in every step.
                    True: stored reference and no checkpointing; then also, where given:
    stored          False: the reference is computed in every step, as of rows that come once
    checkpointing   recompute the layers in the backward
    liger           liger-kernel's layers
    flash           flash-attn in place of torch's attention (sdpa)
    keys            those of fastdpo's config keys that TRL has under the same name (KEYS), or that say
                    what the weights are (benchmarks/peers/jobs.py)
"""

import os
import tempfile
import time
from dataclasses import dataclass, field
from unittest import mock

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import tokenizers
import torch
import transformers
import trl
import trl.trainer.dpo_trainer

from benchmarks.peers.jobs import BETA, CLIP, Job, flash_attention, job_of, require_liger, same_lora
from benchmarks.peers.session import Ended, Session, serve

COLUMNS = ("prompt", "chosen", "rejected", "images")
ENDLESS = 1_000_000  # steps: the parent says when to stop
KEYS = ("optim", "gradient_checkpointing", "activation_offloading")
IN_ORDER = {
    "train_sampling_strategy": "sequential",  # the supported way to keep the rows' order
    "lr_scheduler_type": "constant",
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
CPU_FP32 = {
    "use_cpu": True,
    "bf16": False,  # DPOConfig's default is True
    "gradient_checkpointing": False,  # its default is True too: one more forward a step
    **IN_ORDER,
}


@dataclass
class TrainingRun:
    """What one run leaves: an entry an optimizer step, then the trained parameters by name."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)  # before clipping
    seconds: list[float] = field(default_factory=list)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


class Exact:
    """Beside a trainer of TRL's: keeps what some releases round when they log: a step's loss and norm."""

    last_grad_norm = 0.0

    def training_step(self, *args, **kwargs):
        """TRL's own. Its loss already carries 1/accumulation, so micro losses just add up; no wait."""
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss.detach())
        return loss

    def step_loss(self) -> float:
        return float(torch.stack(self.step_losses).sum())

    def _get_grad_norm(self, *args, **kwargs):
        self.last_grad_norm = super()._get_grad_norm(*args, **kwargs)
        return self.last_grad_norm


class ExactTrainer(Exact, trl.DPOTrainer):
    """DPOTrainer so."""


class TokenTrainer(ExactTrainer):
    """For rows that are tokens already: prompt_ids, chosen_ids, rejected_ids."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


class StepRecorder(transformers.TrainerCallback):
    """Times a step, first forward to zero_grad: without collation and logging, in TRL's favour."""

    def __init__(self, run: TrainingRun, trainer: ExactTrainer):
        self.run, self.trainer = run, trainer

    def on_step_begin(self, *_, **__):
        """Once the step's batches are collated."""
        self.trainer.step_losses, self.start = [], time.perf_counter()

    def on_step_end(self, *_, **__):
        """After optimizer.step and zero_grad."""
        self.run.seconds.append(time.perf_counter() - self.start)
        self.run.losses.append(self.trainer.step_loss())
        self.run.grad_norms.append(float(self.trainer.last_grad_norm))


class SessionSteps(transformers.TrainerCallback):
    """Lets the session say when a step begins, with the step's batches collated and on their way."""

    def __init__(self, session: Session, trainer: ExactTrainer, **also):
        self.session, self.trainer, self.also = session, trainer, also

    def on_step_begin(self, *_, **__):
        if not self.session.next_step():
            raise Ended
        self.trainer.step_losses = []

    def on_step_end(self, *_, **__):
        self.session.done(self.trainer.step_loss, **self.also)


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

    Rows are dicts in TRL's explicit format: prompt, chosen, rejected, images (other keys are dropped).
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
    data = datasets.Dataset.from_list([{key: row[key] for key in COLUMNS if key in row} for row in rows])
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


def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A tokenizer for rows that need none: it names the padding token, 0."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>"
    )


def step_settings(job: Job, folder: str) -> dict:
    """DPOConfig's arguments: TRL's defaults, but for what all contenders share and the option `best`."""
    options = job.options
    size, rest = options["batch_size"], job.pairs % options["batch_size"]
    if rest:
        raise ValueError(f"a step of {job.pairs} pairs is no whole number of batches of {size}")
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": job.pairs // size,
        "max_steps": ENDLESS,
        "learning_rate": job.learning_rate,
        "beta": BETA,
        "max_grad_norm": CLIP,
        "max_length": None,  # nobody's rows are cut
        "use_cpu": job.device == "cpu",
        "bf16": job.dtype == torch.bfloat16,
        **IN_ORDER,
    }
    if options["best"]:
        settings |= {
            "precompute_ref_log_probs": options.get("stored", True),
            "gradient_checkpointing": bool(options.get("checkpointing")),
            "use_liger_kernel": bool(options.get("liger")),
        }
    return settings | {name: job.keys[name] for name in KEYS if name in job.keys}


def make_job_trainer(cls: type, job: Job, settings: dict, reference: bool, config=trl.DPOConfig, **given):
    """A `cls` on the job's model; settings: the config's, given: the trainer's own. reference: with a model
    of its own for it, where no LoRA is switched off for that."""
    if job.options.get("liger"):
        require_liger(job.device)
    attention = flash_attention() if job.options.get("flash") else None
    model, lora = job.build(attention), job.lora_rank is not None
    trainer = cls(
        model,
        ref_model=job.build(attention) if reference and not lora else None,
        args=config(**settings),
        peft_config=job.lora_config(model) if lora else None,
        **given,
    )
    if lora:
        same_lora(trainer.model)
    return trainer


def make_token_trainer(job: Job, folder: str) -> TokenTrainer:
    """A DPOTrainer on the job's rows, in the job's order."""
    # To name its file of reference log-probs TRL copies all weights to the host and hashes them: minutes
    # for large models, and no part of a step. The name says what Job.build makes: other weights have another.
    weights = f"random weights of {job.bench_model.name}, {job.dtype}, {sorted(job.keys.items())}"
    rows = {"train_dataset": datasets.Dataset.from_list(job.all_rows), "processing_class": word_tokenizer()}
    with mock.patch.object(trl.trainer.dpo_trainer, "hash_module", lambda _: weights):
        settings = step_settings(job, folder)
        return make_job_trainer(
            TokenTrainer, job, settings, not settings.get("precompute_ref_log_probs"), **rows
        )


def train(message: dict, session: Session) -> None:
    job = job_of(message)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_token_trainer(job, folder)
        train_steps(trainer, session)


def train_steps(trainer: Exact, session: Session, **also) -> None:
    """Until the session says that it is enough; `also` is Session.done's."""
    trainer.add_callback(SessionSteps(session, trainer, **also))
    told = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    told += ("precompute_ref_log_probs", "use_liger_kernel", "bf16", "optim")
    facts = {name: getattr(trainer.args, name, None) for name in told}
    session.ready(attention=trainer.model.config._attn_implementation, **facts)
    trainer.train()


if __name__ == "__main__":
    serve(train)
