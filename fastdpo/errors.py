"""Errors that a person can act on: the CLI prints them without a traceback."""

from signal import Signals


class FastDPOError(Exception):
    """Something in the user's hands is wrong (a config, a row, a model); the message says what to do."""


class ConfigError(FastDPOError):
    """Keys or values of a config are wrong. `args`: each problem; way_on: how to go on all the same."""

    def __init__(self, *problems: str, way_on: str = "") -> None:
        super().__init__(*problems)
        self.way_on = way_on

    def __str__(self) -> str:
        if len(self.args) == 1:
            problem = self.args[0]
            end = "" if not self.way_on else " " if problem.endswith("?") else ". "
            return f"{problem}{end}{self.way_on}"
        lines = [f"{len(self.args)} problems", *(f"  {problem}" for problem in self.args), self.way_on]
        return "\n".join(filter(None, lines))


class DataError(FastDPOError):
    """A data file or a row is wrong."""


class ModelError(FastDPOError):
    """The model or tokenizer cannot be used as asked."""


class TrainingError(FastDPOError):
    """A run cannot go on (the loss is no longer a number)."""


class DeadEndError(TrainingError):
    """A run cannot go on, and would not by --resume."""


class Stopped(BaseException):
    """A signal ended the run; the exit code is the shell's 128 + its number. Like KeyboardInterrupt no
    Exception, so that nothing takes it for a failure and goes on."""

    def __init__(self, signal: Signals, message: str = "") -> None:
        super().__init__(message or f"stopped by {signal.name}")
        self.signal = signal
