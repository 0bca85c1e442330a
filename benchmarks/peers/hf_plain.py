"""DPO on a Hugging Face model as tutorials write it, as a worker: padded rows, full logits, log-softmax.

Options: batch_size (pairs a microbatch); checkpointing. The reference's log-probs are computed once, and the
computation is under bf16 autocast on a GPU, as fastdpo's is: what is left is the plain way itself.
"""

import itertools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.peers.jobs import BETA, CLIP, Job, same_lora
from benchmarks.peers.session import Session, serve


def collate(rows: list[dict], device: str) -> dict[str, Tensor]:
    """[2B, L] each: the chosen rows and then the rejected ones, padded on the right."""
    pairs = [(r["prompt_ids"], r[key]) for key in ("chosen_ids", "rejected_ids") for r in rows]
    pad = lambda lists: pad_sequence([torch.tensor(x) for x in lists], batch_first=True).to(device)
    return {
        "input_ids": pad([prompt + response for prompt, response in pairs]),
        "attention_mask": pad([[1] * (len(prompt) + len(response)) for prompt, response in pairs]),
        "completion": pad([[0] * len(prompt) + [1] * len(response) for prompt, response in pairs]),
    }


def sequence_logps(model, batch: dict[str, Tensor]) -> Tensor:
    """log pi(response | prompt) of each row, f32[2B], from logits of every place."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    labels = batch["input_ids"][:, 1:, None]
    logps = logits.float().log_softmax(-1).gather(-1, labels)[..., 0]
    return (logps * batch["completion"][:, 1:]).sum(-1)


def dpo_loss(logps: Tensor, reference: Tensor) -> Tensor:
    """The mean over pairs of Rafailov et al. 2023, eq. 7."""
    chosen, rejected = (logps - reference).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def prepare(job: Job):
    """The model, with its LoRA where it has one."""
    model = job.build()
    if job.lora_rank is not None:
        from peft import get_peft_model

        model = get_peft_model(model, job.lora_config(model))
        same_lora(model)
    if job.options.get("checkpointing"):
        if job.lora_rank is not None:
            model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def train(message: dict, session: Session) -> None:
    job = Job(**message)
    model = prepare(job)
    size = job.options["batch_size"]
    cut = lambda step: [step[i : i + size] for i in range(0, len(step), size)]
    steps = [cut(step) for step in job.steps]
    with torch.no_grad(), job.autocast():  # a fresh LoRA changes nothing: the model is its own reference
        references = [[sequence_logps(model, collate(rows, job.device)) for rows in step] for step in steps]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)
    session.ready(attention=model.config._attn_implementation)
    for step, reference in itertools.cycle(list(zip(steps, references))):
        if not session.next_step():
            return
        losses = []
        for rows, reference_logps in zip(step, reference):
            with job.autocast():
                logps = sequence_logps(model, collate(rows, job.device))
            loss = dpo_loss(logps, reference_logps) * len(rows) / job.pairs
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        session.done(lambda losses=losses: torch.stack(losses).sum())


if __name__ == "__main__":
    serve(train)
