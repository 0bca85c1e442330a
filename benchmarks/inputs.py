"""Rows of random tokens with given lengths: the same ones for every trainer."""

from collections.abc import Sequence

import numpy as np

from benchmarks.lengths import PairLengths
from fastdpo.records import Pair, PreferenceGroup, Response

FIRST_ID = 10  # below it tokenizers like to keep padding and other special tokens


def random_rows(lengths: Sequence[PairLengths], vocab: int, seed: int = 0) -> list[dict]:
    """{"prompt_ids", "chosen_ids", "rejected_ids"}: lists of ints, one dict a pair, in order."""
    draw = np.random.Generator(np.random.PCG64(seed))
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{key: draw.integers(FIRST_ID, vocab, n).tolist() for key, n in zip(keys, row)} for row in lengths]


def groups_of(rows: Sequence[dict], first: int = 0) -> list[PreferenceGroup]:
    """The rows as fastdpo's records, numbered from `first`: two responses and one pair each, every response
    token scored."""

    def response(ids):
        return Response(np.array(ids, np.int64), np.ones(len(ids), bool))

    return [
        PreferenceGroup(
            number,
            np.array(row["prompt_ids"], np.int64),
            (response(row["chosen_ids"]), response(row["rejected_ids"])),
            (Pair(0, 1),),
        )
        for number, row in enumerate(rows, first)
    ]
