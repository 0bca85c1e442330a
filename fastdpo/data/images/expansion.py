"""What a processor makes of an image's placeholder in a text: the tokens that stand for the image.

The processor itself is asked, once for each size of an image, with a blank one: what it hands to its
tokenizer is the text with all image tokens, whatever the family. A run of image tokens is one in our texts,
with its length beside it, so that no text is tokenised with a thousand tokens that are all the same.
"""

import copy
import json
import re
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PIL
from xxhash import xxh3_128_hexdigest

from fastdpo.errors import ModelError

_MARK = "\ufdd1"
_SMALL = (32, 32)
# as a blank image needs it, whose pixels nobody looks at: these decide no size
_CHEAPLY = {"do_rescale": False, "do_normalize": False, "resample": PIL.Resampling.NEAREST}
# what it prints around images is in a row's token ids
_NOT_THE_PROCESSOR = {"name_or_path", "_name_or_path", "transformers_version", "processor_class", "tokenizer"}
_NOT_THE_PROCESSOR |= {"chat_template"}


class Expansion(NamedTuple):
    """Of one image."""

    text: str  # each run of image tokens as one
    runs: np.ndarray  # i64[n]: how many each of these stands for


class _Recorder:
    """A tokenizer that remembers the text it was given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.text = tokenizer, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["tokenizer"], name)

    def __call__(self, text, *args, **kwargs):
        (self.text,) = [text] if isinstance(text, str) else text
        return self.tokenizer(text, *args, **kwargs)


class Expander:
    """Of one processor. Raises ModelError for one that says no image token."""

    def __init__(self, processor):
        self.processor = processor
        tokenizer = processor.tokenizer
        self.token = str(getattr(tokenizer, "image_token", None) or getattr(processor, "image_token", ""))
        self.token_id = tokenizer.convert_tokens_to_ids(self.token) if self.token else None
        if self.token_id is None or self.token_id == tokenizer.unk_token_id:
            name = type(processor).__name__
            raise ModelError(f"{name}: the processor names no image token that its tokenizer knows")
        self._known: dict[tuple[int, int], Expansion] = {}

    def __reduce__(self):
        return Expander, (self.processor,)

    def of(self, size: tuple[int, int]) -> Expansion:
        """Of an image of this (width, height)."""
        if size not in self._known:
            whole = self._once(size)
            runs = [len(run[0]) // len(self.token) for run in self._run.finditer(whole)]
            self._known[size] = Expansion(self._run.sub(self.token, whole), np.array(runs, np.int64))
        return self._known[size]

    @cached_property
    def frame(self) -> tuple[str, str]:
        """What the processor puts behind a prompt's last image and behind the prompt: nothing, but of
        PaliGemma."""
        one, _, end = self._printed(self.placeholder + _MARK, _SMALL).partition(_MARK)
        two, _, _ = self._printed(self.placeholder * 2 + _MARK, _SMALL, 2).partition(_MARK)
        return one[len(two) - len(one) :], end  # a second image adds what one becomes

    @cached_property
    def placeholder(self) -> str:
        """What stands for an image in a text that the processor is given."""
        names = [getattr(self.processor, name, None) for name in ("boi_token", "image_token")]
        for name in dict.fromkeys([*filter(None, names), self.token]):
            try:
                if self._printed(name, _SMALL).count(self.token) > 0:
                    return name
            except (ValueError, IndexError, StopIteration):
                continue  # it counts other placeholders
        raise ModelError(f"{type(self.processor).__name__}: no placeholder of an image is known to it")

    @cached_property
    def by_parts(self) -> bool:
        """Whether the chat template prints an image that is a part of a message."""
        text = self._asked([{"type": "image"}, {"type": "text", "text": _MARK}])
        return self.placeholder in text and _MARK in text and not prints_parts(text)

    @cached_property
    def by_text(self) -> bool:
        """Whether it prints a message whose content is text."""
        return _MARK in self._asked(_MARK)

    def _asked(self, content: Any) -> str:
        """What the template prints of such a user's turn; nothing where it refuses it."""
        try:
            said = [{"role": "user", "content": content}]
            return str(self.processor.tokenizer.apply_chat_template(said, tokenize=False))
        except Exception:  # a template is a program, and fails like one
            return ""

    @cached_property
    def digest(self) -> str:
        """Of what decides the pixels that the model gets, and the tokens of an image."""
        images = self.processor.image_processor
        said = {"image": _plain(images.to_dict()), "processor": _plain(vars(self.processor))}
        names = type(self.processor).__name__, type(images).__name__
        return xxh3_128_hexdigest(json.dumps([names, said], sort_keys=True, default=str).encode())

    @cached_property
    def _run(self) -> re.Pattern:
        return re.compile(f"(?:{re.escape(self.token)})+")

    def _once(self, size: tuple[int, int]) -> str:
        """What one placeholder becomes."""
        before, _, _ = self._printed(self.placeholder + _MARK, size).partition(_MARK)
        return before.removesuffix(self.frame[0])

    def _printed(self, text: str, size: tuple[int, int], images: int = 1) -> str:
        """The text that the processor hands to its tokenizer."""
        recorder, processor = _Recorder(self.processor.tokenizer), copy.copy(self.processor)
        processor.tokenizer = recorder
        processor(images=[[PIL.new("RGB", size)] * images], text=[text], **_CHEAPLY)
        return recorder.text


def prints_parts(text: str) -> bool:
    """Whether a template has printed a list of parts as Python writes it."""
    return "'type': 'text'" in text or "'type': 'image'" in text


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Those that are data, without names and versions."""
    kept = {name: value for name, value in values.items() if name not in _NOT_THE_PROCESSOR}
    return {name: value for name, value in kept.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)
