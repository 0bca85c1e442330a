"""Prompts with images: what a family of models makes of them beyond tokens one after the other.

Pixels, and how they lie in a batch, are the matter of transformers' processors. Three facts are told here by
`config.model_type`: which families share prompts, which place images in height and width, and which tokens
see each other both ways.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.beginnings import Branch
from fastdpo.data.layout import Prompt
from fastdpo.data.packing import pack
from fastdpo.errors import DataError, ModelError
from fastdpo.preferences import Image
from fastdpo.records import PackedGroups, PreferenceGroup

IN_HEIGHT_AND_WIDTH = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}
SHARED = IN_HEIGHT_AND_WIDTH | {"smolvlm", "idefics3", "llava", "internvl", "gemma3", "paligemma"}
DROPS_BLACK = {"smolvlm", "idefics3"}  # images whose pixels are all 0 count as padding there
TYPES = ("token_type_ids", "mm_token_type_ids")
_OF_TEXT = {"input_ids", "attention_mask", "position_ids", "labels", *TYPES}


def pack_with_images(
    core: Any, processor: Any, groups: Sequence[PreferenceGroup], share: bool, tree: Sequence[Branch] | None
) -> PackedGroups:
    """packing.pack for a model that sees images: with what it takes of them. Separate rows are left to the
    model's own forward, with what its processor gives, each image as often as its group has responses."""
    if not share:
        rows = [group for group in groups for _ in group.responses]
        batch = pack(groups, share)
        images = _padded_types(core, processor, rows, batch.input_ids.shape[1])
        if any(group.images for group in groups):
            images |= pixels(core, processor, rows, in_one=core.config.model_type in SHARED)
        return replace(batch, images=images)
    images = pixels(core, processor, groups, once=True) if any(group.images for group in groups) else {}
    once = _by_key(groups)
    prompts = [
        Prompt(blocks_of(core.config, group.prompt), _positions(core, group, images, list(once)))
        for group in groups
    ]
    # prompts that begin with the same tokens may have other images, or see what is behind these tokens
    plain = not images and not any(prompt.blocks for prompt in prompts)
    packed = pack(groups, share, tree if plain else None, prompts)
    return replace(packed, images=images, features=_features(groups, once))


def _by_key(rows: Sequence[PreferenceGroup]) -> dict[bytes, Image]:
    """Each of their images once, in the order of their first places."""
    return {image.key: image for row in rows for image in row.images}


def _features(groups: Sequence[PreferenceGroup], once: dict[bytes, Image]) -> Tensor | None:
    """PackedGroups.features."""
    placed = [image for group in groups for image in group.images]
    if len(placed) == len(once):
        return None
    first = dict(zip(once, accumulate((image.tokens for image in once.values()), initial=0)))
    return torch.cat([first[image.key] + torch.arange(image.tokens) for image in placed])


@contextlib.contextmanager
def repeated(model: Any, features: Tensor | None) -> Iterator[None]:
    """Inside, the model places these of its images' features, of which some images have several places."""
    if features is None:
        yield
        return
    encode, own = model.get_image_features, "get_image_features" in vars(model)

    def placed(*args, **kwargs):
        found = encode(*args, **kwargs)
        found.pooler_output = _taken(found.pooler_output, features)
        if deeper := getattr(found, "deepstack_features", None):  # Qwen3-VL: what its first layers add
            found.deepstack_features = [_taken(layer, features) for layer in deeper]
        return found

    model.get_image_features = placed
    try:
        yield
    finally:
        if own:
            model.get_image_features = encode
        else:
            del model.get_image_features


def _taken(found: Any, features: Tensor) -> Any:
    """Features of some images, one after the other or image by image, as those of a single one."""
    if isinstance(found, Tensor):
        rows = found.flatten(0, -2)[features.to(found.device)]
        return rows if found.dim() == 2 else rows[None]
    rows = torch.cat(tuple(found))
    return (rows[features.to(rows.device)],)


def pixels(
    core: Any, processor: Any, rows: Sequence[PreferenceGroup], in_one: bool = True, once: bool = False
) -> dict[str, Tensor]:
    """What the model takes of these rows' images, in order, from its own processor: all as those of one row,
    or row by row; `once`: each image in its first place alone. Raises DataError, as Image.open does, and for
    an image that the model would drop."""
    opened = {key: image.open() for key, image in _by_key(rows).items()}
    given = [[opened[image.key] for image in row.images] for row in rows]
    if once:
        given = [list(opened.values())]
    elif in_one:
        given = [[one for some in given for one in some]]
    found = _processed(processor, given)
    takes = inspect.signature(core.base_model.forward).parameters
    taken = {
        name: value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
        for name, value in found.items()
        if name in takes and name not in _OF_TEXT
    }
    known = set(processor.image_processor.model_input_names)
    if others := sorted(taken.keys() - known):  # made of a text, which here is none of the rows'
        name = type(core).__name__
        raise ModelError(f"{name} takes {', '.join(others)} beside pixels, which fastdpo does not know yet")
    if core.config.model_type in DROPS_BLACK and _any_black(taken):
        for row in rows:
            for number, image in enumerate(row.images, 1):
                if _any_black(_processed(processor, [[opened[image.key]]])):
                    name = type(core).__name__
                    raise DataError(f"row {row.row}: image {number} is all black, which {name} drops")
    return taken


def _processed(processor: Any, pictures: list[list]) -> Any:
    """The processor's answer to rows of pictures; some processors ask for a text that has them."""
    token = getattr(processor, "image_token", None)
    text = {} if token is None else {"text": [token * len(some) for some in pictures], "padding": True}
    return processor(images=pictures, return_tensors="pt", **text)


def _any_black(found: Any) -> bool:
    """Whether a picture, or a tile of one, is all 0."""
    seen: Tensor = found["pixel_values"].flatten(0, 1).flatten(1).any(1)
    return not bool(seen.all())


def blocks_of(config: Any, prompt: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(start, end) of a prompt's tokens that see each other both ways."""
    if config.model_type == "paligemma":
        return ((0, len(prompt)),)
    if config.model_type != "gemma3":
        return ()
    inside = np.concatenate([[False], prompt == config.image_token_id, [False]])
    bounds = np.flatnonzero(inside[1:] != inside[:-1]).tolist()
    return tuple(zip(bounds[::2], bounds[1::2]))


def _positions(
    core: Any, group: PreferenceGroup, images: dict[str, Tensor], keys: list[bytes]
) -> np.ndarray | None:
    """i64[3, n] of a prompt's tokens, by the model's own rule; None where they are plain. `keys`: of the
    batch's images."""
    if not group.images or core.config.model_type not in IN_HEIGHT_AND_WIDTH:
        return None
    ids = torch.from_numpy(group.prompt)[None]
    found, delta = core.base_model.get_rope_index(
        ids,
        mm_token_type_ids=(ids == core.config.image_token_id).int(),
        image_grid_thw=images["image_grid_thw"][[keys.index(image.key) for image in group.images]],
    )
    if int(found.max()) + 1 != len(group.prompt) + int(delta):
        raise RuntimeError(f"positions end at {int(found.max())}, and generation would begin elsewhere")
    positions: np.ndarray = found[:, 0].numpy()
    return positions


def token_types(core: Any, processor: Any, group: PreferenceGroup, behind: int) -> dict[str, np.ndarray]:
    """What the model takes beside a row's ids (the prompt and `behind` tokens of a response) to know its
    images by, as its processor gives it: i64[n] each."""
    takes = inspect.signature(core.forward).parameters
    names = [name for name in TYPES if name in takes]
    if not names or processor is None:
        return {}
    if core.config.model_type == "paligemma":  # 0 in what sees both ways
        types, later = np.zeros(len(group.prompt), np.int64), 1
    else:
        types = np.array(processor.create_mm_token_type_ids([group.prompt.tolist()])[0], np.int64)
        later = 0
    return {name: np.concatenate([types, np.full(behind, later)]) for name in names}


def _padded_types(
    core: Any, processor: Any, rows: Sequence[PreferenceGroup], width: int
) -> dict[str, Tensor]:
    """token_types of each row, i64[R, width]."""
    found = [token_types(core, processor, row, width - len(row.prompt)) for row in rows]
    return {name: torch.from_numpy(np.stack([types[name] for types in found])) for name in found[0]}


def row_inputs(core: Any, processor: Any, group: PreferenceGroup, behind: int) -> dict[str, Tensor]:
    """What the model takes beside the ids of one row, a prompt and `behind` tokens of a response, as its
    processor would give it."""
    types = token_types(core, processor, group, behind)
    given = {name: torch.from_numpy(value)[None] for name, value in types.items()}
    return given | (pixels(core, processor, [group]) if group.images else {})


def vision_refusal(config: Any, processor: Any) -> str | None:
    """Why a model of this transformers config, which sees images, cannot share prompts, as far as its family
    tells."""
    if processor is None or config.model_type in SHARED:
        return None
    return f"how {config.model_type} places images is not known here"
