"""Some rows' groups as one Arrow IPC file, on disk or in memory: a row a group, token ids as int32, and in
the schema's metadata the account of all rows that it was made of. Any Arrow reader can read it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fastdpo.data.store.digests import BYTES
from fastdpo.data.store.facts import HASH, Facts
from fastdpo.preferences import Image, PreferenceGroup, Response

OpenImage = Callable[[int, int, bytes], Any]  # (row's number, image's number, its key) -> a picture
_ACCOUNT = b"fastdpo.account"


def encoded(groups: Sequence[PreferenceGroup], account: dict) -> pa.Buffer:
    """The bytes of a shard; `account` is anything JSON-like."""
    facts = Facts.of(groups)
    responses = [response for group in groups for response in group.responses]
    prompts = _lists([group.prompt for group in groups], np.int32)
    masks = _lists([response.target_mask for response in responses], np.bool_)
    weights = [response.token_weight for response in responses]
    of_responses = {
        "ids": _lists([response.ids for response in responses], np.int32),
        "target_mask": masks,
        "token_weight": _lists([() if w is None else w for w in weights], np.float32),
        **{name: _column(getattr(facts, name)) for name in _OF_RESPONSES},
    }
    of_pairs = {"winner": facts.pairs[:, 0], "loser": facts.pairs[:, 1]}
    of_pairs |= {"offset": facts.offset, "weight": facts.weight}
    columns = {
        **{name: _column(getattr(facts, name)) for name in _OF_GROUPS},
        "prompt": prompts,
        "image_keys": _lists([_image_keys(group) for group in groups], np.uint8),
        "image_facts": _lists([_image_facts(group) for group in groups], np.int32),
        "responses": _structs(of_responses, facts.cu_resp),
        "pairs": _structs({name: pa.array(values) for name, values in of_pairs.items()}, facts.cu_pairs),
    }
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    schema = batch.schema.with_metadata({_ACCOUNT: json.dumps(account).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    return sink.getvalue()


class Shard:
    """An encoded shard, opened. A file is read once, for what is known of its groups, and mapped for their
    tokens, of which only what is asked for is in memory: pages of a mapping count as memory of the process.
    """

    def __init__(self, source: pa.Buffer | Path, read: pa.Buffer | None = None):
        """`read`: the file's content, where that is at hand. Raises OSError or pa.ArrowInvalid for what is no
        shard."""
        if isinstance(source, Path):
            read = read_whole(source) if read is None else read
            with pa.memory_map(str(source)) as file:
                whole = file.read_buffer()  # holds the mapping, where the file is closed
        else:
            whole = read = source
        reader = pa.ipc.open_file(pa.BufferReader(read))
        batch = reader.get_batch(0)
        self.account: dict = json.loads(reader.schema.metadata[_ACCOUNT])
        self._size, responses = batch.num_rows, batch.column("responses")
        self._cu_resp = _values(responses.offsets)
        place = lambda lists: _Ragged(lists, read, whole)
        self._prompt, self._image_keys, self._image_facts = (
            place(batch.column(name)) for name in ("prompt", "image_keys", "image_facts")
        )
        self._ids, self._weight, masks = (
            place(responses.values.field(name)) for name in ("ids", "token_weight", "target_mask")
        )
        self._bits = masks.values
        self._facts: Facts | None = _facts(batch)

    def __len__(self) -> int:
        return self._size

    def facts(self, first: int = 0) -> Facts:
        """Rows are numbered from `first`. Handed over once, so that they are in memory once."""
        facts, self._facts = self._facts, None
        assert facts is not None
        return replace(facts, row=facts.row + first)

    def group(
        self, place: int, facts: Facts, at: int, open_image: OpenImage | None = None
    ) -> PreferenceGroup:
        """The group at `place` here, read; it is the one at `at` of the facts. `open_image`: see load.py."""
        first, end = facts.cu_resp[at : at + 2].tolist()
        here = int(self._cu_resp[place])
        numbers = zip(range(here, here + end - first), range(first, end))
        responses = tuple(self._response(number, facts, known) for number, known in numbers)
        prompt = self._prompt[place].astype(np.int64)
        images = self._images(place, int(facts.row[at]), open_image) if facts.images[at] else ()
        return PreferenceGroup(int(facts.row[at]), prompt, responses, facts.pairs_of(at), images=images)

    def _images(self, place: int, row: int, open_image: OpenImage | None) -> tuple[Image, ...]:
        assert open_image is not None  # or no row would have images
        keys = self._image_keys[place].tobytes()
        found = []
        for number, (*size, tokens) in enumerate(self._image_facts[place].reshape(-1, 3).tolist()):
            key = keys[number * BYTES : (number + 1) * BYTES]
            found.append(Image(key, tuple(size), partial(open_image, row, number, key), tokens))
        return tuple(found)

    def _response(self, number: int, facts: Facts, known: int) -> Response:
        start, end = self._ids.offsets[number : number + 2].tolist()
        bits = np.unpackbits(self._bits[start >> 3 : (end + 7) >> 3], bitorder="little")
        return Response(
            self._ids[number].astype(np.int64),
            bits[start & 7 : (start & 7) + end - start].view(bool),
            *facts.said(known),
            self._weight[number].copy() if facts.relevant[known] >= 0 else None,
            facts.key[known].tobytes(),
        )


_OF_GROUPS = ("row", "largest", "digest", "trained", "prompt_key", "images", "image_tokens")
_OF_RESPONSES = ("scored", "first", "relevant", "key", "score", "ref_logp", "label")


def read_whole(file: Path) -> pa.Buffer:
    with pa.OSFile(str(file)) as opened:
        return opened.read_buffer()


def _facts(batch: pa.RecordBatch) -> Facts:
    lists, pairs = batch.column("responses"), batch.column("pairs")
    lengths = lambda of: np.diff(_numpy(of.offsets)).astype(np.int32)
    return Facts(
        **{name: _values(batch.column(name)) for name in _OF_GROUPS},
        **{name: _values(lists.values.field(name)) for name in _OF_RESPONSES},
        prompt=lengths(batch.column("prompt")),
        length=lengths(lists.values.field("ids")),
        whole=np.zeros(len(batch), bool),
        cu_resp=_numpy(lists.offsets).astype(np.int64),
        cu_pairs=_numpy(pairs.offsets).astype(np.int64),
        pairs=np.stack([_numpy(pairs.values.field(name)) for name in ("winner", "loser")], 1),
        offset=_values(pairs.values.field("offset")),
        weight=_values(pairs.values.field("weight")),
    )


class _Ragged:
    """Arrays of different lengths, in one; it lies in `whole` where it lies in `read`. Of bools the bits."""

    def __init__(self, lists: pa.ListArray, read: pa.Buffer, whole: pa.Buffer):
        self.offsets, (_, values) = _values(lists.offsets), lists.values.buffers()
        bits = pa.types.is_boolean(lists.values.type)
        where = slice(values.address - read.address, values.address - read.address + values.size)
        self.values = np.frombuffer(whole, np.uint8)[where]
        if not bits:
            self.values = self.values.view(lists.values.type.to_pandas_dtype())[: len(lists.values)]

    def __getitem__(self, number: int) -> np.ndarray:
        return self.values[self.offsets[number] : self.offsets[number + 1]]


def _image_keys(group: PreferenceGroup) -> np.ndarray:
    return np.frombuffer(b"".join(image.key for image in group.images), np.uint8)


def _image_facts(group: PreferenceGroup) -> np.ndarray:
    return np.array([n for image in group.images for n in (*image.size, image.tokens)], np.int32)


def _lists(arrays: Sequence, dtype) -> pa.ListArray:
    lengths = np.array([0, *map(len, arrays)], np.int64).cumsum()
    flat = np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype, casting="unsafe")
    return pa.ListArray.from_arrays(pa.array(lengths, pa.int32()), pa.array(flat))


def _structs(columns: dict[str, Any], bounds: np.ndarray) -> pa.ListArray:
    structs = pa.StructArray.from_arrays(list(columns.values()), names=list(columns))
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), structs)


def _column(values: np.ndarray) -> pa.Array:
    if values.dtype != HASH:
        return pa.array(values)
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(HASH.itemsize), len(values), [None, pa.py_buffer(np.ascontiguousarray(values).tobytes())]
    )


def _values(column: pa.Array) -> np.ndarray:
    """A copy in memory, of hashes too."""
    if pa.types.is_fixed_size_binary(column.type):
        whole = np.frombuffer(column.buffers()[1], HASH)
        return whole[column.offset : column.offset + len(column)].copy()
    return _numpy(column).copy()


def _numpy(column: pa.Array) -> np.ndarray:
    """A view; there are no nulls."""
    return column.to_numpy(zero_copy_only=True)
