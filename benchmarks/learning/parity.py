"""Does it learn the same as TRL? The same rows in the same order, the same start weights and optimizer.

    python -m benchmarks.learning.parity [--dry-run] [--out DIR]   in fp32 on this machine: 50 steps, 3 orders

In fp32 the loss of every step must be TRL's within LIMIT, and fall. In bf16 (benchmarks.gpu.parity) rounding
makes the curves drift apart; their distance is then held against that between TRL's own runs on other orders
of the rows. The rows are the demo's: polite and rude answers, so that there is something to learn.
"""

import contextlib
import copy
import io
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from benchmarks.figures import Band, curves
from benchmarks.results import stage_arguments, write_result
from fastdpo.config.keys import Config
from fastdpo.data.groups import Limits
from fastdpo.data.load import load_groups
from fastdpo.data.packing import epoch_order
from fastdpo.demo import make_model, write_data
from fastdpo.model import support
from fastdpo.model.policy import Policy
from fastdpo.optim.optimizers import make_optimizer
from fastdpo.reference.fill import load_reference
from fastdpo.training.job import stage_job
from fastdpo.training.stage import Progress, Stage

LIMIT = 1e-4  # of a step's loss, in fp32
FALL = 0.05  # what a loss must fall by: one that stays where it is agrees with anything
BETA, BATCH, ACCUMULATION, MAX_LENGTH = 0.1, 8, 2, 256
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Setting:
    """One comparison: the start weights, the optimizer's steps, the dtype."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dtype: torch.dtype
    rate: float
    steps: int


@dataclass
class Run:
    """What one trainer did: an entry a step; the first step's margin; the weights after the last."""

    losses: list[float]
    grad_norms: list[float]
    first_margin: float  # beta x (chosen - rejected log-ratio), the mean of the first step's pairs
    weights: dict[str, torch.Tensor]


def demo_start(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The demo's model and tokenizer."""
    make_model(folder)
    tokenizer = without_space_after_turns(AutoTokenizer.from_pretrained(folder))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tokenizer


def without_space_after_turns(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """TRL scores white space after the end of a turn, and fastdpo does not: here there is none."""
    template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.chat_template = template.replace("'<|im_end|>' + '\n'", "'<|im_end|>'")
    return tokenizer


def demo_rows(folder: Path, n: int, seed: int) -> list[dict]:
    """n pairs, in the order of a seed."""
    write_data(folder / "data")
    rows = [json.loads(line) for line in (folder / "data/train.jsonl").read_text().splitlines()]
    return [rows[i] for i in itertools.islice(_forever(len(rows), seed), n)]


def _forever(size: int, seed: int):
    for epoch in itertools.count():
        yield from epoch_order(size, seed, epoch)


def ours(setting: Setting, rows: list[dict], folder: Path) -> Run:
    """fastdpo's steps over the rows as they come."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups, _ = load_groups(str(path), setting.tokenizer, Limits(MAX_LENGTH), strict=False, console=QUIET)
    if len(groups) != len(rows):
        raise ValueError(f"{len(rows) - len(groups)} of {len(rows)} rows did not become groups")
    config = Config(
        model="in memory",
        data=str(path),
        beta=BETA,
        batch_size=BATCH,
        learning_rate=setting.rate,
        lr_scheduler_type="constant",
        max_tokens=1024,
        max_steps=setting.steps,
        reference_cache="off",
    )
    policy = Policy(copy.deepcopy(setting.model).train(), setting.dtype)
    support.prepare(policy, groups, QUIET)
    stage = Stage(stage_job(config), policy, groups, [])
    options = dict(path=None, fresh_lora=False, max_tokens=config.max_tokens, console=QUIET)
    stage.reference = load_reference(policy, [stage.groups], **options)
    optimizer, schedule = make_optimizer(policy, config, setting.steps)
    run = Run([], [], math.nan, {})
    for i in range(setting.steps):
        progress = Progress()
        norm = stage.step(stage.groups[i * BATCH : (i + 1) * BATCH], progress, i + 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        means = progress.window.sums.means()
        run.losses.append(means["loss"])
        run.grad_norms.append(float(norm))
        if i == 0:
            run.first_margin = means["rewards/margins"]
    run.weights = {name: p.detach() for name, p in policy.model.named_parameters()}
    return run


def theirs(setting: Setting, rows: list[dict], folder: Path) -> Run:
    """TRL's, on the same rows in the same order. ImportError where TRL is not installed."""
    from benchmarks.peers.trl_dpo import make_trainer, run_training

    model = copy.deepcopy(setting.model)
    trainer = make_trainer(
        model,
        setting.tokenizer,
        rows,
        batch_size=BATCH // ACCUMULATION,
        accumulation=ACCUMULATION,
        max_steps=setting.steps,
        learning_rate=setting.rate,
        output_dir=folder / "trl",
        beta=BETA,
        max_length=MAX_LENGTH,
        use_cpu=model.device.type == "cpu",
        bf16=setting.dtype == torch.bfloat16,
    )
    first = _FirstMargin(trainer)
    trainer.add_callback(first)
    run = run_training(trainer)
    return Run(run.losses, run.grad_norms, first.margin, run.weights)


class _FirstMargin(TrainerCallback):
    """TRL's own margin of the first step, before the trainer logs and forgets it."""

    def __init__(self, trainer):
        self.trainer, self.margin = trainer, math.nan

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 1:
            self.margin = float(np.mean(self.trainer._metrics["train"]["rewards/margins"]))


def compare(setting: Setting, seed: int) -> dict:
    """Both trainers over one order of the rows, and how far apart they end."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        rows = demo_rows(folder, setting.steps * BATCH, seed)
        a = ours(setting, rows, folder)
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            b = theirs(setting, rows, folder)  # TRL's bars say nothing here
    start = dict(setting.model.named_parameters())
    trl = {name: b.weights[name] for name in start}  # which keeps a second adapter for the reference
    return {
        "losses": a.losses,
        "trl_losses": b.losses,
        "largest_difference": max(abs(x - y) for x, y in zip(a.losses, b.losses)),
        "grad_norms": a.grad_norms,
        "trl_grad_norms": b.grad_norms,
        "first_margin": a.first_margin,
        "trl_first_margin": b.first_margin,
        "weights_difference": _distance(a.weights, trl) / _distance(trl, start),
    }


def _distance(a: dict, b: dict) -> float:
    """||a - b|| over all weights."""
    return math.sqrt(sum(float((a[n].detach().double() - b[n].detach().double()).square().sum()) for n in a))


def summarise(setting: Setting, seeds: dict[int, dict]) -> dict:
    """All orders together, and whether the trainers learn the same (None: not known)."""
    losses, trl = (np.array([run[key] for run in seeds.values()]) for key in ("losses", "trl_losses"))
    largest = float(np.abs(losses - trl).max())
    # apart: ours from TRL's on the same order; spread: TRL's from TRL's on another, on average over steps
    apart = float(np.abs(losses - trl).mean())
    others = [np.abs(x - y).mean() for x, y in itertools.combinations(trl, 2)]
    spread = float(np.mean(others)) if others else None
    fp32 = setting.dtype == torch.float32
    count = sum(p.numel() for p in setting.model.parameters())
    fell = float((trl[:, 0] - trl[:, -1]).mean())
    same = bool(fell >= FALL and (largest <= LIMIT if fp32 else spread is None or apart <= spread))
    return {
        "same": None if same and not fp32 and spread is None else same,  # one order alone says nothing
        "dtype": str(setting.dtype).split(".")[1],
        "device": setting.model.device.type,
        "model": f"{type(setting.model).__name__} of {count / 1e6:,.1f} M weights",
        "settings": {"steps": setting.steps, "pairs": BATCH, "learning_rate": setting.rate, "beta": BETA},
        "largest_difference": largest,
        "mean_difference": apart,
        "mean_difference_between_orders": spread,
        "fell_by": fell,
        "seeds": {str(seed): run for seed, run in seeds.items()},
    }


def measure(
    setting: Setting, orders: int, until: float, keep: Callable[[dict], None] = lambda result: None
) -> dict:
    """`orders` comparisons; none is begun after `until`, by time.monotonic. `keep` is given what there is to
    say after each."""
    seeds = {}
    told = lambda: summarise(setting, seeds) | {"no_time_for": [str(s) for s in range(len(seeds), orders)]}
    for seed in range(orders):
        if seeds and time.monotonic() > until:
            break
        seeds[seed] = compare(setting, seed)
        print(f"order {seed}: losses differ by at most {seeds[seed]['largest_difference']:.1e}", flush=True)
        keep(told())
    return told()


def tell(name: str, r: dict) -> str:
    """A result in a few lines."""
    run = next(iter(r["seeds"].values()))
    verdict = {True: "the same as TRL", False: "NOT the same as TRL", None: "one order only: no verdict"}
    lines = [
        f"{name} ({r['model']}): {verdict[r['same']]}",
        f"  loss fell by {r['fell_by']:.3f}; a step differs by {r['largest_difference']:.1e} at most, "
        f"{r['mean_difference']:.1e} on average",
        f"  first step's margin {run['first_margin']:.2g}, TRL's {run['trl_first_margin']:.2g}; weights "
        f"{run['weights_difference']:.1e} apart, of how far they moved",
    ]
    if r["mean_difference_between_orders"] is not None:
        lines.append(f"  TRL's runs on other orders are {r['mean_difference_between_orders']:.1e} apart")
    return "\n".join(lines)


def record(results: dict, out: Path, quiet: bool = False) -> Path:
    return write_result("parity", {"limit": LIMIT, "results": results}, out, quiet)


def write(results: dict, out: Path) -> int:
    """Tells, writes the JSON and its figures; 1 where any is not the same."""
    path = record(results, out)
    for name, r in results.items():
        print(tell(name, r))
        bands = [
            Band(label, [run[key] for run in r["seeds"].values()])
            for label, key in (("fastdpo", "losses"), ("TRL 1.16", "trl_losses"))
        ]
        title = f"Loss over {len(r['seeds'])} orders of the rows, {name}"
        curves(f"{path.stem}_{name}", title, "optimizer step", "DPO loss", bands, out)
    return 1 if any(r["same"] is False for r in results.values()) else 0


def small_setting(folder: Path, device: str, dtype: torch.dtype, steps: int) -> Setting:
    """The demo's small Llama, where rounding to fp32 alone separates the trainers."""
    model, tokenizer = demo_start(folder)
    return Setting(model.to(device), tokenizer, dtype, 3e-5, steps)


def main() -> int:
    args = stage_arguments(__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    until = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        setting = small_setting(Path(folder), device, torch.float32, 3 if args.dry_run else 50)
        result = measure(setting, 1 if args.dry_run else 3, until)
    code = write({"fp32": result}, args.out)
    return 0 if args.dry_run else code  # of three steps nothing can be said


if __name__ == "__main__":
    sys.exit(main())
