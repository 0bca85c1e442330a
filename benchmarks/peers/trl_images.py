"""TRL's DPOTrainer on prompts with pictures, as a worker: its own collator, and the reference in every step,
since it refuses to store one where there are images. Options: batch_size, liger, flash, as in trl_dpo.py, and
patch: after fastdpo.integrations.trl.patch().

A step's clock begins when its batches are collated: TRL's pixels cost it nothing. How long they take is told
beside (`collating_seconds`: decoding, the processor and the tokens, by the main thread).
"""

import tempfile
import time

import datasets

import fastdpo.integrations.trl as fast
from benchmarks.peers.jobs import Job
from benchmarks.peers.session import Session, serve
from benchmarks.peers.towers import TowerWatch
from benchmarks.peers.trl_dpo import ExactTrainer, make_job_trainer, step_settings, train_steps
from benchmarks.pictures import processor, text_row


class PictureTrainer(ExactTrainer):
    """Knows how long the step's batches took to collate."""

    collating = 0.0

    def get_batch_samples(self, *args, **kwargs):
        begun = time.perf_counter()
        found = super().get_batch_samples(*args, **kwargs)
        self.collating = time.perf_counter() - begun
        return found


def make_picture_trainer(job: Job, folder: str) -> PictureTrainer:
    """A DPOTrainer on the job's rows, in the job's order."""
    if job.options.get("patch"):
        fast.patch()
    rows = datasets.Dataset.from_list([text_row(row) for row in job.all_rows])
    return make_job_trainer(
        PictureTrainer,
        job,
        step_settings(job, folder) | {"precompute_ref_log_probs": False},
        reference=True,
        train_dataset=rows.cast_column("images", datasets.List(datasets.Image())),
        processing_class=processor(job.bench_model),
    )


def train(message: dict, session: Session) -> None:
    job = Job(**message)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_picture_trainer(job, folder)
        watch = TowerWatch(*filter(None, (trainer.model, trainer.ref_model)))
        of_step = lambda seconds: {"collating_seconds": trainer.collating, **watch.taken()}
        train_steps(trainer, session, also=of_step)


if __name__ == "__main__":
    serve(train)
