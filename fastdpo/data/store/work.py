"""The rows of one data set -> its shards, one by one: what any process can do that is handed this."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
from xxhash import xxh3_128_hexdigest

from fastdpo.data.chat.arguments import Chat
from fastdpo.data.groups import Given, Limits, Tools, shard_of
from fastdpo.data.images.reader import ImageReader
from fastdpo.data.sources import Rows, Source
from fastdpo.data.store.folder import Folder
from fastdpo.data.store.key import as_it_was, tokenizer_digest
from fastdpo.data.store.shards import Shard, encoded, read_whole
from fastdpo.data.tokenizing import Encoder


@dataclass(frozen=True)
class Making:
    """What rows are tokenised with."""

    tokenizer: object
    limits: Limits
    chat: Chat
    images: ImageReader | None = None  # of a model that reads some
    prompts_only: bool = False  # rows of a prompt alone are read too

    def __reduce__(self):  # the rest is found out again
        return Making, (self.tokenizer, self.limits, self.chat, self.images, self.prompts_only)

    @cached_property
    def tokenizer_digest(self) -> str | None:
        return tokenizer_digest(self.tokenizer)


@dataclass(frozen=True)
class Made:
    """A shard: in the folder, or where it could not be written, its bytes and why."""

    where: Path | bytes
    problem: str = ""


@dataclass(frozen=True)
class Work:
    """It can be pickled, if the tokenizer can."""

    source: Source
    rows: Rows
    making: Making
    folder: Folder | None  # None: nothing is written
    shard_rows: int
    many: bool = False  # shards to make

    @cached_property
    def _encoder(self) -> Encoder:
        return Encoder(self.making.tokenizer, self.many)

    @property
    def shards(self) -> int:
        return math.ceil(len(self.rows) / self.shard_rows)

    def size(self, number: int) -> int:
        """Rows that a shard is made of."""
        start, stop = self._bounds(number)
        return stop - start

    def make(self, number: int, write: bool = True) -> Made:
        """Raises DataError, also where the data changed since it was found: a shard holds what its name in
        the folder, which is a hash of the data too, says."""
        folder = self.folder if write else None
        if folder is not None:
            if found := self._found(number):
                return Made(found)
            folder.claim(number)
        start, stop = self._bounds(number)
        how = self.making
        tools = Tools(self._encoder, how.limits, how.chat, how.images, how.prompts_only)
        groups, account = shard_of(self.rows, range(start, stop), self._given(start, stop), tools)
        self.source.check_unchanged()
        data = encoded(groups, account)
        if folder is None:
            return Made(data.to_pybytes())
        try:
            return Made(folder.write(number, data))
        except OSError as error:
            return Made(data.to_pybytes(), error.strerror or str(error))

    def _given(self, start: int, stop: int) -> Iterator[Given]:
        with self.source.named():
            for at, row in enumerate(self.rows.range(start, stop), start):
                yield Given(at, row, self.rows.folder_of(at))

    def open(self, number: int, made: Made) -> Shard:
        try:
            return Shard(made.where if isinstance(made.where, Path) else pa.py_buffer(made.where))
        except OSError:  # somebody has just removed it
            return self.open(number, self.make(number, write=False))

    def _bounds(self, number: int) -> tuple[int, int]:
        start = number * self.shard_rows
        return start, min(start + self.shard_rows, len(self.rows))

    def _found(self, number: int) -> Path | None:
        """Of another run, which was quicker."""
        assert self.folder is not None
        for file, of, digest in self.folder.shards():
            if of == number and (shard := opened(file, digest)):
                if as_it_was(shard.account, self.making.chat.clock):
                    return file
        return None


def opened(file: Path, digest: str) -> Shard | None:
    """None for one that is damaged, or cannot be read."""
    try:
        read = read_whole(file)
        return Shard(file, read) if xxh3_128_hexdigest(read) == digest else None
    except (OSError, ValueError, LookupError):
        return None
