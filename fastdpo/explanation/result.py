"""What is asked of an explanation, and where it is written: explain.json, explain.html, neurons.parquet."""

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastdpo.errors import ConfigError
from fastdpo.evaluation.result import check_free, plain, write
from fastdpo.files import durable

__all__ = ["Settings", "folder_of", "opened", "plain", "write"]
NEURONS = "neurons.parquet"
_LEAST = {"pairs": 4, "causes": 0, "random_sets": 1, "samples": 1, "max_new_tokens": 1}


@dataclass(frozen=True)
class Settings:
    """What is asked for: all that a result depends on. See options.py for what each is."""

    after: str
    before: str | None = None
    data: Any = None
    pairs: int = 500
    probe: str = "pairs"
    match_length: bool = False
    direction: str | None = None
    plain: bool = False
    groups: str = "v1"
    text: str = "given"
    causes: int = 20
    random_sets: int = 3
    scorer: str | None = None
    samples: int = 16
    max_new_tokens: int = 32
    force: bool = False
    seed: int = 0
    max_length: int | None = None
    data_format: Any = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        for name, low in _LEAST.items():
            if getattr(self, name) < low:
                raise ConfigError(f"{name}: {getattr(self, name)} is below {low}")
        for name, known in _WORDS.items():
            if getattr(self, name) not in known:
                said = ", ".join(str(word) for word in known if word)
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not one of {said}")
        if self.probe != "pairs" and Path(self.probe).suffix not in (".jsonl", ".json", ".safetensors"):
            raise ConfigError(
                f"probe: {self.probe!r} is neither pairs, nor FILE.jsonl of texts with labels, nor "
                "FILE.safetensors with a vector"
            )
        if self.match_length and self.probe != "pairs":
            raise ConfigError(
                "match_length: it is of pairs, and the probe is of a file; leave one of them out"
            )
        if self.scorer is not None and not self.causes:
            raise ConfigError("scorer: it judges answers of patched models, and causes: 0 patches none")

    @property
    def towards(self) -> str:
        """Where the training should move the projection: "up" or "down"."""
        return self.direction or ("up" if self.probe == "pairs" else "down")

    def keys(self) -> dict[str, Any]:
        """Those that are a config's."""
        return {name: getattr(self, name) for name in ("max_length", "data_format", "chat_template")}


_WORDS = {"direction": (None, "up", "down"), "groups": ("v1", "v3"), "text": ("given", "own")}


def folder_of(output: str | None, after: str, run: Path | None) -> Path:
    """Where it is written."""
    if output is not None:
        return Path(output)
    return run / "explain" if run else Path("runs/explain") / (Path(after).name or "model")


@contextlib.contextmanager
def opened(folder: Path, settings: Settings, overwrite: bool) -> Iterator[Path]:
    """Holds the output's folder; yields one within it, for what one model leaves for the other, which goes at
    the end. So does the output itself where nothing came into it. Raises ConfigError as check_free, and where
    another process has the folder."""
    check_free(folder, settings, overwrite, "explain.json", "an explanation")
    with contextlib.ExitStack() as until_end:
        try:
            until_end.enter_context(durable.held(folder))
        except BlockingIOError:
            raise ConfigError(
                f"output: another process is explaining into {folder}; wait for it, or name another folder "
                "by --output"
            ) from None
        durable.recover(folder)
        work = durable.part_of(folder / "work")
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # it is empty where something was wrong
