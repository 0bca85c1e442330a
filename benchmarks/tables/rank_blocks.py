"""Several GPUs on paper: what `fastdpo plan --gpus` computes of models and rows that the benchmarks have."""

from functools import cache

from transformers import AutoConfig

from benchmarks.inputs import groups_of, random_rows
from benchmarks.lengths import draw
from benchmarks.models import MODELS
from benchmarks.tables.markdown import markdown, number
from fastdpo.config.keys import Config
from fastdpo.console.formatting import gigabytes
from fastdpo.model.cards import CARDS
from fastdpo.planning.collectives import GRADIENT, LINK_SHARE, NETWORK, REPLICATE, SHARD, Model, Ranks
from fastdpo.planning.fake_model import units
from fastdpo.planning.ranks import GATHERED, KEPT, WHOLE, rank_bytes, step_seconds
from fastdpo.planning.search import Planner
from fastdpo.planning.step_time import SHARE
from fastdpo.planning.target import Target

CARD, GPUS, TOKENS = "H100", 8, 16_384
MIXES = ("UltraFeedback", "TL;DR")
PAIRS = (8, 32, 64, 128)
LORA, FULL = "Llama-3.1-8B LoRA", "Llama-3.1-8B"
RECOMPUTED = {"gradient_checkpointing": True}
LINKED = ("B200", "H100", "A100", "RTX 4090", "L40S")
ROOM = 1.1  # of TOKENS: a rank's microbatch may be so much larger than the mean


@cache
def _planner(name: str, mix: str) -> Planner:
    model = MODELS[name]
    rows = groups_of(random_rows(draw(mix, 512), model.vocab))
    return Planner(AutoConfig.for_model(model.model_type, **model.config), rows, Target.of_card(CARD))


def _of(name: str, mix: str, **keys) -> tuple[Planner, Config, Model]:
    planner, rank = _planner(name, mix), MODELS[name].lora_rank
    config = Config(model=name, data=mix, lora_rank=rank, **keys)
    return planner, config, Model(MODELS[name].layers, *units(config, planner.model_config, planner.target))


def speed(name: str, mix: str, mode: str, **keys) -> float:
    """How many times one GPU's speed GPUS of CARD are, on the same steps."""
    planner, config, model = _of(name, mix, **keys)
    took, _ = step_seconds(planner, config, model, mode, Ranks(GPUS))
    return planner.rank_time(config, 1, 1).seconds / took


def lora_speed(mix: str, pairs: int) -> float:
    """Of replicas of a LoRA, steps of so many pairs."""
    return speed(LORA, mix, REPLICATE, batch_size=pairs)


def full_keys(mix: str) -> dict:
    """Of all weights: TOKENS a rank and step."""
    groups = _planner(FULL, mix).groups
    pairs = round(GPUS * TOKENS * len(groups) / sum(group.input_tokens for group in groups))
    return {"batch_size": pairs, "max_tokens": int(ROOM * TOKENS)}


def full_efficiency(mix: str, **keys) -> float:
    """Of shards of all weights: the share of GPUS times one GPU's speed."""
    return speed(FULL, mix, SHARD, **full_keys(mix), **keys) / GPUS


def hidden_from(card: str, gathered: int = 4) -> float:
    """Tokens a microbatch from which what is gathered and reduced takes no longer than the products of the
    linear layers, all weights training, on GPUS of a card. gathered: bytes of a weight on its way."""
    rate = SHARE * CARDS[card].flops / (LINK_SHARE * CARDS[card].link)
    return (2 * gathered + GRADIENT) * (GPUS - 1) / GPUS * rate / 6


def _speeds() -> str:
    rows = [
        [f"LoRA of {FULL}, replicated, {n} pairs a step", *(f"{lora_speed(mix, n):.1f}x" for mix in MIXES)]
        for n in PAIRS
    ]
    for words, keys in (("", {}), (", recomputed layers", RECOMPUTED)):
        shares = (f"{full_efficiency(mix, **keys):.0%} of {GPUS}x" for mix in MIXES)
        rows.append([f"all weights, sharded, {TOKENS:,} tokens a rank and step{words}", *shares])
    return markdown(("", *(f"rows like {mix}'s" for mix in MIXES)), rows)


def _bytes() -> str:
    """Of the rows of the first mix."""
    mix, rows = MIXES[0], []
    lora, full = {"batch_size": PAIRS[2]}, full_keys(mix) | RECOMPUTED
    for name, keys, mode in ((LORA, lora, REPLICATE), (FULL, full, REPLICATE), (FULL, full, SHARD)):
        found = rank_bytes(*_of(name, mix, **keys), mode, Ranks(GPUS))
        sizes = [sum(found.peak.bytes.get(name, 0) for name in some) for some in (KEPT, (GATHERED, WHOLE))]
        what = f"LoRA, {PAIRS[2]} pairs a step" if name == LORA else "all weights, recomputed layers"
        cells = [gigabytes(size) for size in (*sizes, found.total)]
        rows.append([f"{what}, `{mode}`", *cells, "yes" if found.total <= CARDS[CARD].memory else "no"])
    return markdown(("", "kept", "gathered, and whole gradients", "all", f"fits the {CARD}"), rows)


def _links() -> str:
    rows = [
        [card, f"{number(CARDS[card].link / 1e9)} GB/s"]
        + [f"{round(hidden_from(card, size), -2):,.0f}" for size in (4, 2)]
        for card in LINKED
    ]
    return markdown(("", "link, one way", "gathers in fp32", "gathers in bf16"), rows)


@cache
def on_paper() -> str:
    """The numbers, and what they stand on."""
    stands_on = (
        f"{SHARE:.0%} of a card's FLOP/s and {LINK_SHARE:.0%} of its link (between nodes of "
        f"{NETWORK / 1e9:.0f} GB/s a GPU)"
    )
    return (
        f"**By the formulas, not measured**, at {stands_on}: {GPUS} {CARD} beside one on the same steps, as "
        f"if these fitted it.\n\n{_speeds()}\n\nBytes a rank of the same steps, rows like {MIXES[0]}'s:\n\n"
        f"{_bytes()}\n\nTokens a microbatch from which the collectives of {GPUS} ranks pass wholly beside "
        f"the computation, all weights training and no layer recomputed:\n\n{_links()}"
    )
