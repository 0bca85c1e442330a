"""A process and all that it starts, watched while they run: seconds, CPU seconds, memory."""

import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks.process import ROOT, python_path

POLL = 0.02
EVERY = 0.05  # seconds from one look at the memory to the next
SHARE = 20  # ... and at least so many times the CPU time of a look
_ROLLUP = re.compile(r"^(Pss|Pss_Anon|Pss_Shmem): +(\d+) kB", re.MULTILINE)


@dataclass
class Watched:
    """Bytes are sums over the processes. What several of them share is counted once, by PSS."""

    began: float  # time.monotonic()
    code: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0  # of the process, and of those that it has waited for
    looks: list[tuple[float, int, int]] = field(default_factory=list)  # (at, PSS, of which of no file)

    def peak(self, since: float = 0.0, until: float = float("inf")) -> tuple[int, int]:
        """(PSS, of which of no file): the largest of each that was seen in this time."""
        seen = [look[1:] for look in self.looks if since <= look[0] <= until] or [(0, 0)]
        return max(pss for pss, _ in seen), max(own for _, own in seen)

    @property
    def interval(self) -> float:
        """Mean seconds from look to look."""
        return self.seconds / max(len(self.looks), 1)


def watch(
    command: Sequence[str],
    cores: int,
    environment: dict[str, str],
    log: Path,
    on_poll: Callable[[subprocess.Popen, float], None] = lambda process, seconds: None,
) -> Watched:
    """Runs it on the first `cores` of this process's cores; on_poll is called every POLL seconds, with
    those since its start."""
    watched, process = Watched(time.monotonic()), _begun(command, cores, environment, log)
    due = watched.began
    try:
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            now = time.monotonic()
            on_poll(process, now - watched.began)
            if now >= due:
                start = time.thread_time()
                watched.looks.append((now, *memory(process.pid)))
                due = now + max(EVERY, SHARE * (time.thread_time() - start))
            time.sleep(POLL)
    except BaseException:
        for each in [*_family(process.pid), process]:
            each.kill()
        raise
    watched.seconds = time.monotonic() - watched.began
    watched.code = process.returncode = os.waitstatus_to_exitcode(ended[1])
    watched.cpu_seconds = ended[2].ru_utime + ended[2].ru_stime
    return watched


def _begun(command: Sequence[str], cores: int, environment: dict[str, str], log: Path) -> subprocess.Popen:
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(ours)[:cores])  # a process begins with those of who starts it
    try:
        with log.open("ab") as file:
            return subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | python_path() | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
    finally:
        os.sched_setaffinity(0, ours)


def memory(pid: int) -> tuple[int, int]:
    """(PSS, of which of no file) of a process and its descendants, in bytes."""
    pss = own = 0
    for each in [pid, *(child.pid for child in _family(pid))]:
        try:
            text = Path(f"/proc/{each}/smaps_rollup").read_text()
        except OSError:  # it has just ended
            continue
        found = {name: 1024 * int(size) for name, size in _ROLLUP.findall(text)}
        pss += found.get("Pss", 0)
        own += found.get("Pss_Anon", 0) + found.get("Pss_Shmem", 0)
    return pss, own


def _family(pid: int) -> list[psutil.Process]:
    """All that it has started, and what these have."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def on_disk(folder: Path) -> int:
    """Bytes of all files in it."""
    return sum(512 * path.stat().st_blocks for path in folder.rglob("*") if path.is_file())
