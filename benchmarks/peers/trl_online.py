"""The training part of TRL's OnlineDPOTrainer, as a worker: its own training_step, given what was sampled.

It takes two completions a prompt and no more: here the best and the worst of a round's. It stores no
reference, so the model and its reference each go over prompt and completion, with a prompt a completion.
Options: pairs (best_worst); batch_size (prompts a microbatch), liger, flash, checkpointing, as in trl_dpo.py.
"""

import tempfile

import datasets
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from trl.experimental.online_dpo import OnlineDPOConfig, OnlineDPOTrainer

from benchmarks.peers.jobs import RoundJob
from benchmarks.peers.session import Session, serve
from benchmarks.peers.trl_dpo import Exact, make_job_trainer, step_settings, train_steps, word_tokenizer

ANY_LENGTH = 100_000  # nobody's rows are cut


class GivenTrainer(Exact, OnlineDPOTrainer):
    """Samples nothing: a prompt is the number of one of `rows`, whose completions are there."""

    rows: list[dict]

    def _generate(self, model, prompts, images=None):
        """What TRL's own returns: prompts padded on the left, completions on the right, all first ones before
        all second ones."""
        rows = [self.rows[int(prompt)] for prompt in prompts]
        prompts = self.padded([row["prompt_ids"] for row in rows] * 2, "left")
        both = [row[key] for key in ("chosen_ids", "rejected_ids") for row in rows]
        return *prompts, *self.padded(both, "right"), None

    def padded(self, ids: list[list[int]], side: str) -> tuple[Tensor, Tensor]:
        """(ids, mask)"""
        pad = lambda some: pad_sequence(some, batch_first=True, padding_side=side).to(self.accelerator.device)
        tensors = [torch.tensor(one) for one in ids]
        return pad(tensors), pad([torch.ones_like(one) for one in tensors])


def first_is_better(prompts: list[str], **_) -> list[float]:
    """The reward of each completion."""
    half = len(prompts) // 2
    return [1.0] * half + [0.0] * half


def make_online_trainer(job: RoundJob, folder: str) -> GivenTrainer:
    """An OnlineDPOTrainer on the job's prompts, in the job's order."""
    settings = step_settings(job, folder) | {"max_length": ANY_LENGTH}
    settings.pop("precompute_ref_log_probs")
    trainer = make_job_trainer(
        GivenTrainer,
        job,
        settings,
        reference=False,  # it makes a copy of the model itself
        config=OnlineDPOConfig,
        reward_funcs=first_is_better,
        train_dataset=datasets.Dataset.from_list([{"prompt": str(n)} for n in range(len(job.all_rows))]),
        processing_class=word_tokenizer(),
    )
    trainer.rows = job.all_rows
    return trainer


def train(message: dict, session: Session) -> None:
    with tempfile.TemporaryDirectory() as folder:
        train_steps(make_online_trainer(RoundJob(**message), folder), session)


if __name__ == "__main__":
    serve(train)
