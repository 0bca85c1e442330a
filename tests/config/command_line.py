"""A config as the command makes it."""

from fastdpo.cli import app
from fastdpo.flags import config_of, with_values


def load_config(argv):
    """The one that `fastdpo train ARGV` runs with."""
    _, bound, _ = app.parse_args(with_values(["train", *argv]))
    return config_of(*(bound.args or (None,)), bound.kwargs)
