"""What a chat template is given besides a row's messages: the config's and the row's own arguments, and the
time, which is one for a whole run."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fastdpo.data.report import RowProblem, kind
from fastdpo.errors import ConfigError

# apply_chat_template's own, but for `documents`, which a template prints; and what transformers adds
_RESERVED = frozenset(
    "conversation conversations messages tools chat_template add_generation_prompt continue_final_message "
    "tokenize sanitize_control_tokens padding truncation max_length return_tensors return_dict "
    "return_assistant_tokens_mask tokenizer_kwargs strftime_now".split()
)


@dataclass(frozen=True)
class Chat:
    """How the rows of a run are written. clock: the time that a template is told."""

    kwargs: dict[str, Any] | None = None  # a row's own come over these
    clock: datetime = field(default_factory=lambda: datetime.now())
    rewards: bool = (
        False  # for a reward model: texts up to the template's own end, where it is read, and margins
    )
    told: dict[str, str] = field(default_factory=dict, init=False)  # form -> text, in order

    @property
    def dates(self) -> list[str]:
        """The texts that were told, in order."""
        return list(dict.fromkeys(self.told.values()))

    def render(self, tokenizer, messages: list[dict], row_kwargs: dict[str, Any], **settings) -> str:
        """The tokenizer's apply_chat_template, as text. Raises whatever the template does."""
        given = (self.kwargs or {}) | row_kwargs
        with self._telling_the_time():
            return tokenizer.apply_chat_template(messages, tokenize=False, **settings, **given)

    @contextlib.contextmanager
    def _telling_the_time(self) -> Iterator[None]:
        """transformers hands a template nothing but plain data (5.24 puts its type's name in a function's
        place), so the clock stands where its own strftime_now looks for `datetime`."""
        from transformers.utils import chat_template_utils  # late: reading a config comes by this file

        theirs = chat_template_utils.datetime
        chat_template_utils.datetime = _Clock(self.clock, self.told)  # type: ignore[assignment,misc]
        try:
            yield
        finally:
            chat_template_utils.datetime = theirs  # type: ignore[misc]


@dataclass
class _Clock:
    time: datetime
    told: dict[str, str]

    def now(self) -> "_Clock":
        return self

    def strftime(self, form: str) -> str:
        text = self.time.strftime(form)
        self.told[form] = text
        return text


def check_kwargs(kwargs: dict[str, Any] | None) -> None:
    """Raises ConfigError for what the config cannot give a template."""
    if wrong := _wrong(kwargs or {}):
        raise ConfigError(f"chat_template_kwargs: {wrong}")


def check_row_kwargs(kwargs: dict[str, Any]) -> None:
    """Raises RowProblem for what a row cannot give a template."""
    if wrong := _wrong(kwargs):
        raise RowProblem("template_kwargs", "chat_template_kwargs", wrong)


def _wrong(kwargs: dict) -> str:
    if reserved := sorted(_RESERVED & kwargs.keys()):
        names = ", ".join(reserved)
        return f"{names}: not for the template to read, fastdpo itself says how it is called; remove it"
    for name, value in kwargs.items():
        if not isinstance(name, str):
            return f"{name!r}: a name is text"
        if not _is_plain(value):
            way_out = "put it in quotes" if hasattr(value, "isoformat") else "give what JSON can hold"
            return f"{name}: a template cannot read {kind(value)}; {way_out}"
    return ""


def _is_plain(value) -> bool:
    """Whether a template is given the value itself, and not its type's name."""
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(one) for name, one in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float)
