"""Errors that a person can act on: the CLI prints them without a traceback."""

from signal import Signals


class FastDPOError(Exception):
    """Something in the user's hands is wrong (a config, a row, a model); the message says what to do."""


class ConfigError(FastDPOError):
    """A config key or value is wrong."""


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
