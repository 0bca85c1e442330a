"""How long `fastdpo train --resume` takes until it trains, on a model of a few weights."""

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import yaml

from benchmarks.rows.watch import Watched, watch


class Resumed:
    """A run that was stopped behind its first checkpoint, to go on with as often as one likes."""

    def __init__(self, folder: Path, order: dict, objective: str, environment: dict[str, str]):
        self.cores, self.environment = order["cores"], environment
        self._folder, self._config = folder / "run", folder / "run.yaml"
        settings = {key: order[key] for key in ("data", "model", "max_length")}
        settings |= {"output_dir": str(self._folder), "objective": objective, "batch_size": 1, "samples": 0}
        settings |= {"logging_steps": 1, "save_steps": 1}
        folder.mkdir(parents=True, exist_ok=True)
        self._config.write_text(yaml.safe_dump(settings))
        self._train(lambda _: '"checkpoint"' in self._text("events.jsonl"))

    def again(self) -> dict:
        """Seconds from the command's start to its stage's, behind which come only steps, and to the end of
        the first step."""
        told, stepped = len(self._text("events.jsonl")), len(self._text("metrics.jsonl"))
        seen: dict[str, float] = {}

        def ends(seconds: float) -> bool:
            if '"event": "stage"' in self._text("events.jsonl")[told:]:
                seen.setdefault("stage_seconds", seconds)
            if len(self._text("metrics.jsonl")) > stepped:
                seen.setdefault("step_seconds", seconds)
            return "step_seconds" in seen

        watched = self._train(ends, "--resume")
        pss, own = watched.peak(until=watched.began + seen["step_seconds"])
        return seen | {"peak_bytes": pss, "peak_own_bytes": own, "looks_every": watched.interval}

    def _train(self, ends: Callable[[float], bool], *flags: str) -> Watched:
        """The command, until it is so far that it can be stopped."""
        ended = False

        def poll(process: subprocess.Popen, seconds: float) -> None:
            nonlocal ended
            if not ended and ends(seconds):
                ended = True
                process.send_signal(signal.SIGTERM)

        command = [sys.executable, "-m", "fastdpo", "train", str(self._config), *flags]
        log = self._folder.with_suffix(".log")
        watched = watch(command, self.cores, self.environment, log, poll)
        if not ended:
            raise RuntimeError(f"`fastdpo train` ended by itself: {log.read_text(errors='replace')[-1500:]}")
        return watched

    def _text(self, name: str) -> str:
        path = self._folder / name
        return path.read_text() if path.exists() else ""
