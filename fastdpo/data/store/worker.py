"""python -m fastdpo.data.store.worker: a process that makes shards, on workers.py's orders.

It gets a pickled Work on its standard input, answers with the digest of the tokenizer that it got, and then
gets numbers of shards, each of which it answers with what became of it. When its input ends, so does it.
"""

import contextlib
import os
import pickle
import sys
import traceback
from collections.abc import Iterator
from typing import Any, BinaryIO


def main() -> None:
    orders, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else is printed is no answer
    with contextlib.suppress(BrokenPipeError):  # nobody listens any more
        for answer in _answers(orders):
            pickle.dump(answer, answers)
            answers.flush()
    os._exit(0)  # at once, and with nothing said about pipes


def _answers(orders: BinaryIO) -> Iterator[Any]:
    """Each to an order, which is only read when the last one was answered."""
    try:
        work = pickle.load(orders)
        yield work.making.tokenizer_digest
    except Exception as error:
        yield _sendable(error)
        return
    while True:
        try:
            number = pickle.load(orders)
        except EOFError:
            return
        try:
            yield work.make(number)
        except Exception as error:
            yield _sendable(error)


def _sendable(error: Exception) -> Exception:
    """The error itself, where it can be pickled; with where it was raised."""
    error.add_note(f"In a process that tokenises rows:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
        told.add_note(error.__notes__[-1])
        return told


if __name__ == "__main__":
    main()
