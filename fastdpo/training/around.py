"""What other rooms do around a run: handed to the trainer, which imports none of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from fastdpo.config.keys import Config


@dataclass(frozen=True)
class Around:
    """`fastdpo.api` makes it."""

    settle_backends: Callable[[Console], None]  # which kernels are right on this machine
    choose: Callable[..., Config]  # (config, model_config, groups, console): with what `memory` leaves open
    explain: Callable[..., str]  # (config, model_config, batch): of a microbatch that took too much memory
    write_report: Callable[[Path, bool], None]  # (run folder, whether the run has ended)
    add_card: Callable[[Path, Path, Console], None]  # (run folder, model folder, console)
    check_hub: Callable[[str | None], None]  # whether that repository can be pushed to
    push: Callable[[Path, str, Console], None]  # (model folder, repository, console)
