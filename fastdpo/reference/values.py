"""The reference's log-probs of a run's responses: the numbers in a file, where they are in it in memory."""

import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np

from fastdpo.data.store.facts import HASH
from fastdpo.errors import TrainingError

IN_MEMORY = 8 << 20  # bytes of log-probs; where there are more, all of them go to the file
FLOAT = np.dtype("<f4")


class Values:
    """Of the wanted responses, f32[n] each; some 40 bytes of memory a response.

    The file has no name and ends with the process. It is in `folder` where that can be written, else where
    temporary files are.
    """

    def __init__(self, wanted: np.ndarray, folder: Path | None):
        """wanted: V16[n], sorted and each once, as np.unique gives them."""
        self._keys, self._heads, self._folder = wanted, _heads(wanted), folder
        self.clear()

    def clear(self) -> None:
        n = len(self._keys)  # the place of all that is not wanted
        self._start = np.full(n + 1, -1, np.int64)  # of each one's numbers in the file; -1 where not known
        self._length = np.zeros(n + 1, np.int32)
        self._end = 0
        writable = self._folder is not None and os.access(self._folder, os.W_OK)
        self._where = str(self._folder) if writable else tempfile.gettempdir()
        self._way_out = "reference_cache to a file" if writable else "TMPDIR to a folder"
        self._file = tempfile.SpooledTemporaryFile(IN_MEMORY, dir=self._where)

    def __del__(self):
        with contextlib.suppress(AttributeError, OSError):  # a full disk has been told
            self._file.close()

    @property
    def wanted(self) -> np.ndarray:
        """V16[n], as given."""
        return self._keys

    def stored(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """i32[n] and f32, as `add` takes them; all of them are known."""
        values = self.of(keys)
        assert values is not None
        return self._length[self._places(keys)], values

    @property
    def count(self) -> int:
        """How many are known."""
        return int((self._start >= 0).sum())

    def known(self, keys: np.ndarray) -> np.ndarray:
        """bool[n] of V16[n]"""
        return self._start[self._places(keys)] >= 0

    def add(self, keys: np.ndarray, lengths: np.ndarray, values: np.ndarray, anew=False) -> None:
        """Takes V16[n], i32[n] and f32, one response after the other; of the same ones the first. What is not
        wanted is left out; what is known stays as it is, but where `anew` (bool, or bool[n]) is True."""
        places = self._places(keys)
        first = np.zeros(len(places), bool)
        first[np.unique(places, return_index=True)[1]] = True
        taken = first & (places < len(self._keys)) & ((self._start[places] < 0) | anew)
        if not taken.all():
            values = values[np.repeat(taken, lengths)]
            places, lengths = places[taken], lengths[taken]
        if not len(places):
            return
        try:
            self._file.seek(self._end * FLOAT.itemsize)
            self._file.write(np.ascontiguousarray(values, FLOAT).data)
            self._file.flush()
        except OSError as error:
            raise TrainingError(
                f"reference: the temporary file of its log-probs in {self._where} cannot be written "
                f"({error.strerror}). It takes 4 bytes a scored token of all rows: make room there, or set "
                f"{self._way_out} on a larger disk. What the reference cache has stored is found again"
            ) from None
        self._start[places] = self._end + np.cumsum(lengths) - lengths
        self._length[places] = lengths
        self._end += len(values)

    def of(self, keys: np.ndarray) -> np.ndarray | None:
        """f32, one response after the other; None where one is not known."""
        places = self._places(keys)
        starts, ends = self._start[places], self._start[places] + self._length[places]
        if (starts < 0).any():
            return None
        follows = np.concatenate([[False], starts[1:] == ends[:-1]])[: len(starts)]
        ends = ends[np.append(~follows[1:], True)[: len(starts)]]  # those that lie in a row are read at once
        pieces = []
        for start, end in zip((FLOAT.itemsize * starts[~follows]).tolist(), (FLOAT.itemsize * ends).tolist()):
            self._file.seek(start)
            pieces.append(self._file.read(end - start))
        return np.frombuffer(bytearray().join(pieces), FLOAT)

    def sums(self, keys: np.ndarray, at_once: int = 4096) -> np.ndarray:
        """f64[n]: each response's sum; all of them are known."""
        sums = []
        for first in range(0, len(keys), at_once):
            some = keys[first : first + at_once]
            lengths, values = self._length[self._places(some)], self.of(some)
            assert values is not None
            sums.append(np.add.reduceat(values.astype(np.float64), np.cumsum(lengths) - lengths))
        return np.concatenate([np.zeros(0), *sums])

    def _places(self, keys: np.ndarray) -> np.ndarray:
        """Where in the index each key is: by its first 8 bytes, four times as fast as by all of it."""
        n = len(self._keys)
        places = self._heads.searchsorted(_heads(keys))
        if not n:
            return places
        other = self._keys[np.minimum(places, n - 1)] != keys
        if other.any():  # not wanted, or one that begins as another does
            exact = self._keys.searchsorted(keys[other])
            places[other] = np.where(self._keys[np.minimum(exact, n - 1)] == keys[other], exact, n)
        return places


def _heads(keys: np.ndarray) -> np.ndarray:
    """u64[n] in the order of the keys."""
    return np.ascontiguousarray(keys).view(">u8")[::2].astype(np.uint64)


def as_keys(keys: bytes | list[bytes]) -> np.ndarray:
    """V16[n]"""
    return np.frombuffer(keys if isinstance(keys, bytes) else b"".join(keys), HASH)
