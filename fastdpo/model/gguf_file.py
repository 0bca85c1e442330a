"""A GGUF file: what is wrong with it is found before anything else is read; and transformers gets all of the
model from this file alone."""

import contextlib
import importlib.util
import re
import struct
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers.configuration_utils import PreTrainedConfig

from fastdpo.errors import ModelError

_MAGIC, _LFS = b"GGUF", b"version https://git-lfs"
_ARCHITECTURE, _VOCABULARY = "general.architecture", "tokenizer.ggml.tokens"
_MODEL = "give the model that it was made of"
# What scales the frequencies by which positions are rotated: llama.cpp has it as metadata or as tensors.
_SCALING = re.compile(r"[\w-]+\.rope\.scaling\.(attn_)?factor|rope_(freqs|factors)\w*\.weight")


class Header(NamedTuple):
    """What a file says of itself."""

    architecture: str
    has_vocabulary: bool
    scaling: list[str]  # the names of what scales rotary positions


def read_header(path: Path, label: str) -> Header:
    """Raises ModelError, which begins with the label, where the file is not whole, is no GGUF, or holds what
    cannot be dequantised; of the tensors no more than their places is read."""
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"{label} is a GGUF file, which needs {package}: pip install 'fastdpo[gguf]'")
    if part := re.search(r"-\d{5}-of-(\d{5})\.gguf$", path.name, re.IGNORECASE):
        way_out = "make one file of them, as by `llama-gguf-split --merge` of llama.cpp"
        raise ModelError(f"{label} is one of the {int(part[1])} parts of a GGUF; {way_out}")
    with path.open("rb") as file:
        start = file.read(len(_LFS))
    if start == _LFS:
        raise ModelError(f"{label} is a pointer of Git LFS, not the file: run `git lfs pull` in its folder")
    if not start.startswith(_MAGIC):
        raise ModelError(f"{label} is no GGUF file, for it begins with {start[:16]!r}; download it again")
    import gguf
    import numpy as np

    try:
        reader = _reader()(path)
    except Exception as error:  # whatever a header or tensors that end too early make gguf and numpy raise
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        way_out = "copy or download it again"
        raise ModelError(f"{label} is a GGUF cut short or damaged ({why}); {way_out}") from None
    if _ARCHITECTURE not in reader.fields:
        raise ModelError(f"{label} is a GGUF that names no architecture ({_ARCHITECTURE}); {_MODEL}")
    if not reader.tensors:
        raise ModelError(f"{label} is a GGUF without weights; {_MODEL}")
    for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
        try:
            gguf.dequantize(np.atleast_2d(tensor.data)[:1], tensor.tensor_type)
        except NotImplementedError:
            what = f"{tensor.name} as {tensor.tensor_type.name}, which the installed gguf cannot dequantise"
            raise ModelError(f"{label} is a GGUF that holds {what}; {_MODEL}") from None
    names = [*reader.fields, *(tensor.name for tensor in reader.tensors)]
    scaling = [name for name in names if _SCALING.fullmatch(name)]
    return Header(str(reader.fields[_ARCHITECTURE].contents()), _VOCABULARY in reader.fields, scaling)


def lost_scaling(header: Header, config: PreTrainedConfig) -> list[str]:
    """The names of what in the file scales the model's rotary positions, where its config scales none."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {one.get("rope_type", "default") for one in (rope, *rope.values()) if isinstance(one, dict)}
    return header.scaling if kinds == {"default"} else []


@contextlib.contextmanager
def alone(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Inside, what from_pretrained takes for what this file holds: an empty folder, as it would take a
    tokenizer.json or an adapter beside the file for its own, and arguments.

    transformers parses the header for the config, for the tokenizer and for the weights, and makes the map of
    names for each module of the model anew: meanwhile both take less time.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as theirs

    quick: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", _reader()),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        (theirs, "tqdm", lambda tensors, **_: tensors),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in quick]
    try:
        for place in quick:
            setattr(*place)
        with tempfile.TemporaryDirectory() as empty:
            yield empty, {"gguf_file": str(path.absolute())}
    finally:
        for place in before:
            setattr(*place)


def dequantised() -> dict[str, Any]:
    """from_pretrained's arguments for a plain model. Without them newer releases of transformers keep weights
    packed, which cannot train, wherever they have a kernel for it; older ones know no such thing."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@cache
def _reader() -> Any:
    """gguf's GGUFReader, but that a vocabulary is cut up without a slice of numpy's memmap a token."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        def _get_field_parts(self, orig_offs, raw_type):
            if raw_type != gguf.GGUFValueType.ARRAY or self.byte_order != "I":
                return super()._get_field_parts(orig_offs, raw_type)
            parts: list[Any]
            data, at, parts = np.asarray(self.data).data, orig_offs + 12, []
            kind, count = struct.unpack_from("=IQ", data, orig_offs)
            if kind == gguf.GGUFValueType.STRING:
                for _ in range(count):
                    (size,) = struct.unpack_from("=Q", data, at)
                    parts.append(data[at + 8 : at + 8 + size])
                    at += 8 + size
            elif kind in self.gguf_scalar_to_np:
                values = np.asarray(self._get(at, self.gguf_scalar_to_np[kind], count))
                parts, at = list(values.reshape(count, 1)), at + values.nbytes
            else:
                return super()._get_field_parts(orig_offs, raw_type)
            kinds = [gguf.GGUFValueType(kind)] if count else []
            return at - orig_offs, parts, list(range(count)), [gguf.GGUFValueType.ARRAY, *kinds]

    return Reader
