"""What tokenised rows depend on, as one hash: where any of it differs, other shards are looked for."""

import inspect
import json
import sys
import tempfile
from collections.abc import Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from xxhash import xxh3_128

from fastdpo.data.chat.arguments import Chat
from fastdpo.data.groups import Limits
from fastdpo.data.images.reader import unchanged

# What rows are read, written and tokenised with; the last three are of slow tokenizers.
_LIBRARIES = "transformers tokenizers jinja2 datasets pyarrow numpy pillow torchvision "
_LIBRARIES += "sentencepiece tiktoken mistral_common"
_OF_THE_CODE = ("data", "console", "files", "*.py")  # what the data room consists of and may import
_TOLD_BY_NAME = ("transformers.", "tokenizers.", "builtins.", "collections.", "typing.", "abc.")
# Of a fast tokenizer: told by its backend, or where it comes from and what it has warned of.
_ELSEWHERE = (
    "_tokenizer _vocab _merges vocab_file files_loaded name_or_path init_inputs init_kwargs verbose "
    "deprecation_warnings".split()
)


def key_of(
    identity: str,
    tokenizer: str,
    limits: Limits,
    chat: Chat,
    rows: int,
    template,
    images: str | None = None,
    prompts_only: bool = False,
) -> str | None:
    """The hash, as hex: of the source's identity, the tokenizer's digest, `rows` a shard, how images are read
    (a digest), whether prompts alone are read, for which kind of model, and this code, and of the day where
    its chat template asks for the time. None where what `chat` gives it cannot be told."""
    kwargs = chat.kwargs or {}
    if not _plain(kwargs):
        return None
    # who says the day is not asked for it; shards that hold another one are found out (see `as_it_was`)
    asks = "strftime_now" in str(template) and "date_string" not in kwargs
    day = chat.clock.date().isoformat() if asks else None
    said = (
        identity,
        tokenizer,
        limits.max_length,
        limits.truncation,
        kwargs,
        day,
        chat.rewards,
        rows,
        _code(),
        _versions(),
        images,
        prompts_only,
    )
    return xxh3_128(repr(said).encode()).hexdigest()


def as_it_was(account: dict, clock: datetime) -> bool:
    """Whether the clock tells what a shard's chat template was told, and its images' files are the same."""
    same_time = all(clock.strftime(form) == text for form, text in account["told"].items())
    return same_time and unchanged(account["image_files"])


def tokenizer_digest(tokenizer) -> str | None:
    """Of all that decides ids and texts. None where that cannot be told."""
    kind = type(tokenizer)
    digest = xxh3_128(f"{kind.__module__}.{kind.__qualname__}".encode())
    ours = all(f"{base.__module__}.".startswith(_TOLD_BY_NAME) for base in inspect.getmro(kind))
    if ours and getattr(tokenizer, "is_fast", False):
        state = {name: value for name, value in vars(tokenizer).items() if name not in _ELSEWHERE}
        if not _plain(state):
            return None
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()  # as `tokenizer(text)` does, too: neither is asked for
        backend.no_padding()
        added = sorted((number, repr(token)) for number, token in tokenizer.added_tokens_decoder.items())
        said = sorted((name, repr(value)) for name, value in state.items())
        special = tokenizer.special_tokens_map, tokenizer.all_special_tokens
        digest.update(repr((said, added, special)).encode())
        try:
            digest.update(backend.to_str().encode())
        except Exception:  # just that, from Rust: a part that is written in Python has no text
            return None
        return digest.hexdigest()
    if not ours and getattr(tokenizer, "_auto_class", None) is None:
        return None  # with it, the code that a model's folder brings is saved, too
    return _saved(tokenizer, digest)


def _saved(tokenizer, digest) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except Exception:  # of any library, or of the code that a model brings
            return None
        for file in sorted(Path(folder).rglob("*")):
            if file.is_file():
                content = file.read_bytes()
                digest.update(f"{file.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _plain(value: Any) -> bool:
    """Whether its repr tells all of it, in every process."""
    if isinstance(value, dict):
        return all(_plain(name) and _plain(one) for name, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or type(value) in (str, int, float, bool, AddedToken)


@cache
def _code() -> str:
    """Of the files that make tokens of rows: no version has to be raised by hand when one changes."""
    digest, package = xxh3_128(), Path(__file__).parents[2]
    for file in sorted({file for name in _OF_THE_CODE for file in _files(package, name)}):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _files(package: Path, name: str) -> Sequence[Path]:
    found = package.glob(name) if "*" in name else (package / name).rglob("*")
    return [file for file in found if file.is_file() and "__pycache__" not in file.parts]


@cache
def _versions() -> str:
    found: dict[str, str | None] = {"python": f"{sys.version_info[0]}.{sys.version_info[1]}"}
    for name in _LIBRARIES.split():
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return json.dumps(found)
