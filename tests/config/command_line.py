"""A config as the command makes it."""

from fastdpo.cli import app
from fastdpo.flags import takes_keys, with_values

_read = takes_keys(lambda config: config)


def load_config(argv):
    """The one that `fastdpo train ARGV` runs with."""
    _, bound, _ = app.parse_args(with_values(["train", *argv]))
    return _read(*bound.args, **bound.kwargs)
