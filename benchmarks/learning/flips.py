"""Flipped pairs: held-out accuracy of DPO and Dr. DPO when a share of the training pairs is wrong.

The noise of Wu et al. 2024 (Dr. DPO), table 2: each training pair is swapped with this probability, the
held-out pairs are clean. The paper trains one epoch at beta 0.1, beta' 1; beside it four epochs, and beta 1.
"""

from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.frontiers import spread
from benchmarks.learning.plots import Curve, lines
from benchmarks.learning.train import Run, Sizes, settings

OBJECTIVES = {"DPO": "sigmoid", "Dr. DPO": "drdpo"}
SHARES = (0.0, 0.1, 0.2, 0.3, 0.4)
EPOCHS = (1, 4)
BETAS = (0.1, 1.0)


def runs(sizes: Sizes) -> list[Run]:
    """Five eighths of the rows, which leaves room for rows whose two samples are worth the same."""
    per_epoch = 5 * sizes.rows // 8 // settings().batch_size
    return [
        Run(
            "flips",
            f"{arm}, beta {beta:g}, {share:.0%}",
            settings(
                objective=name,
                beta=beta,
                flip_pairs=share,
                max_steps=EPOCHS[-1] * per_epoch,
                seed=seed,
            ),
            tuple(epochs * per_epoch for epochs in EPOCHS),
            ("accuracies",),
            rows=per_epoch * settings().batch_size,
            responses=2,
        )
        for seed in sizes.seeds
        for beta in BETAS
        for share in SHARES
        for arm, name in OBJECTIVES.items()
    ]


def summary(runs: list[Run], results: list[list[dict]]) -> dict:
    """Accuracy per beta, epochs, arm and share, one value a seed, in the order of the seeds."""
    out: dict = {}
    for run, found in zip(runs, results):
        arm, beta, share = run.arm.split(", ")
        for epochs, measured in zip(EPOCHS, found):
            case = out.setdefault(f"{beta}, {epochs} epoch{'s' * (epochs > 1)}", {})
            case.setdefault(arm, {}).setdefault(share, []).append(measured["accuracy"])
    for case in out.values():
        pairs = {share: zip(case["Dr. DPO"][share], values) for share, values in case["DPO"].items()}
        case["gain"] = {share: [robust - plain for robust, plain in both] for share, both in pairs.items()}
    return {"accuracy": out}


def tables(found: dict) -> list[Table]:
    table = Table("", "", *(f"{share:.0%} flipped" for share in SHARES))
    table.title, table.title_justify = "flips: accuracy on clean held-out pairs", "left"
    for case, arms in found["accuracy"].items():
        for arm, by_share in arms.items():
            sign = arm == "gain"
            table.add_row(case, arm, *(spread(values, sign) for values in by_share.values()))
    return [table]


def draw(name: str, found: dict, folder: Path) -> list[Path]:
    """Accuracy after one epoch and after the last, at the paper's beta."""
    paths = []
    for case in (f"beta {BETAS[0]:g}, 1 epoch", f"beta {BETAS[0]:g}, {EPOCHS[-1]} epochs"):
        arms = {arm: found["accuracy"][case][arm] for arm in OBJECTIVES}
        curves = [
            Curve(arm, [100 * share for share in SHARES], np.array(list(of.values())).T)
            for arm, of in arms.items()
        ]
        title = f"Accuracy on clean held-out pairs: {case}"
        parts = (f"{name}_{case}", title, "training pairs flipped, %", "accuracy")
        paths += lines(*parts, curves, folder)
    return paths
