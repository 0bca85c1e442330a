"""Rows of random tokens with given lengths: the same ones for every trainer."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.lengths import PairLengths
from fastdpo.preferences import Image
from fastdpo.records import Pair, PreferenceGroup, Response

FIRST_ID = 10  # below it tokenizers like to keep padding and other special tokens


def random_rows(lengths: Sequence[PairLengths], vocab: int, seed: int = 0) -> list[dict]:
    """{"prompt_ids", "chosen_ids", "rejected_ids"}: lists of ints, one dict a pair, in order."""
    draw = np.random.Generator(np.random.PCG64(seed))
    keys = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [{key: draw.integers(FIRST_ID, vocab, n).tolist() for key, n in zip(keys, row)} for row in lengths]


def response(ids: Sequence[int], score: float | None = None) -> Response:
    """Every token scored."""
    return Response(np.array(ids, np.int64), np.ones(len(ids), bool), score)


def groups_of(rows: Sequence[dict], first: int = 0) -> list[PreferenceGroup]:
    """The rows as fastdpo's records, numbered from `first`: two responses and one pair each, every response
    token scored."""
    return [
        PreferenceGroup(
            number,
            np.array(row["prompt_ids"], np.int64),
            (response(row["chosen_ids"]), response(row["rejected_ids"])),
            (Pair(0, 1),),
        )
        for number, row in enumerate(rows, first)
    ]


def sampled_rows(lengths: Sequence[tuple[int, ...]], vocab: int, seed: int = 0) -> list[dict]:
    """{"prompt_ids", "responses": a list each, "scores": a number each, all different}: one dict a prompt, of
    (prompt, response, response, ...) in tokens."""
    draw = np.random.Generator(np.random.PCG64(seed))
    ids = lambda n: draw.integers(FIRST_ID, vocab, n).tolist()
    return [
        {
            "prompt_ids": ids(prompt),
            "responses": [ids(n) for n in responses],
            "scores": draw.standard_normal(len(responses)).tolist(),
        }
        for prompt, *responses in lengths
    ]


def sampled_groups(rows: Sequence[dict], first: int = 0) -> list[PreferenceGroup]:
    """sampled_rows as a round's records, numbered from `first`: a pair of every two responses."""

    def group(number: int, row: dict) -> PreferenceGroup:
        responses, scores = tuple(map(response, row["responses"], row["scores"])), row["scores"]
        places = range(len(scores))
        pairs = tuple(Pair(i, j) for i in places for j in places if scores[i] > scores[j])
        return PreferenceGroup(number, np.array(row["prompt_ids"], np.int64), responses, pairs)

    return [group(number, row) for number, row in enumerate(rows, first)]


def pair_rows(groups: Sequence[PreferenceGroup]) -> list[dict]:
    """Every pair as a row of random_rows, with the prompt and both responses once more: what a trainer of
    pairs is given."""
    return [
        {
            "prompt_ids": group.prompt.tolist(),
            "chosen_ids": group.responses[pair.winner].ids.tolist(),
            "rejected_ids": group.responses[pair.loser].ids.tolist(),
        }
        for group in groups
        for pair in group.pairs
    ]


class Pixels:
    """In the place of a LLaVA's processor: random pixels of images that are all as large as the tower takes
    them. model_config: the model's transformers config."""

    image_processor = SimpleNamespace(model_input_names=["pixel_values"])

    def __init__(self, model_config):
        self.token, vision = model_config.image_token_id, model_config.vision_config
        self.size, self.tokens = vision.image_size, (vision.image_size // vision.patch_size) ** 2

    def __call__(self, images, return_tensors: str) -> dict:
        count = sum(map(len, images))
        return {"pixel_values": torch.rand(count, 3, self.size, self.size)}

    def in_front(self, group: PreferenceGroup, images: int) -> PreferenceGroup:
        """The group with so many images before its prompt."""
        prompt = np.concatenate([np.full(images * self.tokens, self.token), group.prompt])
        made = lambda n: Image(f"{group.row:8}{n:8}".encode(), (self.size,) * 2, lambda: None, self.tokens)  # type: ignore[arg-type, return-value]
        return replace(group, prompt=prompt, images=tuple(map(made, range(images))))
