"""A run's images: from what rows say to the records and texts that their prompts are made of."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.images.expansion import Expander, prints_parts
from fastdpo.data.images.given import IMAGE
from fastdpo.data.images.opening import Places, image_key, open_image
from fastdpo.data.report import RowProblem
from fastdpo.errors import DataError
from fastdpo.preferences import Image

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

File = tuple[str, int, int]  # its path, size (-1: there is none) and time of change


@dataclass(frozen=True)
class ImageReader:
    """How images are read, and as which tokens the model sees them."""

    processor: Any  # transformers' ProcessorMixin
    max_pixels: int | None = None  # larger images are made smaller
    media_dir: str | None = None  # where images may lie besides the data file's folder

    @cached_property
    def expander(self) -> Expander:
        return Expander(self.processor)

    def __reduce__(self):
        return ImageReader, (self.processor, self.max_pixels, self.media_dir)

    @cached_property
    def digest(self) -> str:
        """Of what decides tokens and pixels, where a row is the same."""
        return f"{self.expander.digest} {self.max_pixels} {self.media_dir}"

    def open(self, source: Any, field: str, folder: Path | None, notes: Counter | None = None) -> "Picture":
        """Raises RowProblem."""
        return open_image(source, field, self.places(folder), self.max_pixels, notes)

    def places(self, folder: Path | None) -> Places:
        return Places(folder, Path(self.media_dir).expanduser() if self.media_dir else None)

    def read(
        self, sources: Sequence[Any], folder: Path | None, notes: Counter, files: list[File]
    ) -> "Pictures":
        """A row's images; adds to `files` where each was looked for. Raises RowProblem."""
        images = []
        for number, source in enumerate(sources):
            field = f"images[{number}]"
            files += map(file_at, self.places(folder).of(source))  # as they are before they are opened
            picture = self.open(source, field, folder, notes)
            key, of = image_key(picture, self.expander.digest), self.expander.of(picture.size)
            again = partial(self.open, source, field, folder)
            images.append(Image(key, picture.size, again, int(of.runs.sum())))
        if images:
            notes["images"] += len(images)
        return Pictures(self.expander, tuple(images))

    def reopened(self, number: int, place: int, key: bytes, row: Callable[[], Any]) -> "Picture":
        """An image of a row that was tokenised before, by row(): (its sources, their folder). Raises
        DataError where it is another one now."""
        field = f"images[{place}]"
        try:
            sources, folder = row()
            picture = self.open(sources[place], field, folder)
        except RowProblem as problem:
            raise DataError(f"row {number} cannot be read again: {problem}") from None
        if image_key(picture, self.expander.digest) != key:
            raise DataError(
                f"row {number}: {field} is not the image that was there when the rows were tokenised; start "
                "the command again, which reads them anew"
            )
        return picture


@dataclass(frozen=True)
class Pictures:
    """One row's images, as its texts have them."""

    expander: Expander
    images: tuple[Image, ...]

    def for_template(self, messages: list[dict]) -> list[dict]:
        """The messages as the model's chat template takes them: contents as parts where one is an image, or
        where it prints no others; or else the placeholder in the text."""
        parts, text = self.expander.by_parts, self.expander.by_text
        return [self._said(m, parts and (IMAGE in (m["content"] or "") or not text)) for m in messages]

    def _said(self, message: dict, by_parts: bool) -> dict:
        content = message["content"]
        if not isinstance(content, str):
            return message
        if not by_parts:
            return {**message, "content": content.replace(IMAGE, self.expander.placeholder)}
        pieces = [piece for piece in re.split(f"({IMAGE})", content) if piece] or [""]
        of = lambda piece: {"type": "image"} if piece == IMAGE else {"type": "text", "text": piece}
        return {**message, "content": list(map(of, pieces))}

    def expanded(self, text: str, messages: list[dict]) -> str:
        """The text of messages, in which a placeholder stands for each of their images, with these images'
        tokens, each run of them as one. Raises RowProblem."""
        if prints_parts(text) and not any(prints_parts(message["content"] or "") for message in messages):
            message = "the chat template prints a content's parts as a list; use one that reads them"
            raise RowProblem("template_error", "messages", message)
        wanted = sum((message["content"] or "").count(IMAGE) for message in messages)
        pieces = text.split(self.expander.placeholder)
        if len(pieces) - 1 != wanted:
            placeholder, there = self.expander.placeholder, len(pieces) - 1
            message = f"the chat template prints {placeholder} {there} time(s), of {wanted} image(s)"
            raise RowProblem("image_count", "messages", message)
        return self._filled(pieces)

    def plain(self, prompt: str) -> str:
        """A prompt of plain text with its images' tokens, each run of them as one."""
        if not self.images:
            return prompt
        behind, end = self.expander.frame
        head, _, rest = prompt.rpartition(IMAGE)
        return self._filled((head + IMAGE + behind + rest + end).split(IMAGE))

    def _filled(self, pieces: list[str]) -> str:
        texts = [self.expander.of(image.size).text for image in self.images[: len(pieces) - 1]]
        return "".join(part for pair in zip(pieces, [*texts, ""]) for part in pair)

    def repeats(self, ids: np.ndarray) -> np.ndarray:
        """How often each of a text's ids is to stand, i64[n]: image tokens as often as their runs are long.
        Raises RowProblem where there are more or fewer of them than runs."""
        runs = np.concatenate([np.zeros(0, np.int64), *(self.expander.of(i.size).runs for i in self.images)])
        places = np.flatnonzero(ids == self.expander.token_id)
        if len(places) != len(runs):
            message = f"{self.expander.token} stands in its text, which is a token for images; remove it"
            raise RowProblem("image_in_response", "responses", message)
        times = np.ones(len(ids), np.int64)
        times[places] = runs
        return times


def file_at(path: Path) -> File:
    try:
        stat = path.stat()
    except OSError:
        return str(path), -1, 0
    return str(path), stat.st_size, stat.st_mtime_ns


def unchanged(files: Sequence[Sequence]) -> bool:
    """Whether files are what they were when their images were read, or looked for."""
    return all(file_at(Path(file[0])) == tuple(file) for file in files)
