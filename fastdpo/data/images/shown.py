"""Images as people are shown them: small, and one word of a prompt's text."""

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.images.expansion import Expander
from fastdpo.preferences import Image, PreferenceGroup

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

_LONGEST = 160  # pixels of a thumbnail's longer side


def as_json(image: Image) -> dict[str, Any]:
    """Its size and tokens, and a thumbnail: a JPEG in base64. Raises DataError, as Image.open does."""
    return {"size": list(image.size), "tokens": image.tokens, "thumbnail": thumbnail(image.open())}


def thumbnail(picture: "Picture") -> str:
    small, file = picture.copy(), io.BytesIO()
    small.thumbnail((_LONGEST, _LONGEST))
    small.save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def one_token_each(group: PreferenceGroup, expander: Expander) -> list[int]:
    """The prompt, in which one image token stands for all that the processor makes of an image."""
    ids, kept, done = group.prompt.tolist(), [], 0
    places = np.flatnonzero(group.prompt == expander.token_id).tolist()
    for image in group.images:
        text, runs = expander.of(image.size)
        count = int(runs.sum())
        start, end = places[0], places[count - 1] + 1
        before, behind = (_ids(expander, text.split(expander.token)[side]) for side in (0, -1))
        start -= len(before) * (ids[max(start - len(before), 0) : start] == before)
        end += len(behind) * (ids[end : end + len(behind)] == behind)
        kept += [*ids[done:start], expander.token_id]
        places, done = places[count:], end
    return kept + ids[done:]


def _ids(expander: Expander, text: str) -> Sequence[int]:
    """Of what a processor prints around an image, without white space, whose tokens may hold more."""
    ids: list[int] = expander.processor.tokenizer.encode(text.strip(), add_special_tokens=False)
    return ids
