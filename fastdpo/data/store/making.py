"""A data source's rows -> shards of tokenised groups: found where they were made before, made where not."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

from rich.console import Console
from rich.markup import escape

from fastdpo.console.progress import make_progress
from fastdpo.data.sources import Source
from fastdpo.data.store.folder import Folder, cache_folder
from fastdpo.data.store.key import as_it_was, key_of
from fastdpo.data.store.shards import Shard
from fastdpo.data.store.work import Making, Work, opened
from fastdpo.data.store.workers import Makers, NotReady, Todo, cores
from fastdpo.errors import DataError

SHARD_ROWS = 1024
_FEW = 3  # shards that this process makes alone: others take about a second to start


def shards_of(source: Source, making: Making, console: Console, data_cache: str = "auto") -> Iterator[Shard]:
    """The shards of a source, in order. It is looked into at once, and its rows are tokenised when they are
    asked for. Raises DataError."""
    folder = _folder(source, making, data_cache, console)
    found = {} if folder is None else _found(folder, making, console)
    about = None if folder is None else folder.about()
    if folder is not None and about and found.keys() == set(range(about["shards"])):
        folder.touch()
        _say(console, f"{source.key}: {about['rows']:,} rows found tokenised ({folder.path})")
        return (found.pop(number) for number in range(about["shards"]))
    return _made(Work(source, source.rows(), making, folder, SHARD_ROWS), found, console)


def _folder(source: Source, making: Making, data_cache: str, console: Console) -> Folder | None:
    """None where nothing is kept: as the config wants it, or it is said why."""
    home = cache_folder(data_cache)
    if home is None:
        return None
    if (identity := source.identity()) is None:
        problem = f"what the rows of {source.spec} are cannot be told without reading all of them"
    elif (tokenizer := making.tokenizer_digest) is None:
        kind = type(making.tokenizer).__name__
        problem = f"what decides the token ids of a {kind} cannot be told from its attributes and files"
    else:
        template = getattr(making.tokenizer, "chat_template", None)
        # where paths begin: a copy of the rows elsewhere may lie beside other images
        images = f"{making.images.digest} {source.folder}" if making.images else None
        how = making.limits, making.chat, SHARD_ROWS, template, images, making.prompts_only
        key = key_of(identity, tokenizer, *how)
        if key is not None:
            return Folder(home / key, private=data_cache == "auto")
        problem = "chat_template_kwargs hold what is neither text, number, list nor dict"
    _say(console, f"data_cache: {problem}, so the tokenised rows are held in memory", "yellow")
    return None


def _found(folder: Folder, making: Making, console: Console) -> dict[int, Shard]:
    """The shards that are there and whole; what is damaged is named."""
    named, found = list(folder.shards()), {}
    with ThreadPoolExecutor(min(cores(), 8)) as threads:
        shards = threads.map(lambda one: opened(one[0], one[2]), named)
        for (file, number, _), shard in zip(named, shards):
            if shard is None:
                if file.exists():
                    _say(console, f"data_cache: {file} is damaged: its rows are tokenised again", "yellow")
            elif as_it_was(shard.account, making.chat.clock):
                found[number] = shard
    return found


def _made(work: Work, found: dict[int, Shard], console: Console) -> Iterator[Shard]:
    """All of them, of which those that are not found are made: each appears on disk at once."""
    if work.folder is not None:
        try:
            work.folder.prepare()
        except OSError as error:
            _say(console, _not_kept(work.folder, error.strerror or str(error)), "yellow")
            work = replace(work, folder=None)
    try:
        yield from _in_order(work, found, console)
        work.source.check_unchanged()
    except DataError:
        if work.folder is not None and _has_changed(work.source):
            work.folder.remove()
        raise
    if work.folder is not None and {number for _, number, _ in work.folder.shards()} >= {*range(work.shards)}:
        tokenizer = work.making.tokenizer
        about = {"rows": len(work.rows), "shards": work.shards, "source": work.source.spec}
        about["tokenizer"] = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
        with contextlib.suppress(OSError):  # the next run finds the shards all the same
            work.folder.finish(about | {"made": datetime.now(UTC).isoformat(timespec="seconds")})


def _in_order(work: Work, found: dict[int, Shard], console: Console) -> Iterator[Shard]:
    missing, said = [number for number in range(work.shards) if number not in found], False
    work = replace(work, many=len(missing) > _FEW)
    with make_progress(console) as bar, _makers(work, missing, console) as makers:
        total = len(work.rows)
        done = total - sum(map(work.size, missing))
        task = bar.add_task("reading rows", total=total, completed=done, unit="rows", info="")
        for number in range(work.shards):
            if number in found:
                yield found.pop(number)
                continue
            made = makers.result(number)
            if made.problem and not said:
                assert work.folder is not None
                _say(console, _not_kept(work.folder, made.problem), "yellow")
                said = True
            yield work.open(number, made)
            bar.update(task, advance=work.size(number))


@contextlib.contextmanager
def _makers(work: Work, missing: list[int], console: Console) -> Iterator[Makers]:
    """What makes the missing shards: a process a core, where that pays and they can be had."""
    todo, others = Todo(missing, work.folder), min(cores(), len(missing) // 2) - 1 if work.many else 0
    makers = Makers(work, todo, others)
    try:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(makers)
            except NotReady as error:
                _say(console, f"{work.source.key}: rows are tokenised by one process: {error}", "yellow")
                makers = Makers(work, todo, 0)
            yield makers
    finally:
        if work.folder is not None:
            work.folder.leave()


def _has_changed(source: Source) -> bool:
    try:
        source.check_unchanged()
    except DataError:
        return True
    return False


def _not_kept(folder: Folder, problem: str) -> str:
    return (
        f"data_cache: {folder.path} cannot be written ({problem}), so the tokenised rows are held in memory "
        "and made again by the next run. Make room, or set data_cache to another folder"
    )


def _say(console: Console, text: str, style: str | None = None) -> None:
    console.print(escape(text), style=style, highlight=False, soft_wrap=True)
