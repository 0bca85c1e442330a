"""Contenders as processes that live for a whole benchmark, one each: memory and patches never mix.

Only one of them computes at a time; the others keep their weights and wait. What a worker can do is in
benchmarks/peers/session.py.
"""

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 300  # for any answer
EXIT_SECONDS = 30  # for a process that no longer answers to be gone
KEPT = 512 << 20  # bytes of a GPU that a job may leave in its worker: cuBLAS keeps room to work in


class WorkerFailed(Exception):
    """A worker said that it cannot, died, or did not answer. `kind` is memory, absent, error or time."""

    def __init__(self, kind: str, why: str):
        super().__init__(why)
        self.kind, self.why = kind, why


class Worker:
    """`python -m module`, started at once and waiting for its first order."""

    def __init__(self, module: str, environment: dict[str, str], log: Path):
        self.log = log
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module],
                cwd=ROOT,
                env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.greeted = False

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def prepare(self, job: dict, seconds: float = SECONDS) -> dict:
        """Builds the job's model and all else before its first step: {"facts", and memory's numbers}."""
        until = time.monotonic() + seconds
        if not self.greeted:
            self._answer(seconds)
            self.greeted = True
        return self.ask(until - time.monotonic(), do="prepare", job=job)

    def steps(self, n: int, seconds: float = SECONDS) -> dict:
        """{"steps": [{"seconds", "loss"}, ...], and memory's numbers} of the next n steps."""
        return self.ask(seconds, do="steps", n=n)

    def profile(self, seconds: float = SECONDS) -> dict:
        """The same of one step under the profiler, with its "trace"."""
        return self.ask(seconds, do="profile")

    def end(self) -> None:
        """Lets go of the job; the process stays for the next one, if it has given its GPU memory back."""
        if not self.greeted:  # it has no job
            return
        try:
            if self.ask(EXIT_SECONDS, do="end")["kept_bytes"] > KEPT:
                self.stop()
        except WorkerFailed:
            self.stop()

    def ask(self, seconds: float, **order) -> dict:
        """One order and its answer. WorkerFailed where there is none; the worker is then gone."""
        if not self.greeted:
            raise WorkerFailed("error", "it has no job")
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise self._died() from None
        return self._answer(seconds)

    def _answer(self, seconds: float) -> dict:
        if not select.select([self.process.stdout], [], [], max(seconds, 0.0))[0]:
            self.stop()
            raise WorkerFailed("time", f"no answer within {seconds:.0f} s")
        line = self.process.stdout.readline()
        if not line:
            raise self._died()
        try:
            answer = json.loads(line)
        except json.JSONDecodeError:
            self.stop()
            raise WorkerFailed("error", f"no answer but {line[:200]!r}") from None
        if "failed" in answer:
            self.stop()
            raise WorkerFailed(answer["failed"], answer["why"])
        return answer

    def _died(self) -> WorkerFailed:
        """What is known of a worker whose pipe is closed."""
        try:
            code = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self.stop()
            return WorkerFailed("error", "answers no more, and did not exit")
        if code == -9:  # the kernel's way when memory is out, and nobody else's here
            return WorkerFailed("memory", "killed by signal 9, as by the kernel when memory runs out")
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it wrote nothing"]
        kind = "absent" if lines[-1].startswith(("ModuleNotFoundError", "ImportError")) else "error"
        return WorkerFailed(kind, f"died with code {code}: {lines[-1][:200]}")

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # an order that it did not read
            self.process.stdin.close()
        self.process.stdout.close()


class Workers:
    """The workers of a benchmark by name: started when first needed, or all at once by `start`."""

    def __init__(self, folder: Path):
        self.folder, self._workers = folder, {}

    def get(self, name: str, module: str, environment: dict[str, str]) -> Worker:
        """The living worker of this name, or a new one."""
        worker = self._workers.get(name)
        if worker is None or not worker.alive:
            safe = "".join(c if c.isalnum() else "_" for c in name)
            worker = self._workers[name] = Worker(module, environment, self.folder / f"{safe}.log")
        return worker

    def stop(self) -> None:
        """Ends all of them; `get` starts new ones."""
        for worker in self._workers.values():
            if worker.alive:
                worker.stop()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
