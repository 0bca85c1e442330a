"""What is wrong with one row ends that row and no run: any exception is the row's own problem, and text that
no tokenizer takes is found before it gets there."""

import contextlib
from collections.abc import Iterator

from fastdpo.data.report import RowProblem
from fastdpo.errors import FastDPOError


def problem_of(error: Exception) -> RowProblem:
    """The row's problem. What is no row's (no chat template, no EOS token, no memory) is raised again."""
    if isinstance(error, RowProblem):
        return error
    if isinstance(error, FastDPOError | MemoryError):
        raise error
    return RowProblem("faulty_row", "row", f"reading it failed with {type(error).__name__}: {error}")


@contextlib.contextmanager
def panics_are_errors() -> Iterator[None]:
    """Inside, a panic of Rust's code (tokenizers) is an error: it is no Exception, and would end a run."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3_runtime's, which cannot be imported
            raise
        raise RuntimeError(f"the tokenizer panicked: {error}") from None


def refuse_lone_surrogates(row: object) -> None:
    """Half a character, as "\\ud83d" alone in JSON: no UTF-8, so no tokenizer takes it. Raises RowProblem."""
    field = _surrogate(row)
    if field is not None:
        message = "half a character (a lone surrogate, as of an emoji cut in two); remove it"
        raise RowProblem("lone_surrogate", field.lstrip(".") or "row", message)


def _surrogate(value: object) -> str | None:
    """Where in a row the first one is, None without any: quick where there is none."""
    if isinstance(value, str):
        return None if value.isascii() or _is_utf8(value) else ""
    if isinstance(value, dict):
        for name, item in value.items():
            if isinstance(name, str) and not name.isascii() and not _is_utf8(name):
                return f".{name}"
            if (found := _surrogate(item)) is not None:
                return f".{name}{found}"
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            if (found := _surrogate(item)) is not None:
                return f"[{i}]{found}"
    return None


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
