"""Shards are made once, whole and alike, by one process or by several, whatever ends them on the way."""

import io
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.process import python_path
from fastdpo.data.chat.arguments import Chat
from fastdpo.data.groups import Limits
from fastdpo.data.load import load_groups
from fastdpo.data.sources import sources_of
from fastdpo.data.store import making, work, workers
from fastdpo.data.store.folder import Folder
from fastdpo.data.store.making import shards_of
from fastdpo.data.store.work import Making
from fastdpo.errors import ConfigError, DataError
from tests.data.shared_data import WIDE, small_tokenizer, text_row, write_lines
from tests.data.store.doubles import Source, take_as_others

ROOT = Path(__file__).resolve().parents[3]
SIZE, SHARDS = 20, 7  # rows, and shards of three each


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    """Of three rows, made in this process."""
    monkeypatch.setattr(making, "SHARD_ROWS", 3)
    monkeypatch.setattr(making, "cores", lambda: 1)


@pytest.fixture(params=[1, 3])
def processes(request, monkeypatch):
    """This one alone; two others and not this one."""
    if request.param > 1:
        only_others(monkeypatch, request.param)
    return request.param


def only_others(monkeypatch, cores: int = 2) -> None:
    """All shards are made by other processes, one fewer than there are cores."""
    monkeypatch.setattr(workers.Todo, "take", take_as_others)
    monkeypatch.setattr(making, "_FEW", 0)
    monkeypatch.setattr(making, "cores", lambda: cores)


@pytest.fixture
def made(monkeypatch) -> list[int]:
    """The numbers of the shards that are made in this process."""
    numbers, make = [], work.shard_of
    monkeypatch.setattr(
        work, "shard_of", lambda rows, some, *how: numbers.append(some[0] // 3) or make(rows, some, *how)
    )
    return numbers


def run(folder: Path | str, source: Source | None = None, tokenizer=None, clock=None) -> tuple[list, str]:
    """(what each shard holds, what was said)."""
    console = Console(file=io.StringIO(), width=1000)
    how = Making(tokenizer or small_tokenizer(), Limits(100), Chat(None, clock or datetime(2026, 11, 28)))
    shards = shards_of(source or Source(SIZE), how, console, str(folder))
    return contents(shards), console.file.getvalue()


def contents(shards: Iterable) -> list:
    found = []
    for shard in shards:
        facts = shard.facts()
        groups = [shard.group(i, facts, i) for i in range(len(shard))]
        tokens = [(g.row, g.prompt.tolist(), [r.ids.tolist() for r in g.responses]) for g in groups]
        found.append((tokens, facts.digest.tobytes(), shard.account))
    return found


def files(folder: Path) -> dict[str, bytes]:
    """All that is there, but for when it was made."""
    found = {path.name: path.read_bytes() for path in folder.rglob("*.*")}
    found.pop("about.json", None)
    return found


def child(folder: Path, size: int, workers: int, *acts: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.data.store.child", str(folder), str(size), str(workers), *acts]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    return subprocess.Popen(command, env=os.environ | python_path(ROOT, ROOT / "kernels"), **pipes)


@pytest.fixture
def whole(tmp_path) -> tuple[list, dict[str, bytes]]:
    """What shards hold that nothing disturbed, and their files."""
    held, _ = run(tmp_path / "undisturbed")
    return held, files(tmp_path / "undisturbed")


def test_rows_are_tokenised_once(tmp_path, whole, processes, made):
    held, said = run(tmp_path / "here")
    assert (held, files(tmp_path / "here"), said) == (*whole, "")
    assert made == ([*range(SHARDS)] if processes == 1 else [])
    assert [row for tokens, *_ in held for row, *_ in tokens] == [*range(SIZE)]
    made.clear()

    class Unread(Source):
        def rows(self):
            raise AssertionError("the rows are read")

    again, said = run(tmp_path / "here", Unread(SIZE))
    assert again == held and not made
    assert re.fullmatch(r"data: 20 rows found tokenised \(.*here/[0-9a-f]{32}\)\n", said)


def test_this_process_makes_what_others_have_not_begun(tmp_path, whole, monkeypatch, made):
    """The others are held up until it has made three, and make the rest."""
    monkeypatch.setattr(making, "_FEW", 0)
    monkeypatch.setattr(making, "cores", lambda: 3)
    serve, take, enough = workers.Makers._serve, workers.Todo.take, threading.Event()

    def late_serve(self, process):
        enough.wait()
        serve(self, process)

    def mine(self):
        if len(made) == 3:
            enough.set()
            return take_as_others(self)
        return take(self)

    monkeypatch.setattr(workers.Makers, "_serve", late_serve)
    monkeypatch.setattr(workers.Todo, "take", mine)
    assert run(tmp_path / "here") == (whole[0], "") and made == [0, 1, 2]
    assert files(tmp_path / "here") == whole[1]


def test_off_keeps_nothing(tmp_path, whole, processes, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = Source(SIZE)
    source.identity = None  # nobody asks
    monkeypatch.setattr(work.Work, "__getstate__", lambda self: self.__dict__ | {"source": Source(SIZE)})
    assert run("off", source) == (whole[0], "")
    assert not (tmp_path / "cache").exists()


def test_auto_is_in_the_home_for_nobody_else(tmp_path, whole, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run("auto")[0] == whole[0]
    tokens = tmp_path / "cache/fastdpo/tokens"
    assert files(tokens) == whole[1] and tokens.stat().st_mode & 0o777 == 0o700


def test_what_cannot_be_told_is_not_kept(tmp_path, whole):
    held, said = run(tmp_path / "here", Source(SIZE, known=None))
    assert held == whole[0] and not (tmp_path / "here").exists()
    assert "what the rows of rows.jsonl are cannot be told" in said

    tokenizer = small_tokenizer()
    tokenizer.lucky_number = object()
    held, said = run(tmp_path / "here", tokenizer=tokenizer)
    assert held == whole[0] and not (tmp_path / "here").exists()
    assert "what decides the token ids of a TokenizersBackend cannot be told" in said


def test_a_killed_run_is_gone_on_with(tmp_path, whole):
    for last, count in ((0, 2), (2, 1), (5, 2)):
        with child(tmp_path / f"{last}", SIZE, count) as process:
            while process.stdout.readline() != f"{last}\n":
                pass
            process.kill()
            process.stderr.read()  # it ends when the last process that has it has ended
        there = {name for name in files(tmp_path / f"{last}") if name.endswith(".arrow")}
        assert there <= whole[1].keys() and len(there) > last
        assert run(tmp_path / f"{last}") == (whole[0], "")
        assert files(tmp_path / f"{last}").items() >= whole[1].items()


def test_what_a_killed_run_left_half_written_goes_later(tmp_path):
    killed, other, later = (Folder(tmp_path / "here") for _ in range(3))
    killed.prepare()
    killed.claim(3)
    other.claim(4)
    os.utime(tmp_path / f"here/000003.{killed.run}.part", (0, 0))
    assert later.claimed() == {4} and other.claimed() == set()
    later.claim(5)
    later.leave()
    later.prepare()
    assert [*files(tmp_path)] == [f"000004.{other.run}.part"]


def test_ctrl_c_keeps_what_is_made_and_says_nothing_else(tmp_path, whole):
    os.mkfifo(tmp_path / "fifo")  # a process waits for what nobody writes
    with child(tmp_path / "here", SIZE, 3, f"15=wait {tmp_path / 'fifo'}") as process:
        while process.stdout.readline() != "4\n":
            pass
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said, errors = process.communicate()
    _, *suffixes = said.splitlines()[-1].split()
    assert len(suffixes) >= 5 and set(suffixes) == {".arrow"} and not errors
    assert run(tmp_path / "here") == (whole[0], "")


def test_what_is_damaged_is_named_and_made_again_alone(tmp_path, whole, made):
    run(tmp_path / "here")
    names = sorted(whole[1])
    (folder,) = (tmp_path / "here").iterdir()
    torn, size = folder / names[2], len(whole[1][names[2]])
    for place in (0, size // 3, size // 2, size - 1):
        made.clear()
        content = bytearray(whole[1][names[2]])
        content[place] ^= 1
        torn.write_bytes(content)
        held, said = run(tmp_path / "here")
        assert held == whole[0] and made == [2] and files(folder) == whole[1]
        assert said == f"data_cache: {torn} is damaged: its rows are tokenised again\n"
    for content in (b"", whole[1][names[2]][:-1]):
        torn.write_bytes(content)
        assert run(tmp_path / "here")[0] == whole[0] and files(folder) == whole[1]
    torn.unlink()
    assert run(tmp_path / "here") == (whole[0], "") and files(folder) == whole[1]
    (folder / "about.json").write_text("{")
    made.clear()
    assert run(tmp_path / "here") == (whole[0], "") and not made  # the rows are counted again
    assert "found tokenised" in run(tmp_path / "here")[1]


def test_what_another_run_makes_comes_last_and_is_not_made_again(tmp_path, whole, made):
    (folder,) = (tmp_path / "undisturbed").iterdir()
    here = Folder(tmp_path / "here" / folder.name)
    here.prepare()
    here.claim(0)
    here.claim(3)
    assert run(tmp_path / "here")[0] == whole[0]
    assert made == [1, 2, 4, 5, 6, 0, 3]

    how = Making(small_tokenizer(), WIDE, Chat())
    one, other = (shards_of(Source(SIZE), how, Console(file=io.StringIO()), str(tmp_path)) for _ in range(2))
    next(one)
    made.clear()
    assert len([*other]) == SHARDS and made == [*range(1, SHARDS)]
    made.clear()
    assert len([*one]) == SHARDS - 1 and not made
    (folder,) = {path.parent for path in tmp_path.glob(f"*/{SHARDS - 1:06d}-*")} - {here.path, folder}
    assert len(files(folder)) == SHARDS


def test_two_at_once(tmp_path, whole):
    folder = tmp_path / "here"
    running = [child(folder, SIZE, 2) for _ in range(2)]
    for process in running:
        said, errors = process.communicate()
        assert said.split() == [str(n) for n in range(SHARDS)] and not errors
    assert files(folder) == whole[1] and run(folder)[0] == whole[0]


LIMITED = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)); "
LIMITED += "sys.argv[0] = 'child'; runpy.run_module('tests.data.store.child', run_name='__main__')"


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_full_disk_is_said_once_and_leaves_nothing(tmp_path, processes):
    """A file that may not grow stands for it: the system's answer to the write is an error, too."""
    environment = os.environ | python_path(ROOT, ROOT / "kernels")
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "here"), str(SIZE), processes]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [str(n) for n in range(SHARDS)]
    said = " ".join(done.stderr.split())
    assert said.count("cannot be written (File too large)") == 1 and said.startswith("data_cache: ")
    assert "held in memory and made again by the next run" in said and not [*tmp_path.rglob("*.*")]


def test_where_nothing_can_be_written(whole, tmp_path):
    held, said = run("/proc/none")
    assert held == whole[0] and said.startswith("data_cache: /proc/none/") and said.count("\n") == 1
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"data_cache: .*file is a file; name a folder"):
        run(tmp_path / "file")


def test_data_that_changes_while_it_is_read_leaves_nothing(tmp_path, whole, processes):
    mark = tmp_path / "changed"
    shards = shards_of(
        Source(SIZE, changes=str(mark)),
        Making(small_tokenizer(), WIDE, Chat()),
        Console(file=io.StringIO()),
        str(tmp_path / "here"),
    )
    next(shards)
    mark.touch()
    with pytest.raises(DataError, match="changed while it was read"):
        list(shards)
    assert not files(tmp_path / "here")
    mark.unlink()
    assert run(tmp_path / "here", Source(SIZE, changes=str(mark)))[0] == whole[0]


def test_nothing_is_written_of_rows_that_changed(tmp_path, whole, monkeypatch):
    """Not even where the run is killed before it can remove it."""
    monkeypatch.setattr(Folder, "remove", lambda self: None)
    source, how = Source(SIZE, changes=str(tmp_path / "changed")), Making(small_tokenizer(), WIDE, Chat())
    shards = shards_of(source, how, Console(file=io.StringIO()), str(tmp_path / "here"))
    next(shards)
    Path(source.changes).touch()
    with pytest.raises(DataError, match="changed while it was read"):
        next(shards)
    assert [name[:6] for name in files(tmp_path / "here")] == ["000000"]


def test_a_source_that_is_handed_over_knows_what_it_was(tmp_path):
    spec = write_lines(tmp_path / "d.jsonl", [text_row()])
    (source,) = sources_of(spec, None, "data")
    source.rows()
    handed = pickle.loads(pickle.dumps(source))
    handed.check_unchanged()
    write_lines(tmp_path / "d.jsonl", [text_row(), text_row()])
    with pytest.raises(DataError, match="changed while it was read"):
        handed.check_unchanged()


def test_a_shard_that_was_told_another_time_is_made_again(tmp_path, made):
    tokenizer = small_tokenizer()
    tokenizer.chat_template += "{# date_string #}{{ strftime_now('%H') if messages[0].content == 'x' }}"
    said = [{"role": "user", "content": "good?"}]
    rows = [text_row(prompt=said, chosen="gold", rejected=f"old {n}") for n in range(9)]
    rows[4]["prompt"] = [{"role": "user", "content": "x"}]
    spec = write_lines(tmp_path / "d.jsonl", [*map(in_turns, rows)])

    class Named(Source):
        def rows(self):
            return making.Source(spec, None, "data").rows()

    for hour, expected in ((7, [0, 1, 2]), (7, []), (8, [1]), (7, [1])):
        made.clear()
        held, _ = run(tmp_path / "here", Named(9), tokenizer, datetime(2026, 11, 28, hour))
        assert made == expected and held[1][2]["told"] == {"%H": f"0{hour}"}
    assert len(files(tmp_path / "here")) == 3
    run(tmp_path / "here", Named(9), tokenizer, datetime(2026, 11, 29, 7))
    assert len([*(tmp_path / "here").iterdir()]) == 2


def in_turns(row: dict) -> dict:
    turn = lambda text: [{"role": "assistant", "content": text}]
    return row | {"chosen": turn(row["chosen"]), "rejected": turn(row["rejected"])}


def test_errors_are_what_they_were_raised_as(tmp_path, processes):
    with pytest.raises(DataError, match="row 10 cannot be read"):
        run(tmp_path / "here", Source(SIZE, {10: "data", 16: "data"}))
    assert len(files(tmp_path / "here")) >= 3  # what was made before is kept
    error, name = (Exception, "Strange") if processes == 1 else (RuntimeError, "Strange: row 10")
    with pytest.raises(error) as caught:
        run("off", Source(SIZE, {10: "strange"}))
    assert name in f"{type(caught.value).__name__}: {caught.value}"
    if processes > 1:
        assert "doubles.py" in caught.value.__notes__[0]


@pytest.mark.parametrize("act, said", [("kill", "ended by SIGKILL, as the system"), ("leave", "exit code 3")])
def test_a_process_that_dies_is_told(tmp_path, monkeypatch, act, said):
    only_others(monkeypatch)
    with pytest.raises(DataError, match=said):
        run(tmp_path / "here", Source(SIZE, {10: act}))
    assert not [*(tmp_path / "here").rglob("*.part")]


def test_what_a_process_prints_is_no_answer(tmp_path, whole, monkeypatch, capfd):
    only_others(monkeypatch)
    assert run(tmp_path / "here", Source(SIZE, {4: "say"}))[0] == whole[0]
    assert "a library says something" in capfd.readouterr().err


def test_work_that_cannot_be_handed_over_is_done_here(tmp_path, whole, monkeypatch, made):
    monkeypatch.setattr(making, "_FEW", 0)
    monkeypatch.setattr(making, "cores", lambda: 2)
    tokenizer = small_tokenizer()
    tokenizer.lock = lambda: None  # no pickle holds it
    held, said = run("off", tokenizer=tokenizer)
    assert held == whole[0] and made == [*range(SHARDS)]
    assert "data: rows are tokenised by one process: its tokenizer cannot be handed to others" in said

    monkeypatch.setattr(Making, "__reduce__", lambda self: (_unlike, (self.limits, self.chat)))
    _, said = run("off")
    assert "its tokenizer changes on the way to others" in said
    monkeypatch.setattr(Making, "__reduce__", lambda self: (int, ("no number",)))
    _, said = run("off")
    assert "others cannot do it (ValueError: invalid literal" in said
    monkeypatch.setattr("sys.executable", str(tmp_path / "none"))
    _, said = run("off")
    assert "others cannot do it (FileNotFoundError: " in said


def _unlike(limits, chat) -> Making:
    return Making(small_tokenizer(bos=False), limits, chat)


def test_few_rows_are_made_here(tmp_path, monkeypatch, made):
    monkeypatch.setattr(making, "cores", lambda: 8)
    run("off", Source(9))
    assert made == [0, 1, 2]
    asked = []
    monkeypatch.setattr(workers.Makers, "_start", lambda self: asked.append(self._count) or refuse())
    run("off", Source(12))
    run("off", Source(300))
    assert asked == [1, 7]


def refuse():
    raise workers.NotReady("it is a test")


def test_a_shard_that_is_removed_at_once_is_made_in_memory(tmp_path, whole, monkeypatch):
    write = Folder.write
    monkeypatch.setattr(Folder, "write", lambda *args: (path := write(*args), path.unlink())[0])
    assert run(tmp_path / "here") == (whole[0], "")


def test_a_process_that_tokenises_imports_no_torch(tmp_path):
    task = work.Work(Source(4), Source(4).rows(), Making(small_tokenizer(), WIDE, Chat()), None, 3)
    script = "import sys, pickle, fastdpo.data.store.worker; work = pickle.load(sys.stdin.buffer); "
    script += "assert work.make(1).where and work.making.tokenizer_digest; assert 'torch' not in sys.modules"
    environment = os.environ | python_path(ROOT, ROOT / "kernels")
    done = subprocess.run([sys.executable, "-c", script], env=environment, input=pickle.dumps(task), cwd=ROOT)
    assert done.returncode == 0


def test_the_first_row_that_strict_refuses_is_told(tmp_path, monkeypatch, processes):
    rows = [text_row(rejected=f" old {n}") for n in range(SIZE)]
    for number in (10, 13):
        rows[number]["rejected"] = rows[number]["chosen"]
    spec = write_lines(tmp_path / "d.jsonl", rows)
    how = dict(console=Console(file=io.StringIO()), data_cache=str(tmp_path / "here"))
    monkeypatch.setattr("fastdpo.data.sources.Source.identity", lambda self: "these rows")
    for _ in range(2):
        with pytest.raises(DataError, match=r"^row 10 of .*they are the same"):
            load_groups(spec, small_tokenizer(), WIDE, strict=True, **how)
    groups, report = load_groups(spec, small_tokenizer(), WIDE, strict=False, **how)
    assert len(groups) == 18 and report.dropped["identical"].examples == [10, 13]
    with pytest.raises(DataError, match=r"^row 10 of"):
        load_groups(spec, small_tokenizer(), WIDE, strict=True, **how)
