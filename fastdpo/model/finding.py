"""Where a model is, a folder, a GGUF file or the hub: what is wrong with its name is told at once."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from fastdpo.console.formatting import first_few
from fastdpo.errors import ModelError
from fastdpo.files.names import gguf_path, is_gguf, is_hub_name, look_up, similar
from fastdpo.model import gguf_file

CONFIG, _SETTINGS = "config.json", "adapter_config.json"
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
WHOLE = "give a folder that save_pretrained wrote, or a hub name"


@dataclass(frozen=True)
class Source:
    """A model that is there, by its config.json or its GGUF file at least."""

    name: str  # a folder, a GGUF file, or a name on the hub, also as in NAME:FILE.gguf
    label: str  # how errors about it begin
    folder: Path | None  # what is on this machine: None where it is to be downloaded
    revision: str | None = None
    offline: str = ""  # why a hub's name is read from the cache alone
    gguf: str | None = None  # the file in the folder, or in the hub's repository

    @property
    def where(self) -> str:
        """What from_pretrained reads. Offline the cache's folder: by its name it would still be asked for."""
        return str(self.folder or self.name.removesuffix(f":{self.gguf}"))

    def file(self, name: str) -> Path:
        """One of its files, on this machine: downloaded where it is not here."""
        from transformers.utils import cached_file

        return Path(str(cached_file(self.where, name, revision=self.revision or "main")))

    def content(self, name: str) -> bytes | None:
        """Of one of its files; None where it has no such one. Raises ModelError where nobody can tell."""
        try:
            path = self.folder / name if self.folder else self._downloaded(name)
            return path.read_bytes() if path and path.is_file() else None
        except Exception as error:  # whatever the network, a proxy, the hub or the disk makes libraries raise
            why = " ".join(str(error).split())[:300] or type(error).__name__
            if self.folder is None:
                why = look_up(self.name, "model", self.revision).why or why
                why = f"{why}; try again, or download it first (`hf download {self.name}`)"
            raise ModelError(f"{self.label}: {name} cannot be had: {why}") from None

    def _downloaded(self, name: str) -> Path | None:
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(self.name, name, revision=self.revision))
        except errors.LocalEntryNotFoundError as error:  # which is one of the others, too
            if _is_not_found(error):  # a mirror's
                return None
            raise
        except errors.EntryNotFoundError:
            return None

    @contextlib.contextmanager
    def reading(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Inside, what from_pretrained is given: where to read, and arguments."""
        if self.gguf is None:
            yield self.where, self.options
            return
        with gguf_file.alone(self.file(self.gguf)) as (empty, options):
            yield empty, options | {"trust_remote_code": False}

    @property
    def options(self) -> dict[str, Any]:
        """from_pretrained's arguments."""
        return {"trust_remote_code": False, "revision": self.revision or "main"}


def _is_not_found(error: BaseException | None) -> bool:
    """Whether a server's 404 is behind this, and none of the hub's, which say of what."""
    while error is not None:
        response: Any = getattr(error, "response", None)
        if getattr(response, "status_code", None) == 404 and not response.headers.get("X-Error-Code"):
            return True
        error = error.__cause__
    return False


def find_source(name: str, label: str, revision: str | None = None, way_out: str = WHOLE) -> Source:
    """Raises ModelError, which begins with the label, where there is no model of this name. The hub is asked
    once a process, and where it is out of reach its cache will do."""
    path = Path(gguf_path(os.path.expanduser(name)))  # a user who is not known is a folder's name, no error
    if is_gguf(path.name) and path.is_file():
        return Source(str(path), label, path.parent, gguf=path.name)
    if path.exists():
        if not (path / CONFIG).is_file():
            raise ModelError(f"{label} {_no_model(path)}")
        return Source(str(path), label, path)
    folder, _, file = name.rpartition(":") if is_gguf(name) else (name, "", "")
    if len(folder) < 2 or not is_hub_name(folder):  # C:FILE is of another system
        way_out = _others(path) or similar(path) or f"; {way_out}"
        raise ModelError(f"{label} does not exist here{way_out}")
    return _of_hub(folder, file or None, label, revision)


@cache  # what is raised is not kept
def _of_hub(repository: str, file: str | None, label: str, revision: str | None) -> Source:
    """file: its GGUF, where that is the model."""
    name = f"{repository}:{file}" if file else repository
    answer = look_up(repository, "model", revision, file)
    if answer.found:
        return Source(name, label, None, revision, gguf=file)
    if answer.found is not None:
        raise ModelError(f"{label} {answer.why}{similar(repository)}")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(repository, file or CONFIG, revision=revision)
    if not isinstance(cached, str):
        where = "is neither a folder here nor in the hub's cache"
        command = f"hf download {repository}{f' {file}' if file else ''}"
        way_out = similar(repository) or f"; give a folder, or download it first (`{command}`)"
        raise ModelError(f"{label} {where}, and {answer.why}{way_out}")
    return Source(name, label, Path(cached.removesuffix(file or CONFIG)), revision, answer.why, file)


def _others(path: Path) -> str:
    """The GGUF files of the folder where one is missing."""
    names = _ggufs(path.parent) if is_gguf(path.name) and path.parent.is_dir() else []
    return f"; {path.parent} holds {first_few(names)}" if names else ""


def _ggufs(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if is_gguf(file.name))


def tokenizer_beside(adapter: Path | None, label: str) -> Source | None:
    """Where the tokenizer is that an adapter was trained with, if one is in its folder."""
    has_one = adapter and any((adapter / name).exists() for name in _TOKENIZERS)
    return Source(str(adapter), label, adapter) if has_one else None


def _no_model(path: Path) -> str:
    """What a path holds instead of a config.json."""
    if path.is_file():
        beside = f"give its folder, {path.parent}" if (path.parent / CONFIG).exists() else WHOLE
        return f"is a file, not a folder; {beside}"
    inside = [found.parent for name in (CONFIG, _SETTINGS) for found in path.glob(f"*/{name}")]
    inside += [found.parent for found in path.glob(f"snapshots/*/{CONFIG}")]  # of the hub's cache
    if inside:
        return f"holds no {CONFIG}; the model is in {' or '.join(map(str, sorted(inside)[:3]))}"
    if files := _ggufs(path):
        return f"holds no {CONFIG}, but {first_few(files)}; name one of these, as in {path}:{files[0]}"
    if not any(path.iterdir()):
        return f"is an empty folder; {WHOLE}"
    if any((path / name).exists() for name in ("events.jsonl", "checkpoints")):
        return "is the folder of a run that has no model yet; go on with it by --resume"
    kind = "a tokenizer and no model" if any((path / name).exists() for name in _TOKENIZERS) else "no model"
    return f"holds {kind}: there is no {CONFIG}; {WHOLE}"
