"""Does a model learn more from its own answers of the moment than from as many that were sampled before?

    python -m benchmarks.learning.online [--dry-run] [--out DIR] [--work DIR] [--minutes M]

The demo's task with a reward (dishes.py). All arms have the same prompts, as many steps and, but for the
given pairs, as many answers to each prompt; they differ in how many rounds these come in: one round is
offline DPO on the start model's own ranked answers. A LoRA, whose base is every arm's reference. Each arm has
the best of its own learning rates, tried on a seed that is not reported. What has ended is in the JSON at
once, and a later command of the same day and commit goes on there.
"""

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from rich.console import Console

import fastdpo
from benchmarks.figures import Bar, bars
from benchmarks.learning import dishes
from benchmarks.learning.dishes import LONGEST
from benchmarks.results import result_of_today, stage_arguments, stage_parser, write_result
from benchmarks.tables.online_blocks import ends_of, online
from fastdpo.data.groups import Limits
from fastdpo.data.load import load_groups
from fastdpo.evaluation.kl import sequence_kl
from fastdpo.model.loading import load_policy, load_tokenizer
from fastdpo.model.spec import ModelSpec
from fastdpo.sampling.sampled import sampled
from fastdpo.training import checkpoint

QUIET = Console(quiet=True)
UNREPORTED = 99  # the seed that rates are chosen on
RANK, BATCH, RESPONSES, NEW_TOKENS = 16, 12, 4, 48
COMMON = {"lora_rank": RANK, "batch_size": BATCH, "warmup_steps": 2, "max_length": LONGEST, "dtype": "fp32"}
COMMON |= {"samples": 0, "data_cache": "off", "reference_cache": "off", "save_total_limit": 1}
ROUNDS: dict[str, dict[str, Any]] = {  # the arms that sample: their config's keys; rounds 0: one a step
    "offline DPO, own answers": {"rounds": 1},
    "online DPO, 6 rounds": {"rounds": 6},
    "online DPO, a round a step": {"rounds": 0},
    "rloo, 6 rounds": {"rounds": 6, "objective": "rloo"},
    "DR-PO (rloo, resets), 6 rounds": {"rounds": 6, "objective": "rloo", "resets": 1.0},
}
GIVEN = "offline DPO, given pairs"
ARMS = (*list(ROUNDS)[:2], GIVEN, *list(ROUNDS)[2:])  # the first ones first, where time is short
Job = tuple[str, float, int]  # arm, learning rate, seed


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    sft_steps: int = 270
    times: int = 6  # that each of the 72 questions is asked
    seeds: tuple[int, ...] = (0, 1, 2)
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)  # halved for the given pairs, which are further apart
    measured: int = 16  # answers to each held-out question
    arms: tuple[str, ...] = ARMS
    reward: str = "score"  # of dishes.py

    @property
    def steps(self) -> int:
        return 72 * self.times // BATCH


DRY = Sizes(3, 1, seeds=(0,), rates=(1e-3,), measured=1, arms=(*ARMS[:3], ARMS[-1]), reward="letters")


def keys(place: Path, sizes: Sizes, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """An arm's config, as a user would write it."""
    name = "".join(c if c.isalnum() else "-" for c in f"{arm} {rate:g} {seed}")
    own = {"model": str(place / "start/model"), "output_dir": str(place / "runs" / name), "seed": seed}
    own |= {"learning_rate": rate, "overwrite": True}
    if arm == GIVEN:
        return COMMON | own | {"data": str(place / "data/train.jsonl"), "max_steps": sizes.steps}
    keys = dict(ROUNDS[arm])
    rounds = keys.pop("rounds") or sizes.steps
    sample = {"prompts": 72 * sizes.times // rounds, "responses": RESPONSES, "max_new_tokens": NEW_TOKENS}
    sample |= {"resets": keys.pop("resets")} if "resets" in keys else {}
    own |= {
        "data": str(place / "data/asked.jsonl"),
        "reward": f"{dishes.FILE}:{sizes.reward}",
        "reference": "start",
    }
    return COMMON | own | {"rounds": rounds, "sample": sample} | keys


def trained(place: Path, sizes: Sizes, arm: str, rate: float, seed: int) -> dict[str, Any]:
    """What a run ends with on held-out questions, and its rounds on the way."""
    run = fastdpo.train(keys(place, sizes, arm, rate, seed), QUIET)
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    rounds = [one for one in events if one["event"] == "round"]
    (last,) = (run / "checkpoints").glob("step-*")
    found = measured(place, sizes, last, 1000 + seed) | {"steps": int(last.name.split("-")[1])}
    if rounds:
        found["scores"] = [one["objective/scores"] for one in rounds]
        found["prompts"], found["no_signal"] = (
            sum(one[k] for one in rounds) for k in ("prompts", "no_signal")
        )
    return found


def measured(place: Path, sizes: Sizes, step: Path | None, seed: int) -> dict[str, float]:
    """Of fresh answers to held-out questions: mean reward, exact KL to the start model in nats an answer, and
    the shares of helpful and of unknown ones. step: a checkpoint's folder; None: the start model."""
    model = ModelSpec(model=str(place / "start/model"), max_length=LONGEST, lora_rank=RANK)
    policy, tokenizer = load_policy(model, QUIET), load_tokenizer(model)
    policy.set_sharing(True)
    if step:
        checkpoint.load(step).load_weights(policy)
    options = dict(strict=True, console=QUIET, data_cache="off")
    groups, _ = load_groups(str(place / "data/held-out.jsonl"), tokenizer, Limits(LONGEST), **options)
    how = dict(per_prompt=sizes.measured, seed=seed, max_new_tokens=NEW_TOKENS)
    answered = sampled(policy, tokenizer, groups, **how)
    text = lambda ids: tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
    said = [(text(group.prompt), text(r.ids)) for group in answered for r in group.responses]
    rewards = np.array(dishes.score(*zip(*said, strict=True)))
    kl = sequence_kl(policy, None, answered)
    shares = {"helpful": (rewards >= 4).mean(), "unknown": (rewards == 0).mean()}
    return {name: float(v) for name, v in ({"reward": rewards.mean(), "kl": np.mean(kl)} | shares).items()}


def tries(sizes: Sizes, arm: str) -> list[Job]:
    """What an arm's rate is chosen by."""
    return [(arm, rate / 2 if arm == GIVEN else rate, UNREPORTED) for rate in sizes.rates]


class Study:
    """The record, and the processes that fill it, an arm after the other."""

    def __init__(self, sizes: Sizes, work: Path, out: Path, workers: int, until: float):
        self.sizes, self.work, self.out, self.workers, self.until = sizes, work, out, workers, until
        about = {"sizes": asdict(sizes) | {"responses": RESPONSES, "batch_size": BATCH, "steps": sizes.steps}}
        about |= {"common": COMMON, "worth": dishes.WORTH}
        about = json.loads(json.dumps(about))  # as it is read again
        found = result_of_today("online", out) or {}
        same = all(found.get(key) == value for key, value in about.items())
        kept = found if same and (work / "start/model").exists() else {}
        self.record = about | {key: kept.get(key, {}) for key in ("start", "rates", "arms")}
        self.record["seconds"] = kept.get("seconds", 0)
        self.began = time.monotonic() - self.record["seconds"]

    def run(self) -> bool:
        """Whether all is there at its end."""
        sizes, work = self.sizes, self.work
        if not (work / "start/model").exists():
            dishes.make_start(work, 0, sizes.sft_steps, sizes.times)
        if not self.record["start"]:
            self.record["start"] = measured(work, sizes, None, 1000)
            self.write()
        running: dict[Future, Job] = {}
        context = get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, torch.set_num_threads, (1,)) as pool:
            while True:
                new = (job for job in self.jobs() if job not in running.values())
                in_time = time.monotonic() < self.until
                while in_time and len(running) < self.workers and (job := next(new, None)):
                    running[pool.submit(trained, work, sizes, *job)] = job
                if not running:
                    return not any(self.jobs())
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    self.add(running.pop(future), future.result())

    def jobs(self) -> Iterator[Job]:
        """What is left, as far as rates are known."""
        sizes, seen = self.sizes, self.record["rates"]
        for arm in sizes.arms:
            left = [job for job in tries(sizes, arm) if f"{job[1]:g}" not in seen.get(arm, {})]
            yield from left
            if not left:
                best = max(seen[arm].values(), key=lambda found: found["reward"])["learning_rate"]
                there = self.record["arms"].get(arm, {})
                yield from ((arm, best, seed) for seed in sizes.seeds if str(seed) not in there)

    def add(self, job: Job, found: dict[str, Any]) -> None:
        arm, rate, seed = job
        of, name = ("rates", f"{rate:g}") if seed == UNREPORTED else ("arms", str(seed))
        self.record[of].setdefault(arm, {})[name] = {"learning_rate": rate} | found
        print(f"{arm}, rate {rate:g}, seed {seed}: reward {found['reward']:.3f}", flush=True)
        self.write()

    def write(self) -> Path:
        self.record["seconds"] = round(time.monotonic() - self.began)
        return write_result("online", self.record, self.out, quiet=True)


def draw(name: str, record: dict[str, Any], folder: Path) -> list[Path]:
    """Reward of each arm, and its lowest and highest seed."""
    items = [Bar("start model", record["start"]["reward"])]
    for arm, found in ends_of(record, "reward").items():
        items.append(Bar(arm, mean(found), min(found), max(found), ours=arm.startswith("online")))
    return bars(name, "Rounds beside offline DPO", "mean reward on held-out dishes", items, folder)


def main() -> int:
    parser = stage_parser(__doc__)
    parser.set_defaults(minutes=60.0)
    parser.add_argument("--work", type=Path, default=Path("runs/online"), help="rows, models and runs")
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time, a thread each")
    args = stage_arguments(parser)
    torch.set_num_threads(args.workers)  # that the record says how many cores it took: a worker has one
    sizes, until = DRY if args.dry_run else Sizes(), time.monotonic() + 60 * args.minutes
    study = Study(sizes, args.work, args.out, args.workers, until)
    complete = study.run()
    path = study.write()
    print(online(json.loads(path.read_text()), path.name))
    draw(path.stem, study.record, args.out)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
