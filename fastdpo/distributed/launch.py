"""`--gpus N`: the same command in N processes of this machine, started by torch's own launcher, torchrun."""

import contextlib
import logging
import os
import signal
import sys
from pathlib import Path

from fastdpo.errors import ConfigError, TrainingError

GRACE = "300"  # seconds that processes have to save and end after a signal; where one has failed, torch's 30


def check_gpus(gpus: int) -> None:
    """Raises ConfigError for a number that cannot be started here."""
    import torch

    there = torch.cuda.device_count()
    if gpus < 1:
        raise ConfigError(f"--gpus: {gpus} is below 1")
    if there and gpus > there:
        raise ConfigError(f"--gpus: {gpus}, but this machine has {there}; give {there} or less")
    if is_worker():
        raise ConfigError("--gpus: torchrun has started the processes already; leave it out")


def is_worker() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this is no process of several, or the first of them."""
    return int(os.environ.get("WORLD_SIZE") or 1) == 1 or int(os.environ.get("RANK") or 0) == 0


def say(error: BaseException, text: str) -> None:
    """Prints it to stderr: of several processes the one that the others have left it to, or else the
    first."""
    if is_first() or getattr(error, "left_to_this_rank", False):
        print(text, file=sys.stderr)


def on_gpus(gpus: int | None, words: list[str]) -> int | None:
    """Runs the command of these words on several GPUs, and returns its exit code; None where this process
    shall do it."""
    if gpus is not None:
        check_gpus(gpus)
    if gpus in (None, 1):
        return None
    words = [word for word in words if not word.startswith("--gpus=")]
    while "--gpus" in words:
        place = words.index("--gpus")
        del words[place : place + 2]
    return launch(gpus, words)


def launch(gpus: int, argv: list[str]) -> int:
    """torchrun --standalone --nproc_per_node GPUS -m fastdpo ARGV; returns the exit code: that of the process
    that failed first. Raises TrainingError where one was killed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in (name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed")):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the processes say themselves why they end
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", GRACE)
    if sys.path[0] not in ("", os.getcwd()):  # as in this process: no module of the working directory's
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    signals = "SIGTERM,SIGINT,SIGQUIT"
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signals += ",SIGHUP"
    words = ["--standalone", "--nproc_per_node", str(gpus), "--signals_to_handle", signals]
    words += ["-m", "fastdpo", *argv]
    try:
        run.run(run.parse_args(words))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if all(one.exitcode < 0 for one in error.failures.values()):  # nobody could say why
            name = signal.Signals(-failure.exitcode).name
            raise TrainingError(
                f"rank {rank} of {gpus} was ended by {name} (by the system, where memory ran out); the same "
                "command with --resume goes on from the newest checkpoint"
            ) from None
        return int(failure.exitcode) if failure.exitcode >= 0 else 128 - int(failure.exitcode)
    except SignalException as stop:
        _kill_children()  # those who had the signal have ended; after a second one, nobody waits
        return 128 + int(stop.sigval)
    return 0


def _kill_children() -> None:
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
