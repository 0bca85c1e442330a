"""Curry-DPO's curriculum against one pair and all pairs a row, at equal optimizer steps.

Pattnaik et al. 2024 (arXiv 2403.07230): the best of four ranked responses against the worst, the middle one
and the second, a stage each, each stage's model the next one's reference. Beside it two controls: the same
with the first reference kept, and from hard to easy. Twice: on the start model's own samples, where the true
reward is known, and on ../shared's ranked responses with the model stories260K, where only accuracy is.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from benchmarks.figures import Bar, bars
from benchmarks.frontiers import spread
from benchmarks.learning.train import FULL, QUIET, Base, Groups, Run, Sizes, reference, settings
from fastdpo.data.groups import Limits
from fastdpo.data.load import load_groups
from fastdpo.data.packing import epoch_order
from fastdpo.model.policy import Policy
from fastdpo.records import Pair, PreferenceGroup

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
MODEL, RANKED = SHARED / "models" / "stories260K", SHARED / "ranked" / "ranked_responses.jsonl"
ARMS = {
    "one pair": "best_worst",
    "all pairs": "all",
    "curriculum": ("easy", "medium", "hard"),
    "curriculum, first reference": ("easy", "medium", "hard"),
    "hard to easy": ("hard", "medium", "easy"),
}
BETAS = (0.1, 1.0)
LONGEST = 96  # tokens of prompt and response of a ranked row
RANKED_STEPS, RANKED_HELD_OUT, RANKED_SEEDS = 24, 80, 3
RANKED_SETTINGS = {"batch_size": 8, "learning_rate": 1e-4}
COLUMNS = {
    "reviews": ("reward", "kl", "win", "accuracy", "accuracy_easy", "accuracy_hard"),
    "ranked": ("accuracy", "accuracy_easy", "accuracy_hard"),
}


def runs(sizes: Sizes) -> list[Run]:
    """On the start model's own samples."""
    measures = ("samples", "accuracies")
    return [
        Run(
            "curriculum",
            arm,
            with_pairs(arm, beta, seed, sizes.steps),
            (sizes.steps,),
            measures,
            **kept(arm),
        )
        for seed in sizes.seeds
        for beta in BETAS
        for arm in ARMS
    ]


def ranked_runs(sizes: Sizes) -> list[Run]:
    """On real ranked responses."""
    steps = min(RANKED_STEPS, sizes.steps)
    seeds = sizes.seeds[: RANKED_SEEDS if sizes == FULL else 1]
    return [
        Run(
            "ranked",
            arm,
            with_pairs(arm, BETAS[0], seed, steps, **RANKED_SETTINGS),
            (steps,),
            ("accuracies",),
            base="ranked",
            **kept(arm),
        )
        for seed in seeds
        for arm in ARMS
    ]


def with_pairs(arm: str, beta: float, seed: int, steps: int, **keys):
    """The arm's config; three stages share the steps."""
    rules = ARMS[arm]
    if isinstance(rules, str):
        return settings(beta=beta, seed=seed, pairs=rules, max_steps=steps, **keys)
    stages = [{"pairs": rule} for rule in rules]
    return settings(beta=beta, seed=seed, stages=stages, max_steps=steps // len(rules), **keys)


def kept(arm: str) -> dict:
    return {"keep_reference": arm.endswith("first reference")}


def ranked_absent() -> str | None:
    """Why the study of ranked responses is left out."""
    missing = [str(path) for path in (MODEL, RANKED) if not path.exists()]
    return f"not there: {', '.join(missing)}" if missing else None


def make_ranked_base(sizes: Sizes, seed: int) -> Base:
    """stories260K, and of each row with four responses or more four of them, from best to worst."""
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    policy = Policy(model.train(), torch.float32)
    policy.set_sharing(True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    limits = Limits(LONGEST)
    groups, _ = load_groups(str(RANKED), tokenizer, limits, strict=False, console=QUIET)
    groups = [four(group) for group in groups if len({r.score for r in group.responses}) >= 4]
    order = epoch_order(len(groups), seed, epoch=0)
    held_out = RANKED_HELD_OUT if sizes == FULL else sizes.held_out
    parts = [[groups[i] for i in some] for some in (order[held_out:], order[:held_out])]
    train: Groups = parts[0] if sizes == FULL else parts[0][: sizes.rows]
    return Base(policy, train, parts[1], reference(policy, train + parts[1]))


def four(group: PreferenceGroup) -> PreferenceGroup:
    """Four of the responses, evenly spaced by rank, and all six pairs."""
    ranked = sorted(group.responses, key=lambda response: -response.score)
    places = np.linspace(0, len(ranked) - 1, 4).round().astype(int)
    pairs = tuple(Pair(i, j) for i in range(4) for j in range(i + 1, 4))
    return replace(group, responses=tuple(ranked[i] for i in places), pairs=pairs)


def summary(runs: list[Run], results: list[list[dict]]) -> dict:
    """At the end of training, one value a seed, by beta and arm."""
    ends: dict = {}
    for run, found in zip(runs, results):
        arms = ends.setdefault(f"beta {run.config.beta:g}", {}).setdefault(run.arm, {})
        for name in COLUMNS[run.base]:
            arms.setdefault(name, []).append(found[-1][name])
    return {"end": ends}


def tables(title: str, found: dict) -> list[Table]:
    out = []
    for case, arms in found["end"].items():
        table = Table("", *next(iter(arms.values())), title=f"{title}, {case}", title_justify="left")
        for arm, values in arms.items():
            table.add_row(arm, *(spread(v) for v in values.values()))
        out.append(table)
    return out


def draw(name: str, title: str, column: str, found: dict, folder: Path) -> list[Path]:
    """Bars of the arms at the first beta: mean, and lowest and highest seed."""
    case, arms = next(iter(found["end"].items()))
    items = [
        Bar(arm, float(np.mean(of[column])), min(of[column]), max(of[column]), ours=arm == "curriculum")
        for arm, of in arms.items()
    ]
    return bars(name, f"{title}, {case}", column.replace("_", ", "), items, folder)
