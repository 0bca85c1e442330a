"""Do the optimizers that save memory learn what AdamW learns? On a CPU, in minutes.

    python -m benchmarks.learning.optimizers [--quick]

The start models and the ranked samples are run.py's. Every arm trains on the same rows in the same order;
what is compared is the held-out loss at the end, and the yardstick is how far AdamW's own seeds (of the
data's order, from one start model) are apart.
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, replace

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.learning.train import FULL, QUICK, Base, Sizes, make_base, reference, settings
from benchmarks.results import write_result
from fastdpo.data.pairs import select_pairs
from fastdpo.errors import ConfigError
from fastdpo.model.policy import Policy
from fastdpo.optim.library import check_library
from fastdpo.optim.optimizers import make_optimizer
from fastdpo.records import ResponseLogps
from fastdpo.training.job import stage_job
from fastdpo.training.stage import Progress, Stage, step_groups

ADAMW = "adamw_torch_fused"
IN_BACKWARD, OFFLOADED = dict(optimizer_in_backward=True), dict(offload_optimizer=True)
BF16 = dict(pure_bf16=True, dtype="auto")
ARMS = {
    ADAMW: {},
    "adamw_8bit": dict(optim="adamw_8bit"),
    "adamw_torch_8bit": dict(optim="adamw_torch_8bit"),
    "adamw_torch_4bit": dict(optim="adamw_torch_4bit"),
    "adafactor": dict(optim="adafactor"),
    "in backward": IN_BACKWARD,
    "offloaded": OFFLOADED,
    "pure_bf16": BF16,
    "pure_bf16, in backward, offloaded": BF16 | IN_BACKWARD | OFFLOADED,
    "pure_bf16, 8 bits, in backward": BF16 | IN_BACKWARD | dict(optim="adamw_8bit"),
}
SEEDS = (0, 1, 2, 3, 4)


def train(policy: Policy, stage: Stage) -> Iterator[float]:
    """Trains a stage to its end; yields each step's loss."""
    optimizer, schedule = make_optimizer(policy, stage.job.optim, stage.total)
    with closing(optimizer):
        for number, groups in enumerate(step_groups(stage.groups, stage.job, stage.total), 1):
            progress = Progress()
            stage.step(groups, progress, number, optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            yield progress.window.sums.means()["loss"]


@torch.no_grad()
def held_out_loss(stage: Stage) -> float:
    batches = stage.in_row_order(stage.eval_groups)
    return float(stage.objective.whole(ResponseLogps.joined([stage.score(batch) for batch in batches])))


def learn(base: Base, sizes: Sizes, seed: int, keys: dict) -> dict:
    """One training: {"losses": of each step, "held_out": the loss at the end}."""
    config = settings(max_steps=sizes.steps, max_grad_norm=0, seed=seed, **keys)
    policy = base.start()
    if config.pure_bf16:
        policy = Policy(policy.model.to(torch.bfloat16), torch.bfloat16)
        policy.set_sharing(True)
    rows, _ = select_pairs([group for group in base.groups if group.pairs], "best_worst")
    held_out, _ = select_pairs([group for group in base.held_out if group.pairs], "best_worst")
    stage = Stage(stage_job(config), policy, rows, held_out)
    stage.reference = reference(policy, rows + held_out)
    losses = list(train(policy, stage))
    return {"losses": losses, "held_out": held_out_loss(stage)}


def measure(sizes: Sizes, arms: dict, seeds=SEEDS) -> dict:
    """AdamW on every seed and the arms on the first: held-out losses, AdamW's spread, each arm's distance."""
    base = make_base(sizes, seed=0)
    adamw = [learn(base, sizes, seed, {}) for seed in seeds]
    ends = [found["held_out"] for found in adamw]
    out = {"adamw": adamw, "spread": max(ends) - min(ends), "arms": {}, "skipped": {}}
    for name, keys in arms.items():
        try:
            check_library(settings(max_grad_norm=0, **keys))
        except ConfigError as error:
            out["skipped"][name] = str(error)
            continue
        found = learn(base, sizes, seeds[0], keys)
        curve = [(a - b) ** 2 for a, b in zip(found["losses"], adamw[0]["losses"])]
        out["arms"][name] = found | {
            "apart": abs(found["held_out"] - ends[0]),
            "curve_apart": math.sqrt(sum(curve) / len(curve)),
        }
    return out


def table(found: dict) -> Table:
    out = Table("arm", "held-out loss", "from AdamW's", title="same rows, same order")
    for name, arm in found["arms"].items():
        out.add_row(name, f"{arm['held_out']:.4f}", f"{arm['apart']:.1e}")
    out.caption = f"AdamW's {len(found['adamw'])} seeds are {found['spread']:.1e} apart"
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="everything tiny: the numbers mean nothing")
    sizes = QUICK if parser.parse_args().quick else replace(FULL, rows=384, held_out=128, steps=48)
    torch.set_num_threads(1)
    torch.compiler.set_stance("force_eager")  # torchao's step: minutes of C++ for the same formula
    found = measure(sizes, ARMS)
    Console().print(table(found))
    write_result("learning_optimizers", {"sizes": asdict(sizes)} | found)


if __name__ == "__main__":
    main()
