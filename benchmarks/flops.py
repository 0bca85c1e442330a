"""FLOPs of one optimizer step from the lengths of its pairs, by formulas that a hand can count.

A multiply-add is 2. Matrix products are counted and nothing else: norms, rotary embeddings, softmax and
the optimizer do no FLOPs that matter beside them. Letters: P prompt, R response, L a row (tokens), T places
that go through the decoder layers, M rows of hidden states that go through the lm_head, N weights of the
decoder layers' linears, A weights of a LoRA, V vocabulary, D hidden, H heads, d a head's size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.lengths import PairLengths
from benchmarks.models import BenchModel
from fastdpo.model.flops import attended, causal, useful


@dataclass(frozen=True)
class How:
    """How a trainer computes a step. The defaults do nothing that is not needed."""

    shared_prompt: bool = True
    padded_to: int | None = None  # None: packed; n: n pairs a batch, in order, padded to its longest
    scored_head_rows: Literal["all", "scored"] = "scored"
    head_units: int | None = None  # products of 2MVD, forward and backward; None: the fewest, see `fewest`
    reference_forward: bool = False
    checkpointing: bool = False  # each decoder layer runs forward once more in the backward

    def __post_init__(self):
        if self.shared_prompt and self.padded_to:
            raise ValueError("a shared prompt is packed: padded_to goes with shared_prompt=False")


USEFUL = How()  # what model FLOP utilisation is counted by, whatever a trainer computes beside it


@dataclass(frozen=True)
class Work:
    """How much of everything one forward over some pairs is."""

    places: int  # T
    attended: int  # (query, key) pairs, a head
    head_rows: int  # M


def work(lengths: Sequence[PairLengths], how: How) -> Work:
    """One forward over these pairs.

    Shared and packed: a pair takes P + sum(R - 1) places, since a response's last token predicts nothing,
    and causal(P) + sum((R - 1) P + causal(R - 1)) attended pairs. Separate rows keep their last token, as
    trainers do: a row takes L = P + R places, padded that of the longest row of its batch, and causal(L).
    Kernels that mask instead of skipping attend more; that is not counted.
    """
    scored = sum(row.chosen + row.rejected for row in lengths)
    if how.shared_prompt:
        places = sum(row.prompt + row.chosen + row.rejected - 2 for row in lengths)
        pairs = sum(attended(row.prompt, row[1:]) for row in lengths)
    else:
        size = how.padded_to or 1
        batches = [lengths[i : i + size] for i in range(0, len(lengths), size)]
        widths = [row.prompt + R for batch in batches for row in batch for R in row[1:]]
        if how.padded_to:
            longest = [max(row.prompt + R for row in batch for R in row[1:]) for batch in batches]
            widths = [width for batch, width in zip(batches, longest) for _ in range(2 * len(batch))]
        places, pairs = sum(widths), sum(map(causal, widths))
    return Work(places, pairs, scored if how.scored_head_rows == "scored" else places)


def fewest(model: BenchModel) -> int:
    """Products of 2MVD that a head cannot do without: the logits, the gradient of the hidden states, and
    with a head that trains (no LoRA) its own."""
    return 3 if model.lora_rank is None else 2


def recomputed(model: BenchModel) -> int:
    """Weights of the linears that checkpointing runs once more: torch stops a layer's second forward when
    it has all that the backward reads, before the layer's last product (down_proj, or its LoRA's B)."""
    n_in, n_out = model.linears["down_proj"]
    last = n_in if model.lora_rank is None else model.lora_rank
    return model.body_params + model.lora_params - model.layers * last * n_out


def step_flops(model: BenchModel, lengths: Sequence[PairLengths], how: How) -> dict[str, int]:
    """{"body", "attention", "head", "total"} of forward and backward over these pairs.

    body       forward 2 T (N + A); backward 2 T (N + A) for the gradients of inputs, 2 T N for those of
               weights, or 2 T A where they are frozen under a LoRA (the first layer's inputs are counted
               though under a LoRA nobody needs their gradient)
    attention  4 d H a (query, key) pair forward: scores and values; 8 d H backward. H counts query heads:
               fewer key heads (GQA) save memory, not FLOPs. That flash kernels make the scores a second
               time in the backward (2 d H more) is theirs, and not counted.
    head       2 M V D a product
    A reference forward adds one forward of each, without A; checkpointing one of the attention and of the
    body's linears that are `recomputed`.
    """
    done = work(lengths, how)
    N, A = model.body_params, model.lora_params
    pair = 4 * model.head_dim * model.heads * model.layers
    body, attention = useful(N, A, pair, done.places, done.attended)
    body += 2 * done.places * (how.checkpointing * recomputed(model) + how.reference_forward * N)
    attention += pair * done.attended * (how.checkpointing + how.reference_forward)
    units = (fewest(model) if how.head_units is None else how.head_units) + how.reference_forward
    head = units * 2 * done.head_rows * model.vocab * model.hidden
    return {"body": body, "attention": attention, "head": head, "total": body + attention + head}
