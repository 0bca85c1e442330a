"""Reward against KL: the frontiers of DPO, IPO, ODPO and Dr. DPO, and ODPO against DPO by how many pairs.

Frontier: as Rafailov et al. 2023, figure 2 (left): a grid of beta, measured several times during training, on
four samples a prompt and all their pairs. Number of pairs: as Amini et al. 2024, one pair a prompt.
"""

from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.frontiers import Points, pareto, reward_at, spread
from benchmarks.learning.plots import Curve, lines
from benchmarks.learning.train import FULL, Run, Sizes, settings

OBJECTIVES = {"DPO": "sigmoid", "IPO": "ipo_sum", "ODPO": "odpo", "Dr. DPO": "drdpo"}
KLS = (0.25, 0.5, 1.0, 2.0)  # nats a completion
HIGHEST = 3.0  # nats, in the plots
SEEDS = 3
PAIRS = (30, 100, 300)


def frontier_runs(sizes: Sizes) -> list[Run]:
    return [
        Run(
            "frontier",
            arm,
            settings(objective=name, beta=beta, max_steps=sizes.steps, seed=seed),
            thirds(sizes),
            ("samples",),
        )
        for seed in sizes.seeds[:SEEDS]
        for arm, name in OBJECTIVES.items()
        for beta in sizes.betas
    ]


def odpo_runs(sizes: Sizes) -> list[Run]:
    """Equal optimizer steps for each number of pairs, as in the authors' code."""
    return [
        Run(
            "odpo",
            f"{arm}, {n} pairs",
            settings(objective=OBJECTIVES[arm], beta=beta, max_steps=sizes.steps, seed=seed),
            thirds(sizes)[1:],
            ("samples",),
            rows=n,
            responses=2,
        )
        for seed in sizes.seeds
        for n in numbers_of_pairs(sizes)
        for arm in ("DPO", "ODPO")
        for beta in sizes.betas
    ]


def numbers_of_pairs(sizes: Sizes) -> tuple[int, ...]:
    return PAIRS if sizes.rows >= FULL.rows else (10, 20)


def thirds(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.steps // 3, 2 * sizes.steps // 3, sizes.steps)


def points_of(runs: list[Run], results: list[list[dict]]) -> dict[str, dict[int, Points]]:
    """Per arm and seed the (KL, reward) of all betas and marks."""
    out: dict[str, dict[int, Points]] = {}
    for run, found in zip(runs, results):
        points = out.setdefault(run.arm, {}).setdefault(run.seed, [])
        points += [(measured["kl"], measured["reward"]) for measured in found]
    return out


def summary(runs: list[Run], results: list[list[dict]]) -> dict:
    """Per arm and KL the reward of each seed's frontier, and its difference to DPO's (on as many pairs)."""
    points, rewards, gains = points_of(runs, results), {}, {}
    for arm, by_seed in points.items():
        rivals = points[arm.replace(arm.split(",")[0], "DPO")]
        for kl in KLS:
            found = {seed: reward_at(some, kl) for seed, some in by_seed.items()}
            theirs = {seed: reward_at(rivals[seed], kl) for seed in by_seed}
            rewards.setdefault(arm, {})[f"{kl:g}"] = [r for r in found.values() if r is not None]
            both = [seed for seed in found if found[seed] is not None and theirs[seed] is not None]
            gains.setdefault(arm, {})[f"{kl:g}"] = [found[seed] - theirs[seed] for seed in both]
    gains = {arm: of for arm, of in gains.items() if not arm.startswith("DPO")}
    return {"reward_at_kl": rewards, "gain_over_dpo_at_kl": gains, "points": points}


def tables(title: str, found: dict) -> list[Table]:
    """Rewards at the KLs, and the gains over DPO, each with its spread over the seeds."""
    out = []
    heads = {"reward_at_kl": f"{title}: mean reward at a KL (nats)"}
    heads["gain_over_dpo_at_kl"] = f"{title}: reward minus DPO's at the same KL and seed"
    for name, head in heads.items():
        table = Table("", *(f"KL {kl:g}" for kl in KLS), title=head, title_justify="left")
        for arm, by_kl in found[name].items():
            table.add_row(arm, *(spread(values, sign=name.startswith("gain")) for values in by_kl.values()))
        out.append(table)
    return out


def draw(name: str, title: str, found: dict, folder: Path) -> list[Path]:
    """Each arm's mean frontier, and the band of its seeds, over the KLs that all its seeds reach."""
    curves = []
    for arm, by_seed in found["points"].items():
        kls = [[kl for kl, _ in points] for points in by_seed.values()]
        low, high = max(map(min, kls)), min(HIGHEST, *map(max, kls))
        x = np.linspace(low, max(low, high), 60)
        ys = [np.interp(x, *zip(*pareto(points))) for points in by_seed.values()]
        curves.append(Curve(arm, x, np.array(ys)))
    return lines(name, title, "KL(policy || start model), nats a completion", "mean reward", curves, folder)
