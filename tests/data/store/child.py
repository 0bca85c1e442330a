"""python -m tests.data.store.child FOLDER SIZE WORKERS [ROW=ACT ...]: makes shards of three rows each, and
says so after each."""

import sys
from pathlib import Path

from rich.console import Console

from fastdpo.data.chat.arguments import Chat
from fastdpo.data.groups import Limits
from fastdpo.data.store import making
from fastdpo.data.store.work import Making
from fastdpo.data.store.workers import Todo
from tests.data.shared_data import small_tokenizer
from tests.data.store.doubles import Source, take_as_others


def main() -> None:
    folder, size, workers, *acts = sys.argv[1:]
    making.SHARD_ROWS, making._FEW, making.cores = 3, 0, lambda: int(workers)
    if acts:
        Todo.take = take_as_others
    source = Source(int(size), {int(row): act for row, _, act in (one.partition("=") for one in acts)})
    how = Making(small_tokenizer(), Limits(100), Chat())
    console = Console(stderr=True)
    try:
        for number, _ in enumerate(making.shards_of(source, how, console, folder)):
            print(number, flush=True)
    except KeyboardInterrupt:
        print("interrupted", *sorted(path.suffix for path in Path(folder).rglob("*.*")), flush=True)


if __name__ == "__main__":
    main()
