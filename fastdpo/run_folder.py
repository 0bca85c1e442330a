"""The run folder: where a run leaves everything, and what it must not overwrite."""

import json
import shutil
from pathlib import Path

from fastdpo.config import Config
from fastdpo.config_io import to_yaml
from fastdpo.errors import ConfigError

RUN_FILES = ("config.yaml", "metrics.jsonl", "data_report.json", "model")


def free_folder(config: Config) -> Path:
    """The run folder's path; ConfigError where it holds another run and `overwrite` is not set."""
    run = Path(config.output_dir)
    held = [name for name in RUN_FILES if (run / name).exists()]
    if held and not config.overwrite:
        raise ConfigError(
            f"output_dir: {run} already holds a run ({', '.join(held)}). "
            "Name another folder, or replace it with --overwrite"
        )
    for name in ("model", "data", "eval_data"):
        source = Path(str(getattr(config, name)).partition("#")[0]).resolve()
        for doomed in ((run / part).resolve() for part in held):
            if source == doomed or doomed in source.parents:
                raise ConfigError(
                    f"output_dir: --overwrite would delete {name}: {source}. Name another folder"
                )
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: cannot make the folder {run}: {error}") from None
    return run


def open_run(run: Path, config: Config, reports: dict) -> None:
    """Makes the run folder, once everything that can be wrong before the first step was right."""
    for path in (run / name for name in RUN_FILES):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (run / "data_report.json").write_text(json.dumps(reports, indent=1), encoding="utf-8")
