"""`train` and `fill_reference` as anyone calls them: the trainer, with what the other rooms do around it."""

from pathlib import Path

from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.doctor import settle_backends
from fastdpo.planning.choose import choose
from fastdpo.planning.out_of_memory import explain
from fastdpo.publish.hub import check_hub, push
from fastdpo.publish.model_card import add_card
from fastdpo.report.page import write_report
from fastdpo.training import trainer
from fastdpo.training.job import Around


def around() -> Around:
    return Around(settle_backends, choose, explain, write_report, add_card, check_hub, push)


def train(config: Config, console: Console | None = None) -> Path:
    """Runs a config's stages and returns the run folder; the trained model is in its `model/`.

    Raises Stopped after SIGINT or SIGTERM, with a checkpoint written once there was a step to save.
    """
    return trainer.train(config, console or Console(), around())


def fill_reference(config: Config, console: Console | None = None) -> None:
    """Computes the reference's log-probs of a config's first stage into the cache, and trains nothing."""
    trainer.fill_reference(config, console or Console(), around())
