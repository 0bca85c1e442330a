"""A round's log-probs: computed where the policy stands, and in a file beside the round's samples."""

import hashlib
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fastdpo.data.store.facts import HASH
from fastdpo.files import durable
from fastdpo.model.policy import Policy
from fastdpo.records import Groups
from fastdpo.reference.fill import ReferenceTable, load_reference
from fastdpo.reference.fingerprint import Fingerprint
from fastdpo.reference.values import Values

Columns = tuple[np.ndarray, ...]  # keys, lengths, values, see values.Values
_PARTS = ("keys", "lengths", "values")
_NOT_KEPT = Fingerprint({"kept": None})  # of weights that no later run has


def computed(
    policy: Policy, sets: list[Groups], *, base: bool, max_tokens: int, console, check
) -> ReferenceTable:
    """The policy's log-probs of all responses, as it stands; base: without its LoRA."""
    options = dict(path=None, fresh_lora=base, max_tokens=max_tokens, console=console, check=check)
    return load_reference(policy, sets, **options, fingerprint=_NOT_KEPT)


def save(path: Path, key: str, tables: dict[str, ReferenceTable]) -> None:
    """Writes them in one step. key: of the samples that they are of."""
    tensors: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        keys = table.values.wanted
        columns = (keys.view(np.uint8), *table.values.stored(keys))
        tensors |= {f"{name}.{part}": column for part, column in zip(_PARTS, columns)}
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, _told(key, tensors))
    durable.sync(part)
    part.replace(path)


def load(path: Path, key: str) -> dict[str, Columns]:
    """What `restored` makes tables of, of samples of this key; none, where the file is not there, of others,
    or not as it was written."""
    if not path.exists():
        return {}
    try:
        with safe_open(path, framework="np") as file:
            tensors, said = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    except (SafetensorError, UnicodeDecodeError):
        return {}
    if said != _told(key, tensors):
        return {}
    names = sorted({name.split(".")[0] for name in tensors})
    return {name: tuple(tensors[f"{name}.{part}"] for part in _PARTS) for name in names}


def _told(key: str, tensors: dict[str, np.ndarray]) -> dict[str, str]:
    """A file's metadata: one entry, for several would come in any order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(np.ascontiguousarray(tensor).tobytes())
    return {"key": f"{key} {digest.hexdigest()}"}


def restored(keys: np.ndarray, lengths: np.ndarray, values: np.ndarray) -> ReferenceTable:
    found = Values(np.ascontiguousarray(keys).view(HASH).reshape(-1), None)
    found.add(found.wanted, lengths, values)
    return ReferenceTable(found, {})
