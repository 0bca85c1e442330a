"""What a run reports: sums over pairs and tokens, under TRL's metric names where TRL has them."""

import contextlib
import resource
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdpo.distributed.world import ALONE, World
from fastdpo.model.cards import card_named
from fastdpo.moving import to_device
from fastdpo.objectives.seam import Objective, Reward
from fastdpo.records import PackedGroups, ResponseLogps
from fastdpo.training.speed import Idle

EVAL_STATS = ("entropy", "mean_logit", "is_top1")


@dataclass
class Sums:
    """Named sums and counts; tensors stay on their device until `means` fetches them all at once."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, values: Tensor | float) -> None:
        """Adds a tensor's elements, or a number."""
        if isinstance(values, Tensor):
            self.tensors[name] = self.tensors.get(name, 0) + values.detach().double().sum()
        else:
            self.numbers[name] = self.numbers.get(name, 0) + values
        count = values.numel() if isinstance(values, Tensor) else 1
        self.counts[name] = self.counts.get(name, 0) + count

    def state(self) -> dict:
        """What `restored` makes the same sums of, bit by bit; JSON."""
        tensors = {name: float(value) for name, value in self.tensors.items()}
        return {"tensors": tensors, "numbers": self.numbers, "counts": self.counts}

    @classmethod
    def restored(cls, state: dict, device) -> "Sums":
        double = lambda value: torch.tensor(value, dtype=torch.float64, device=device)
        tensors = {name: double(value) for name, value in state["tensors"].items()}
        return cls(tensors, dict(state["numbers"]), dict(state["counts"]))

    def all_to_first(self, world: World) -> None:
        """Moves the sums of all ranks to the first; the others go on from nothing."""
        if world.size == 1:
            return
        sums, counts = Counter[str](), Counter[str]()
        for state in world.gather(self.state()):
            sums.update(state["tensors"])
            sums.update(state["numbers"])
            counts.update(state["counts"])
        self.tensors = {}
        self.numbers, self.counts = (dict(sums), dict(counts)) if world.first else ({}, {})

    def means(self) -> dict[str, float]:
        """Each name's sum over its count; names that counted nothing are left out. Without pairs the margin
        is that of the two means, as in TRL's KTO."""
        sums = dict.fromkeys(self.counts, 0.0) | self.numbers
        if self.tensors:
            fetched = torch.stack(list(self.tensors.values())).tolist()
            for name, value in zip(self.tensors, fetched):
                sums[name] = value + self.numbers.get(name, 0.0)
        means = {name: sums[name] / count for name, count in self.counts.items() if count}
        if "rewards/chosen" in means and "rewards/rejected" in means:
            means.setdefault("rewards/margins", means["rewards/chosen"] - means["rewards/rejected"])
        return means


def add_metrics(sums: Sums, objective: Objective, logps: ResponseLogps) -> None:
    """What an objective's microbatch is told by: a pair's, or those of a reward model."""
    if objective.of_rewards:
        add_reward_metrics(sums, logps)
    else:
        add_pair_metrics(sums, objective.seen(logps), objective.reward)


@torch.no_grad()
def add_reward_metrics(sums: Sums, logps: ResponseLogps) -> None:
    """TRL's of its RewardTrainer: `accuracy` and `margin`, one value a pair; `mean_reward`, one a response;
    `min_reward` and `max_reward`, one a microbatch, as TRL's are one a forward."""
    rewards, w, l = logps.logp, logps.winner, logps.loser
    sums.add("accuracy", rewards[w] > rewards[l])
    sums.add("margin", rewards[w] - rewards[l])
    sums.add("mean_reward", rewards)
    sums.add("min_reward", rewards.min())
    sums.add("max_reward", rewards.max())


@torch.no_grad()
def add_pair_metrics(sums: Sums, logps: ResponseLogps, reward: Reward | None) -> None:
    """TRL's DPO metrics, one value a pair; of unpaired rows (as TRL's KTO), one value a labelled response.

    `logps` as the objective sees them: with token options, weighted, as TRL's under ld_alpha. `reward` is
    the objective's (beta * (log pi - log pi_ref) in DPO). `logps/accuracies` is ours: whether the policy
    itself, with no reference, finds the winner likelier.
    """
    logp, good, bad = logps.logp, logps.desirable, logps.undesirable
    if not len(good) and not len(bad):
        sums.add("logps/chosen", logp[logps.chosen])
        return
    w, l = logps.winner, logps.loser
    sums.add("logps/chosen", logp[good])
    sums.add("logps/rejected", logp[bad])
    sums.add("logps/accuracies", logp[w] > logp[l])
    if reward is not None:
        rewards = reward(logps)
        sums.add("rewards/chosen", rewards[good])
        sums.add("rewards/rejected", rewards[bad])
        sums.add("rewards/accuracies", rewards[w] > rewards[l])
        sums.add("rewards/margins", rewards[w] - rewards[l])


@torch.no_grad()
def add_kl(sums: Sums, logps: ResponseLogps) -> None:
    """How far the policy is from the reference: Schulman's k2 estimate (2020, "Approximating KL
    divergence") of KL(policy || reference), (log policy - log reference)^2 / 2, a scored token.

    The tokens are the data's, not samples of the policy: a measure of drift, 0 only where the two agree,
    but not the KL of the policy's own text. (k3 is unbiased on the policy's samples; on rejected tokens,
    which training makes rare, its exp(log reference - log policy) grows past all sense.)
    """
    assert logps.ref_token_logp is not None
    log_ratio = (logps.token_logp - logps.ref_token_logp).double()
    sums.add("kl", log_ratio.square() / 2)


@torch.no_grad()
def add_token_metrics(sums: Sums, batch: PackedGroups, stats: dict[str, Tensor]) -> None:
    """TRL's vocabulary-wide metrics, one value a scored token. They cost passes over the vocabulary
    that training does not need, so only evaluation reports them. `batch` as it was packed, on the host, so
    that nothing is counted on the device."""
    lengths = batch.cu_resp.diff()
    chosen = torch.isin(torch.arange(len(lengths)), batch.chosen).repeat_interleave(lengths)
    places = [mask.nonzero()[:, 0] for mask in (chosen, ~chosen)]
    good, bad = to_device(places, stats["mean_logit"].device)
    sums.add("entropy", stats["entropy"])
    sums.add("logits/chosen", stats["mean_logit"][good])
    if len(bad):
        sums.add("logits/rejected", stats["mean_logit"][bad])
    sums.add("mean_token_accuracy", stats["is_top1"][good])


@torch.no_grad()
def drift(logps: ResponseLogps, per_token: bool) -> Tensor:
    """How far policy and reference are apart: the largest mean over a response's tokens. per_token: whether
    the reference's log-probs are of tokens."""
    assert logps.ref_token_logp is not None
    if not per_token:
        return (logps.log_ratio.abs() / logps.lengths).max()
    apart = (logps.token_logp - logps.ref_token_logp).abs()
    return (logps.per_response(apart) / logps.lengths).max()


def peak_memory_gb() -> float:
    """Peak of the CUDA allocator, or of this process where there is no GPU, in GB (1e9 bytes)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def peak_flops() -> float | None:
    """Dense bf16 FLOP/s of the GPU by its data sheet; None where it is not known, or there is none."""
    card = card_named(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return card.flops if card else None


_COUNTS = ("num_tokens", "pairs", "responses", "tokens", "first_pass", "flops")


def counts_of(batch: PackedGroups, flops: int) -> Counter:
    """What a microbatch adds to a Window's counts."""
    return Counter(
        flops=flops,
        pairs=len(batch.pairs),
        responses=len(batch.cu_resp) - 1,
        tokens=batch.input_tokens,
        num_tokens=batch.unshared_tokens,
    )


@dataclass
class Window:
    """What happened since the last log line."""

    sums: Sums = field(default_factory=Sums)
    start: float = field(default_factory=time.perf_counter)
    num_tokens: int = 0  # of the whole stage, as TRL counts: separate rows, no padding
    pairs: int = 0
    responses: int = 0
    tokens: int = 0
    first_pass: int = 0  # tokens of forwards without gradient that the objective needed first
    flops: int = 0  # see model/flops.py; 0 where they are not counted
    idle: Idle = field(default_factory=Idle)
    ranks: int = 1
    memory: float = 0.0  # the most that any rank has taken, in GB, as far as it is known

    def next(self) -> "Window":
        """The one after a log line."""
        return Window(num_tokens=self.num_tokens, idle=self.idle.next(), ranks=self.ranks)

    def count(self, counts: Counter, world: World = ALONE) -> None:
        """Adds what all ranks have counted; collective."""
        for name, value in zip(_COUNTS, world.sums([counts[name] for name in _COUNTS])):
            setattr(self, name, getattr(self, name) + int(value))

    def state(self) -> dict:
        """What `restored` goes on from; JSON."""
        counts = {name: getattr(self, name) for name in _COUNTS}
        seconds = time.perf_counter() - self.start
        idle = self.idle.share(seconds) * seconds
        return {"sums": self.sums.state(), "seconds": seconds, "idle_seconds": idle, "counts": counts}

    @classmethod
    def restored(cls, state: dict, device) -> "Window":
        start = time.perf_counter() - state["seconds"]
        idle = Idle.restored(state["seconds"], state.get("idle_seconds", 0.0))  # none: an older checkpoint
        return cls(Sums.restored(state["sums"], device), start, **state["counts"], idle=idle)

    @contextlib.contextmanager
    def paused(self):
        """Time spent inside is no training time."""
        start = time.perf_counter()
        with self.idle.paused():
            yield
        self.start += time.perf_counter() - start

    def throughput(self) -> dict:
        seconds = time.perf_counter() - self.start
        out = {
            "num_tokens": self.num_tokens,
            "responses_computed": self.responses,
            "tokens_per_second": round(self.tokens / seconds, 1),
            "peak_memory_gb": round(max(self.memory, peak_memory_gb()), 3),
            "idle_share": round(self.idle.share(seconds), 4),
        }
        if self.flops:
            out["tflops_per_second"] = float(f"{self.flops / seconds / 1e12:.4g}")
            if peak := peak_flops():
                out["mfu"] = round(self.flops / seconds / (peak * self.ranks), 4)
        if self.first_pass:
            out["first_pass_tokens"] = self.first_pass
        if self.pairs:
            out["pairs_per_second"] = round(self.pairs / seconds, 3)
        return out


@dataclass
class Progress:
    """How far a stage is: with the weights and the optimizer's state, all that its next step depends on."""

    steps: int = 0
    evaluated: bool = False  # False while held-out rows are due at this step
    eval_loss: float | None = None  # at this step
    best: dict | None = None  # {"step", "eval_loss"} of the stage's best checkpoint
    memory: dict[str, float] = field(default_factory=dict)  # the objective's own (BCO's running mean)
    rounds: dict[str, Any] = field(default_factory=dict)  # see rounds.RoundStage; empty before the first
    window: Window = field(default_factory=Window)

    def state(self) -> dict:
        return {**vars(self), "window": self.window.state()}

    @classmethod
    def restored(cls, state: dict, device, world: World = ALONE) -> "Progress":
        window = Window.restored(state["window"], device)
        window.ranks = world.size
        if not world.first:  # the sums of all ranks are the first one's
            window.sums = Sums()
        return cls(**state | {"window": window})
