"""Who runs in the race of training steps, and how each of them computes a step (for its FLOPs)."""

from dataclasses import replace

from benchmarks.flops import USEFUL, How
from benchmarks.models import BenchModel
from benchmarks.steps.race import Contender

OURS, RUNG, TRL, PLAIN = (f"benchmarks.peers.{name}" for name in ("ours", "ladder", "trl_dpo", "hf_plain"))
LADDER = ("scored rows", "+ fused head", "+ packing", "+ shared prompt")
BATCHED = How(shared_prompt=False, padded_to=1)


def fastdpo(max_tokens: int) -> Contender:
    return Contender("fastdpo", OURS, {"max_tokens": max_tokens}, USEFUL)


def ladder(max_tokens: int, pairs_in_a_batch: int) -> list[Contender]:
    """fastdpo's ideas one after another; the last rung is fastdpo itself. For the padded rungs' FLOPs:
    about how many pairs max_tokens holds."""
    separate = replace(BATCHED, padded_to=None)
    hows = (replace(BATCHED, padded_to=pairs_in_a_batch),) * 2 + (separate, USEFUL)
    return [
        Contender(
            f"ladder: {name}",
            RUNG,
            {"max_tokens": max_tokens, "rung": name},
            replace(how, reference_forward=True),
        )
        for name, how in zip(LADDER, hows)
    ]


def variants(max_tokens: int, backend: str = "inductor") -> list[Contender]:
    """fastdpo with other people's layers or compiler under it."""
    options = {"+ liger layers": {"liger": True}, "+ torch.compile": {"compile": backend}}
    base = {"max_tokens": max_tokens}
    return [Contender(f"fastdpo {name}", OURS, base | more, USEFUL) for name, more in options.items()]


def trl(
    size: int, pairs: int, model: BenchModel, device: str, label: str = "", family: str = "TRL", **more
) -> Contender:
    """TRL with a stored reference and this many pairs a microbatch; checkpointing where memory is out
    without it. Its head recomputes the logits: 4 products, 3 with a frozen head."""
    how = replace(BATCHED, padded_to=size, head_units=4 if model.lora_rank is None else 3)
    if device == "cpu":  # no Triton: it scores prompts and padding too
        how = replace(how, scored_head_rows="all")
    options = {"batch_size": size, "best": True} | more.pop("options", {})
    name = f"TRL{label} {size} x {pairs // size}"
    return with_checkpointing(
        Contender(name, TRL, options, how, family=family, sizes_of=f"TRL{label}", **more)
    )


def trl_default(size: int, pairs: int, best: Contender) -> Contender:
    """DPOConfig as it comes: reference forward and checkpointing in every step."""
    how = replace(best.how, padded_to=size, reference_forward=True, checkpointing=True)
    name = f"TRL default {size} x {pairs // size}"
    return Contender(name, TRL, {"batch_size": size, "best": False}, how, family="TRL default")


def hf_plain(size: int, pairs: int, label: str = "", **more) -> Contender:
    """Full logits; checkpointing where memory is out without it."""
    how = replace(BATCHED, padded_to=size, scored_head_rows="all")
    more |= {"family": "plain HF", "sizes_of": "plain HF"}
    name = f"plain HF{label} {size} x {pairs // size}"
    return with_checkpointing(Contender(name, PLAIN, {"batch_size": size}, how, **more))


def with_checkpointing(contender: Contender) -> Contender:
    """The contender, and its fallback."""
    instead = replace(
        contender,
        name=f"{contender.name}, checkpointing",
        options=contender.options | {"checkpointing": True},
        how=replace(contender.how, checkpointing=True),
    )
    return replace(contender, checkpointed=instead)
