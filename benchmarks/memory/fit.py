"""What fits a card: claims of memory-limited training, ours beside TRL with the same tricks.

Every trial is real training in a worker whose allocator is limited (benchmarks/memory/limited.py), on random
weights in the shapes of benchmarks.models; running out of memory is its result. One trial at a time, for the
last step of each is timed. Paged optimizer states are managed memory, which no allocator limits. Taking the
rest of the GPU away would push them to the host, as on a card of that size; but more managed memory than is
free can hang a GPU. So they stay beside the limit, where they must have room, and their bytes are told apart.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.lengths import PairLengths
from benchmarks.memory.room import BESIDE
from benchmarks.memory.run import WARM, Trials, longest, settled
from benchmarks.models import MODELS, build
from benchmarks.results import result_of_today, write_result
from benchmarks.tables.memory_blocks import fit_table
from fastdpo.config.keys import Config
from fastdpo.optim.bytes import host_state_bytes

OURS, AS_LONG = "fastdpo", "fastdpo, as long as TRL"
THEIRS = {"TRL": {}, "TRL + liger layers": {"liger": True}}
# of our keys, what TRL has too
SHARED = ("optim", "pure_bf16", "load_in_4bit", "gradient_checkpointing", "activation_offloading")
COUNTING = (
    "a pair of n tokens is a third prompt and a third each response, so that fastdpo computes n, and TRL two "
    "rows of prompt and response, 4n/3; memory in 10^9 bytes, of the allocator: the CUDA context is on top, "
    "and so are paged optimizer states, which a card of that size keeps on the host: copying them there and "
    "back, once a step each, is not in the rates"
)
RECOMPUTED = {"gradient_checkpointing": True, "activation_offloading": True, "head_memory": "128MiB"}
MEMORY = ("peak_bytes", "held_bytes", "paged_bytes")  # that a trial tells of
LORA = RECOMPUTED | {"tiled_mlp": True}
BF16 = RECOMPUTED | {"pure_bf16": True, "optim": "paged_adamw_8bit"}
IN_BACKWARD = {"optimizer_in_backward": True, "max_grad_norm": 0.0}


@dataclass(frozen=True)
class Claim:
    """That this much training fits a card."""

    name: str  # what trains
    model: str
    gigabytes: float  # 10^9 bytes
    tokens: int  # a pair, see COUNTING
    pairs: int  # an optimizer step, each a microbatch of its own
    keys: dict  # fastdpo's config

    @property
    def theirs(self) -> dict:
        """What TRL has of the keys."""
        return {name: value for name, value in self.keys.items() if name in SHARED}

    @property
    def paged(self) -> int:
        """Bytes of the paged optimizer states."""
        if not self.keys.get("optim", "").startswith("paged_"):
            return 0
        config = Config(model=self.model, data="random rows", **self.keys)
        weights = build(MODELS[self.model], "meta", torch.bfloat16).parameters()
        return sum(host_state_bytes(config, p.numel(), p.itemsize, tuple(p.shape)) for p in weights)


CLAIMS = (
    Claim("Llama-3.1-8B, all weights", "Llama-3.1-8B", 24, 4096, 4, BF16 | IN_BACKWARD),
    Claim("Llama-3.1-8B, QLoRA", "Llama-3.1-8B LoRA", 16, 32_768, 1, LORA | {"load_in_4bit": True}),
    Claim("Llama-3.1-8B, LoRA", "Llama-3.1-8B LoRA", 24, 16_384, 1, LORA),
    Claim("Llama-3.1-70B, QLoRA", "Llama-3.1-70B LoRA", 48, 2048, 1, LORA | {"load_in_4bit": True}),
    Claim("Qwen3-1.7B, all weights", "Qwen3-1.7B", 12, 4096, 4, BF16),
)


@dataclass(frozen=True)
class Limits:
    """How far everything goes."""

    device: str
    claims: tuple[Claim, ...]
    contenders: tuple[str, ...]
    first: int  # tokens of the shortest pair tried
    most: int  # ... and of the longest, if the model has so many positions
    precision: float  # smallest that failed over largest that fit
    tiny: bool = False


FULL = Limits("cuda", CLAIMS, (OURS, *THEIRS), first=512, most=98_304, precision=1.1)


@dataclass(frozen=True)
class Task:
    """A claim's contender on its card."""

    claim: str
    contender: str
    gigabytes: float


class FitTrials(Trials):
    """Trials of a claim: three steps, a short one and two of pairs of so many tokens, the last one timed."""

    def __init__(self, limits: Limits, claim: Claim, contender: str, folder: Path, until: float):
        super().__init__(limits, Task(claim.name, contender, claim.gigabytes), folder, until)
        self.claim = claim

    def steps(self, tokens: int) -> list[list[PairLengths]]:
        return [[pair] * self.claim.pairs for pair in (WARM, pair_of(tokens), pair_of(tokens))]

    def peer(self, tokens: int) -> tuple[str, dict]:
        if self.task.contender not in THEIRS:
            return "ours", {"max_tokens": tokens, "keys": self.claim.keys}
        keys = dict(self.claim.theirs)
        if self.limits.device == "cpu":  # its offloading asks for an accelerator
            keys.pop("activation_offloading", None)
        return "trl_dpo", {"batch_size": 1, "best": True, "keys": keys} | THEIRS[self.task.contender]

    def told(self, model: str, tokens: int, answer: dict | None) -> dict:
        out = dict.fromkeys(("tokens", *MEMORY, "seconds")) | {"tokens": tokens}
        if answer is not None:
            out |= {name: answer[name] for name in MEMORY}
            out["seconds"] = answer["steps"][-1]["seconds"]
        return out

    def once(self, tokens: int) -> int | None:
        """fits(), unless the log has it."""
        for trial in self.log:
            if trial["tokens"] == tokens:
                return trial["peak_bytes"]
        return self.fits(self.claim.model, tokens)


def pair_of(tokens: int) -> PairLengths:
    """A third prompt, a third each response."""
    return PairLengths(tokens - 2 * (tokens // 3), tokens // 3, tokens // 3)


def reach(fits: Callable[[int], int | None], claim: Claim, limits: Limits) -> dict:
    """The longest pair, the claim's own tried first: {"fits": None for none, "fails": None if the longest
    that is tried fits}."""
    positions = MODELS[claim.model].config["max_position_embeddings"]
    most, room = min(limits.most, positions // 2 * 3), int(claim.gigabytes * 1e9)
    if fits(claim.tokens) is not None:
        low, high = longest(fits, claim.tokens, most, room, limits.precision)
    else:
        low, high = longest(fits, limits.first, claim.tokens - 1, room, limits.precision)
        high = high or claim.tokens
    return {"fits": low or None, "fails": high}


def answer(limits: Limits, claim: Claim, contender: str, until: float, known=(), tokens=None) -> dict:
    """{"claim", "contender", "fits", "fails", "trials"} or {..., "no_answer", "trials"}; with `tokens` only
    whether that much fits. `known`: trials that an earlier visit made."""
    asked = {"claim": claim.name, "contender": contender}
    if limits.device == "cuda" and (why := no_room(claim, torch.cuda.mem_get_info()[0])):
        print(f"{claim.name}, {contender}: not tried: {why}", flush=True)
        return asked | {"no_answer": why, "trials": list(known)}
    with tempfile.TemporaryDirectory() as folder:
        trials = FitTrials(limits, claim, contender, Path(folder), until)
        trials.log.extend(known)

        def ask() -> dict:
            if tokens is None:
                return reach(trials.once, claim, limits)
            return {"fits": None if trials.once(tokens) is None else tokens}

        found = settled(trials, ask)
    if "no_answer" in found:
        print(f"{claim.name}, {contender}: no answer: {found['no_answer']}", flush=True)
    return asked | found


def no_room(claim: Claim, free: int) -> str | None:
    """Why a claim is not tried on a GPU with so many bytes free: never more managed memory than is free."""
    needed = claim.gigabytes * 1e9 + BESIDE + claim.paged
    if not claim.paged or needed <= free:
        return None
    return (
        f"{claim.gigabytes:g} GB and {claim.paged / 1e9:.1f} GB of paged states beside them need "
        f"{needed / 1e9:.1f} GB free, and this GPU has {free / 1e9:.1f}"
    )


def as_long_as_trl(claim: Claim, found: dict[tuple, dict]) -> int | None:
    """The longest that TRL reaches, where that is below the claim: there ours is timed once more."""
    theirs = [found.get((claim.name, name), {}).get("fits") for name in THEIRS]
    best = max((n for n in theirs if n), default=None)
    return best if best and best < claim.tokens else None


def run(limits: Limits, minutes: float, out: Path) -> Path:
    """Every claim by every contender, ours first; then ours where TRL ended."""
    until = time.perf_counter() + 60 * minutes
    earlier = (result_of_today("fit", out) or {"found": []})["found"]
    found = {(f["claim"], f["contender"]): f for f in earlier}

    def write() -> Path:
        told = {"limits": asdict(limits), "theirs": THEIRS, "counting": COUNTING}
        return write_result("fit", told | {"found": list(found.values())}, out)

    def work(claim: Claim, contender: str, tokens: int | None = None) -> None:
        old = found.get((claim.name, contender), {})
        if "fits" in old:
            return
        known = old.get("trials", ())
        found[claim.name, contender] = answer(limits, claim, contender, until, known, tokens)
        write()

    for contender in limits.contenders:
        for claim in limits.claims:
            work(claim, contender)
    for claim in limits.claims:
        if tokens := as_long_as_trl(claim, found):
            work(claim, AS_LONG, tokens)
    print(fit_table({"limits": asdict(limits), "found": list(found.values())}))
    return write()
