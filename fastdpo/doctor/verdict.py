"""What the ladder found, kept beside the default reference cache: one file for each machine."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from fastdpo.files import durable
from fastdpo.reference.cache_file import cache_path


@dataclass(frozen=True)
class Choice:
    """taken: ladder -> its rung, None where none is right. left_out: rung -> why, "failed: ...".
    unknown: rung that is taken as it is -> why it could not be tried; such a choice is not kept."""

    taken: dict[str, str | None]
    left_out: dict[str, str]
    unknown: dict[str, str] = field(default_factory=dict)


def verdict_path(key: dict) -> Path:
    """Where the verdict for a `machine.key` is kept: in one folder, whatever cache a run has, so that all
    look where the doctor keeps it."""
    return cache_path("auto").parent / f"kernels-{_digest(key)[:16]}.json"


def read_verdict(path: Path, key: dict) -> Choice | None:
    """The kept Choice. None where there is none, or none that can be believed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("digest") != _digest(content) or content["key"] != key:
            return None
        return Choice(content["taken"], content["left_out"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def keep_verdict(path: Path, key: dict, choice: Choice) -> None:
    """Raises OSError."""
    content = {"key": key, "taken": choice.taken, "left_out": choice.left_out}
    path.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, json.dumps(content | {"digest": _digest(content)}, indent=1) + "\n")


def _digest(content: dict) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
