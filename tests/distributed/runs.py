"""What ranks do in test_runs.py: whole trainings."""

from rich.console import Console

from fastdpo import api
from fastdpo.config.keys import Config
from fastdpo.training import checkpoint


def train(world, values: dict, split_from: float = 8e9) -> str:
    """A run of this config; returns what it printed."""
    console = Console(record=True, quiet=False, width=200, file=open("/dev/null", "w"))
    before, checkpoint.SPLIT_FROM = checkpoint.SPLIT_FROM, split_from
    try:
        api.train(Config(**values), console)
    finally:
        checkpoint.SPLIT_FROM = before
    return console.export_text()


def fill(world, values: dict) -> None:
    api.fill_reference(Config(**values), Console(quiet=True))
