"""Which trainings there are: the grid of a GPU, the part of it that a CPU has time for, and a dry run's."""

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.learning.curriculum import ARMS as ORDERS
from benchmarks.learning.curriculum import RANKED, SHARED
from benchmarks.learning.optimizers import ARMS as OPTIMIZERS
from benchmarks.learning.real.start import LONGEST
from benchmarks.learning.real.training import Training

HH_TRAIN, HH_TEST = (SHARED / "pref" / f"hh_rlhf_{part}.jsonl" for part in ("train", "test"))
RANKED_TRAIN, RANKED_HELD_OUT = "ranked.jsonl", "ranked-held-out.jsonl"  # nine tenths of RANKED, and the rest
UNREPORTED = 99  # the seed that rates are chosen on
RATE = 5e-4
FRONTIER = {
    "DPO": {"objective": "sigmoid"},
    "IPO": {"objective": "ipo_sum"},
    "ODPO": {"objective": "odpo"},
    "Dr. DPO": {"objective": "drdpo"},
    "KTO": {"objective": "kto"},
    "SimPO": {"objective": "simpo"},
    "SFT on the best": {"objective": "sft", "pairs": "best_worst"},
}
NOISE = {
    "DPO": {"objective": "sigmoid"},
    "cDPO": {"objective": "sigmoid", "label_smoothing": 0.2},
    "robust": {"objective": "robust", "label_smoothing": 0.2},
    "IPO": {"objective": "ipo_sum"},
    "Dr. DPO 0.5": {"objective": "drdpo", "objective_args": {"beta_prime": 0.5}},
    "Dr. DPO 1": {"objective": "drdpo", "objective_args": {"beta_prime": 1.0}},
    "Dr. DPO 2": {"objective": "drdpo", "objective_args": {"beta_prime": 2.0}},
}
NO_BETA = ("simpo", "sft")  # its own scale, and none


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    name: str
    seeds: tuple[int, ...]
    prompts: int  # of a seed, with `answers` ranked answers each
    answers: int
    held_out: int  # prompts that a trained model answers
    steps: int
    marks: tuple[int, ...]
    betas: tuple[float, ...]
    arms: tuple[str, ...]  # of FRONTIER
    flipped: float = 0.0  # the share of the frontier's pairs that are
    shares: tuple[float, ...] = ()  # of flipped pairs
    rates: tuple[float, ...] = ()
    pairs: tuple[int, ...] = ()
    losses: tuple[str, ...] = tuple(NOISE)
    hh_steps: int = 0
    hh_rows: int | None = None  # of each file, None: all
    hh_length: int = 512


FULL = Sizes(
    name="full",
    seeds=(0, 1, 2),
    prompts=1000,
    answers=4,
    held_out=224,  # all there are
    steps=96,
    marks=(24, 48, 72, 96),
    betas=(0.03, 0.1, 0.3, 1.0),
    arms=tuple(FRONTIER),
    shares=(0.0, 0.1, 0.2, 0.3, 0.4),
    rates=(1e-4, 3e-4, 1e-3),
    pairs=(50, 200, 1000),
    hh_steps=258,
)
REDUCED = Sizes(
    name="reduced",
    seeds=(0, 1, 2),
    prompts=96,
    answers=4,
    held_out=64,
    steps=20,
    marks=(10, 20),
    betas=(0.1,),
    arms=("DPO", "IPO", "ODPO", "Dr. DPO"),
)
# where the papers' gains are largest, as many held-out answers: pairs that are wrong, and very few of them
SECOND = replace(REDUCED, name="second", arms=("DPO", "Dr. DPO"), flipped=0.4, pairs=(24,))
DRY = Sizes(
    name="dry",
    seeds=(0,),
    prompts=16,
    answers=2,
    held_out=3,
    steps=2,
    marks=(1, 2),
    betas=(0.1,),
    arms=("DPO", "ODPO", "SimPO", "SFT on the best"),
    shares=(0.4,),
    rates=(1e-3,),
    pairs=(16,),
    losses=("DPO", "Dr. DPO 1"),
    hh_steps=3,
    hh_rows=24,
    hh_length=256,
)


def tuned(sizes: Sizes) -> str:
    """How the rates were chosen."""
    text = (
        "learning rate 5e-4 for all objectives, between 3e-4 and 1e-3, tried for plain DPO at beta "
        "0.1 on a seed that is not reported; ODPO's alpha is its paper's, 1"
    )
    noise = "; noise: for each loss the most accurate rate on that seed, with a fifth of the pairs flipped"
    return text + (noise if sizes.shares else "")


def skipped(sizes: Sizes) -> dict[str, str]:
    """{study: why it is left out, or a part of it} where files are not there."""
    files = {"curriculum": RANKED, "optimizers": HH_TRAIN, "noise on hh-rlhf": HH_TRAIN}
    if not sizes.hh_steps:
        return {}
    return {study: f"not there: {file.name}" for study, file in files.items() if not file.exists()}


def frontier(sizes: Sizes) -> list[Training]:
    """Reward against KL, all pairs of the ranked answers."""
    out, flips = [], {"flip_pairs": sizes.flipped} if sizes.flipped else {}
    for seed in sizes.seeds:
        for arm in sizes.arms:
            keys = FRONTIER[arm]
            for beta in sizes.betas[:1] if keys["objective"] in NO_BETA else sizes.betas:
                own = {} if keys["objective"] in NO_BETA else {"beta": beta}
                name = arm if len(sizes.betas) == 1 or not own else f"{arm}, beta {beta:g}"
                name += f", {sizes.flipped:.0%} flipped" if flips else ""
                out.append(_sentiment(sizes, "frontier", name, seed, keys | own | flips, marks=sizes.marks))
    return out


def few_pairs(sizes: Sizes) -> list[Training]:
    """ODPO beside DPO on so many pairs, one a prompt, at equal steps."""
    return [
        _sentiment(
            sizes,
            "few pairs",
            f"{arm}, {n} pairs",
            seed,
            FRONTIER[arm] | {"beta": 0.1, "pairs": "best_worst"},
            rows=n,
            marks=sizes.marks,
        )
        for seed in sizes.seeds
        for n in sizes.pairs
        for arm in ("DPO", "ODPO")
    ]


def rates(sizes: Sizes) -> list[Training]:
    """What the noise's rates are chosen by."""
    return [
        _noise(sizes, "rates", f"{arm}, {source}, rate {rate:g}", UNREPORTED, arm, source, 0.2, rate)
        for source in sources(sizes)
        for arm in sizes.losses
        for rate in sizes.rates
    ]


def noise(sizes: Sizes, chosen: dict[tuple[str, str], float]) -> list[Training]:
    """Flipped pairs; chosen: the rate of each (arm, source)."""
    return [
        _noise(sizes, "noise", f"{arm}, {source}, {share:.0%}", seed, arm, source, share, chosen[arm, source])
        for seed in sizes.seeds
        for source in sources(sizes)
        for share in sizes.shares
        for arm in sizes.losses
        if (arm, source) in chosen
    ]


def sources(sizes: Sizes) -> tuple[str, ...]:
    """Whose pairs are flipped."""
    return (("sentiment", "hh") if HH_TRAIN.exists() else ("sentiment",)) if sizes.shares else ()


def curricula(sizes: Sizes) -> list[Training]:
    """Curry-DPO on ranked rows, at equal steps."""
    if not RANKED.exists() or not sizes.hh_steps:
        return []
    orders = {name: rules for name, rules in ORDERS.items() if "first reference" not in name}
    steps = max(3, sizes.hh_steps // 2)
    out = []
    for seed in sizes.seeds:
        for arm, rules in orders.items():
            staged = not isinstance(rules, str)
            own = {"stages": [{"pairs": rule} for rule in rules]} if staged else {"pairs": rules}
            own |= {"max_steps": steps // 3 if staged else steps}
            more = {"eval_data": RANKED_HELD_OUT}
            out.append(_of_file(sizes, "curriculum", arm, seed, RANKED_TRAIN, own, **more))
    return out


def equal_tokens(sizes: Sizes, tokens: dict[tuple[str, int], int]) -> list[Training]:
    """All pairs at once on as many tokens as one pair a row took; tokens: of each (arm, seed) of curricula,
    as TRL counts (a prompt with each of its responses)."""
    out = []
    for one in curricula(sizes):
        if one.arm == "all pairs" and {("all pairs", one.seed), ("one pair", one.seed)} <= tokens.keys():
            share = tokens["one pair", one.seed] / tokens["all pairs", one.seed]
            keys = one.keys | {"max_steps": max(1, round(share * one.keys["max_steps"]))}
            out.append(replace(one, arm="all pairs, equal tokens", keys=keys))
    return out


def optimizers(sizes: Sizes) -> list[Training]:
    """Every way to step, and 4 bits, on hh-rlhf: the first on all seeds, for its spread."""
    if not HH_TRAIN.exists() or not sizes.hh_steps:
        return []
    first, *others = OPTIMIZERS
    in_4bit = {"QLoRA": {"load_in_4bit": True}, "LoRA": {}}
    out = [_whole(sizes, first, seed, OPTIMIZERS[first]) for seed in sizes.seeds]
    out += [_whole(sizes, arm, sizes.seeds[0], OPTIMIZERS[arm]) for arm in others]
    return out + [_hh(sizes, "optimizers", arm, sizes.seeds[0], keys) for arm, keys in in_4bit.items()]


def _whole(sizes: Sizes, arm: str, seed: int, keys: dict) -> Training:
    whole = {"lora_rank": None, "learning_rate": 1e-5, "max_grad_norm": 0}  # in backward nothing can clip
    return _hh(sizes, "optimizers", arm, seed, whole | keys)


def _sentiment(sizes: Sizes, study: str, arm: str, seed: int, keys: dict, rows: int | None = None, **more):
    cut = "" if rows is None else f"#train[:{rows}]"
    keys = {"learning_rate": RATE, "max_steps": sizes.steps, "max_length": LONGEST} | keys
    return Training(study, arm, seed, f"sentiment-{seed}.jsonl{cut}", keys, **more)


def _noise(sizes: Sizes, study: str, name: str, seed: int, arm: str, source: str, share: float, rate: float):
    keys = NOISE[arm] | {"beta": 0.1, "flip_pairs": share, "learning_rate": rate}
    if source == "hh":
        return _hh(sizes, study, name, seed, keys)
    keys |= {"pairs": "best_worst"}
    return _sentiment(sizes, study, name, seed, keys, eval_data="sentiment-held-out.jsonl")


def _hh(sizes: Sizes, study: str, arm: str, seed: int, keys: dict):
    keys = {"learning_rate": RATE, "max_steps": sizes.hh_steps, "batch_size": 16} | keys
    return _of_file(sizes, study, arm, seed, HH_TRAIN, keys, eval_data=_cut(sizes, HH_TEST))


def _of_file(sizes: Sizes, study: str, arm: str, seed: int, file: Path | str, keys: dict, **more):
    return Training(study, arm, seed, _cut(sizes, file), {"max_length": sizes.hh_length} | keys, **more)


def _cut(sizes: Sizes, file: Path | str) -> str:
    return str(file) if sizes.hh_rows is None else f"{file}#train[:{sizes.hh_rows}]"
