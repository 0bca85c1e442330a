"""Images as people are shown them."""

import base64
import io

import numpy as np
import pytest
from PIL import Image as PIL

from fastdpo.data.images import shown
from fastdpo.data.images.expansion import Expander
from tests import images


def opened(text):
    return PIL.open(io.BytesIO(base64.b64decode(text, validate=True)))


@pytest.mark.parametrize(
    "size, small",
    [((640, 480), (160, 120)), ((300, 1200), (40, 160)), ((8, 16), (8, 16)), ((900, 1), (160, 1))],
)
def test_a_thumbnail_is_a_small_jpeg(size, small):
    picture = PIL.new("RGB", size, (200, 30, 30))
    made = opened(shown.thumbnail(picture))
    assert made.format == "JPEG" and made.size == small and picture.size == size
    assert np.abs(np.asarray(made, int) - [200, 30, 30]).max() < 10


def test_what_is_told_of_an_image():
    told = shown.as_json(images.image(3, (48, 320)))
    assert told["size"] == [48, 320] and told["tokens"] == 0
    assert opened(told["thumbnail"]).size == (24, 160)


@pytest.mark.parametrize("family", images.FAMILIES)
def test_an_image_is_one_token(family):
    """And nothing else of the prompt is left out, but what the processor prints around an image."""
    expander = Expander(images.processor(family))
    tokenizer = expander.processor.tokenizer
    words = lambda ids: tokenizer.decode([i for i in ids if i not in tokenizer.added_tokens_decoder]).split()
    for group in images.groups(family):
        ids = shown.one_token_each(group, expander)
        assert ids.count(expander.token_id) == len(group.images)
        assert words(ids) == words(group.prompt.tolist())
        assert not any("row_" in token or "fake_" in token for token in tokenizer.convert_ids_to_tokens(ids))
    assert shown.one_token_each(group, expander) == group.prompt.tolist()  # the last has none
