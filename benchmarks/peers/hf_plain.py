"""DPO on a Hugging Face model as tutorials write it, as a worker: padded rows, full logits, log-softmax.

Options: batch_size (pairs a microbatch); checkpointing. The reference's log-probs are computed once, and the
computation is under bf16 autocast on a GPU, as fastdpo's is: what is left is the plain way itself.
"""

import itertools
import os
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.peers.jobs import BETA, CLIP, Job, same_lora
from benchmarks.peers.session import Session, serve


def collate(rows: list[dict], device: str) -> dict[str, Tensor]:
    """[2B, L] each: the chosen rows and then the rejected ones, padded on the right."""
    return padded([(r["prompt_ids"], r[key]) for key in ("chosen_ids", "rejected_ids") for r in rows], device)


def padded(pairs: list[tuple[list[int], list[int]]], device: str) -> dict[str, Tensor]:
    """[R, L] each, of (prompt, response)."""
    pad = lambda lists: pad_sequence([torch.tensor(x) for x in lists], batch_first=True).to(device)
    return {
        "input_ids": pad([prompt + response for prompt, response in pairs]),
        "attention_mask": pad([[1] * (len(prompt) + len(response)) for prompt, response in pairs]),
        "completion": pad([[0] * len(prompt) + [1] * len(response) for prompt, response in pairs]),
    }


def token_logps(model, batch: dict[str, Tensor]) -> Tensor:
    """Of each place, f32[R, L - 1], 0 outside of the responses, from logits of every place."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits[:, :-1]
    labels = batch["input_ids"][:, 1:, None]
    logps = logits.float().log_softmax(-1).gather(-1, labels)[..., 0]
    return logps * batch["completion"][:, 1:]


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

    def part(rows: list[dict], logps: Tensor, reference: Tensor) -> Tensor:
        return dpo_loss(logps.sum(-1), reference.sum(-1)) * len(rows) / job.pairs

    train_on(job, job.steps, lambda rows: collate(rows, job.device), part, session)


def train_on(
    job: Job,
    steps: list[list],
    collated: Callable[[list], dict[str, Tensor]],
    part: Callable[[list, Tensor, Tensor], Tensor],
    session: Session,
) -> None:
    """Steps over and over, in microbatches of the option batch_size. part(rows, token_logps, the
    reference's): a microbatch's part of the step's loss."""
    model, size = prepare(job), job.options["batch_size"]
    cut = [[step[i : i + size] for i in range(0, len(step), size)] for step in steps]
    with torch.no_grad(), job.autocast():  # a fresh LoRA changes nothing: the model is its own reference
        references = [[token_logps(model, collated(rows)) for rows in step] for step in cut]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=job.learning_rate, weight_decay=0.0, fused=True)
    session.ready(attention=model.config._attn_implementation)
    for step, reference in itertools.cycle(list(zip(cut, references))):
        if not session.next_step():
            return
        losses = []
        for rows, reference_logps in zip(step, reference):
            with job.autocast():
                logps = token_logps(model, collated(rows))
            loss = part(rows, logps, reference_logps)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        session.done(lambda losses=losses: torch.stack(losses).sum())


if __name__ == "__main__":
    serve(train)
