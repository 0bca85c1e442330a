"""What the key chat_template says: a Jinja file, Jinja text, or the name of a markup that many models share.

A named template is a small file of ours in templates/, written after the public description of the markup. It
prints what the markup has: tools and reasoning are not in it.
"""

import os
from pathlib import Path

from fastdpo.errors import ConfigError
from fastdpo.values import nearest

_FOLDER = Path(__file__).parent / "templates"
NAMES = sorted(path.stem for path in _FOLDER.glob("*.jinja"))
_ELSE = "default:"  # before any of the three: only where the tokenizer has no template of its own
# what the tokenizers of such models have as single tokens; the other markups are text to theirs, too
_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "phi3": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
}


def is_text(given: str) -> bool:
    return "{{" in given or "{%" in given


def file_of(given: str | None) -> str | None:
    """The path that a chat_template reads; None where it is none, text, or a template's name."""
    if given is None or is_text(given):
        return None
    path = given.removeprefix(_ELSE)
    return None if path in NAMES and not os.path.isfile(path) else path


def template_of(given: str, own: str | None) -> str:
    """The Jinja text that a chat_template means beside a tokenizer's own. Raises ConfigError."""
    if given.startswith(_ELSE) and own:
        return own
    name = given.removeprefix(_ELSE)
    if is_text(name):
        return name
    if file_of(name) is None:
        return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    if not os.path.exists(name):
        known = ", ".join(NAMES)
        raise ConfigError(
            f"chat_template: {name!r} is neither a file, nor Jinja text, nor one of {known}. "
            f"{nearest(name, NAMES)}".strip()
        )
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"chat_template: cannot read the file: {error}") from None


def in_pieces(given: str, tokenizer) -> dict[str, int]:
    """{token: how many it is to this tokenizer} of a named template's tokens that it does not know as one."""
    name = given.removeprefix(_ELSE)
    if file_of(name) is not None or tokenizer.chat_template != template_of(name, None):
        return {}
    sizes = {text: len(tokenizer.encode(text, add_special_tokens=False)) for text in _TOKENS.get(name, ())}
    return {text: size for text, size in sizes.items() if size > 1}
