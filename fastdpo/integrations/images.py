"""The images of another trainer's batch of padded rows, which its processor has made into pixels: which row
sees which of them, and what the model takes of those that are left once rows share their prompts.

Letters: N rows, S padded length, n images, C channels.
"""

from collections import defaultdict
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdpo.model.vision import TYPES, token_types, vision_refusal
from fastdpo.preferences import Image, PreferenceGroup

_PIXELS = ("pixel_values", "pixel_attention_mask", "image_grid_thw")
NAMES = frozenset({*_PIXELS, *TYPES})  # what a batch may bring of them

Part = dict[str, Tensor]  # of what a batch brings, what belongs to one image (or to one row's tiles)
Parts = list[list[tuple[Part, int]]]  # of each row: with the tokens that stand for it


class BatchImages:
    """Images of one batch, and in the place of the processor that fastdpo.model.vision asks for pixels."""

    model_input_names = _PIXELS

    def __init__(self, model: Any, given: dict[str, Tensor]):
        self.model = model
        self.types = {name: value.cpu().numpy() for name, value in given.items() if name in TYPES}
        self.pixels = {name: value for name, value in given.items() if name in _PIXELS}
        self.token = getattr(model.config, "image_token_id", None)
        self.image_processor = self
        self.of_row: list[tuple[Image, ...]] = []  # equal ones have equal keys

    @classmethod
    def find(cls, model: Any, kwargs: dict) -> "BatchImages | None":
        """None for a batch that brings nothing of images."""
        given = {name: kwargs[name] for name in NAMES if kwargs.get(name) is not None}
        return cls(model, given) if given else None

    def read(self, ids: np.ndarray) -> str | None:
        """Finds of_row, of input_ids i64[N, S]; or why that is not possible."""
        if reason := vision_refusal(self.model.config, self):
            return reason
        counts = (ids == self.token).sum(1)
        if not self.pixels:
            found: Parts | None = None if counts.any() else [[] for _ in ids]
        elif self.pixels["pixel_values"].ndim == 5:
            found = self._by_row(counts)
        else:
            found = self._in_order(counts)
        if found is None:
            return "the rows' image tokens are not those of their images"
        keys = iter(_keys([part for parts in found for part, _ in parts]))
        self.of_row = [tuple(_image(part, n, next(keys)) for part, n in parts) for parts in found]
        return None

    def _by_row(self, counts: np.ndarray) -> Parts | None:
        """Tiles [N, n, C, height, width], of which those that are all 0 are padding, as the model has it."""
        real = self.pixels["pixel_values"].flatten(2).any(-1).cpu()
        if len(real) != len(counts) or ((counts > 0) != real.any(1).numpy()).any():
            return None
        return [
            [({name: value[i : i + 1, tiles] for name, value in self.pixels.items()}, n)] if n else []
            for i, (tiles, n) in enumerate(zip(real, counts.tolist()))
        ]

    def _in_order(self, counts: np.ndarray) -> Parts | None:
        """Images in the order of the rows: patches, with a grid for each image, or [n, C, height, width],
        with as many tokens each."""
        total, values = int(counts.sum()), self.pixels["pixel_values"]
        grid = self.pixels.get("image_grid_thw")
        if grid is None:
            tokens = [total // len(values)] * len(values)
            parts = [{"pixel_values": value} for value in values.split(1)]
        else:
            grid = grid.cpu()
            sizes = grid.prod(1)
            tokens = (sizes // self.model.config.vision_config.spatial_merge_size**2).tolist()
            some = zip(values.split(sizes.tolist()), grid.split(1))
            parts = [{"pixel_values": value, "image_grid_thw": shape} for value, shape in some]
        ends = np.array([0, *accumulate(tokens)])
        row_ends = np.array([0, *accumulate(counts.tolist())])
        at = np.searchsorted(ends, row_ends).clip(max=len(tokens))
        if not total or ends[-1] != total or (ends[at] != row_ends).any():
            return None
        pairs = list(zip(parts, tokens))
        return [pairs[start:end] for start, end in pairwise(at)]

    def refusal(self, group: PreferenceGroup, rows: list[int], lengths: np.ndarray) -> str | None:
        """Why these rows, whose prompt this is, cannot be computed as a group."""
        if (group.prompt == self.token).sum() != sum(image.tokens for image in group.images):
            return "an image stands behind what rows have in common"
        for row in rows:
            behind = int(lengths[row]) - len(group.prompt)
            for name, types in token_types(self.model, self, group, behind).items():
                given = self.types.get(name)
                if given is None or (given[row, : lengths[row]] != types).any():
                    return f"{name} are not those that {self.model.config.model_type} is known to take"
        return None

    def create_mm_token_type_ids(self, prompts: list[list[int]]) -> list[list[int]]:
        """1 for an image's tokens, as in transformers' processors."""
        return [[int(token == self.token) for token in prompt] for prompt in prompts]

    def __call__(self, images: list[list[Part]], **_: Any) -> Part:
        """What the model takes of these, as of one row's."""
        parts = [part for row in images for part in row]
        dim = int(parts[0]["pixel_values"].ndim == 5)
        return {name: torch.cat([part[name] for part in parts], dim) for name in parts[0]}


def _image(part: Part, tokens: int, key: int) -> Image:
    return Image(key.to_bytes(16), (0, 0), partial(dict, part), tokens)  # type: ignore[arg-type]  # not PIL's


def _keys(parts: list[Part]) -> list[int]:
    """The same number for parts that are equal, to the bit."""
    if not parts:
        return []
    sums = torch.stack([part["pixel_values"].contiguous().view(torch.uint8).sum() for part in parts]).tolist()
    known: dict[Any, list[int]] = defaultdict(list)  # those that may be equal, by the first place of each
    keys = []
    for place, (part, total) in enumerate(zip(parts, sums)):
        alike = known[total, *(value.shape for value in part.values())]
        same = (n for n in alike if all(torch.equal(parts[n][name], part[name]) for name in part))
        keys.append(next(same, place))
        if keys[-1] == place:
            alike.append(place)
    return keys
