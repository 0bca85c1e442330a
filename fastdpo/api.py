"""`train` and `fill_reference` as anyone calls them: the trainer, with what the other rooms do around it."""

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.config.rewards import OBJECTIVE, check_reward_keys
from fastdpo.convert.convert import config_of, read
from fastdpo.doctor import settle_backends
from fastdpo.errors import ConfigError
from fastdpo.planning import out_of_memory
from fastdpo.planning.choose import choose
from fastdpo.planning.ranks import replica_fits
from fastdpo.publish.hub import check_hub, push
from fastdpo.publish.model_card import add_card
from fastdpo.training import trainer
from fastdpo.training.job import Around
from fastdpo.values import plain

Given = Config | Mapping[str, Any] | str | PathLike[str]


def write_report(run: Path, ended: bool) -> Path:
    from fastdpo.report import page  # only now: matplotlib takes a second, and tens of megabytes

    return page.write_report(run, ended)


def around() -> Around:
    made = (write_report, add_card, check_hub, push)
    return Around(settle_backends, choose, replica_fits, out_of_memory.explain, *made)


def train(config: Given | None = None, console: Console | None = None, **keys: Any) -> Path:
    """Trains, and returns the run folder: the model is in its `model/`, what happened in its `report.html`.

    Takes what `fastdpo train` takes: keys by name, and before them a YAML file of keys, a dict of them or a
    Config, which they win over. Values and keys of other trainers are read as in YAML.

        >>> import fastdpo
        >>> folder = fastdpo.train(model="Qwen/Qwen2.5-0.5B-Instruct", data="train.jsonl", beta=0.2)
        >>> shared = {"model": "Qwen/Qwen2.5-0.5B-Instruct", "data": "train.jsonl", "max_steps": 2}
        >>> for rate in (1e-6, 5e-6):
        ...     folder = fastdpo.train(shared, learning_rate=rate, output_dir=f"runs/rate-{rate}")

    Raises FastDPOError, whose message says what to do; and Stopped (no Exception, like KeyboardInterrupt)
    after SIGINT or SIGTERM, with a checkpoint written once there was a step to save.
    """
    return trainer.train(_config(config, keys), console or _console(), around())


def fill_reference(config: Given | None = None, console: Console | None = None, **keys: Any) -> None:
    """Computes the reference's log-probs of a config's first stage into the cache, and trains nothing; takes
    what `train` takes."""
    trainer.fill_reference(_config(config, keys), console or _console(), around())


def sample(
    config: Given | None = None,
    output: str | PathLike[str] = "samples.jsonl",
    console: Console | None = None,
    **keys: Any,
) -> list[dict[str, Any]]:
    """What `fastdpo sample` does: answers to prompts of a config's data, scored where it has a `reward`, as
    ranked rows in the file `output`, and returned: {"row", "prompt", "responses": [{"text", "score", "ids",
    "ended"}], "prompt_ids", "forced"} each. Takes what `train` takes. The same command goes on with a file
    that was not finished.

        >>> import fastdpo
        >>> found = fastdpo.sample(model="runs/first/model", data="prompts.jsonl", reward="judge.py:score")
        >>> best = [max(row["responses"], key=lambda one: one["score"]) for row in found]

    Raises FastDPOError, whose message says what to do.
    """
    from fastdpo.training.sample import sample

    found = sample(_config(config, keys), Path(output), console or _console(), around())
    return [dataclasses.asdict(one) for one in found]


def train_reward(config: Given | None = None, console: Console | None = None, **keys: Any) -> Path:
    """Trains a reward model on the same rows, by the loss of Bradley and Terry; takes what `train` takes, and
    returns the run folder. Its `model/` is what AutoModelForSequenceClassification loads, with one output.

        >>> import fastdpo
        >>> folder = fastdpo.train_reward(model="Qwen/Qwen2.5-0.5B-Instruct", data="train.jsonl")
        >>> found = fastdpo.evaluate("runs/first", "held_out.jsonl", samples=50, scorer=f"{folder}/model")

    Raises as `train` does.
    """
    given = _config(config, keys)
    check_reward_keys(given)
    given = dataclasses.replace(given, objective=OBJECTIVE)
    return trainer.train(given, console or _console(), around())


def evaluate(
    model: str | PathLike[str],
    data: str | list[str],
    *,
    reference: str | PathLike[str] | None = None,
    versus: str | PathLike[str] | None = None,
    objective: str | dict[str, Any] | list[Any] | None = None,
    beta: float | None = None,
    samples: int | None = None,
    per_prompt: int = 1,
    max_new_tokens: int = 128,
    seed: int = 0,
    scorer: str | None = None,
    max_length: int | None = None,
    data_format: str | dict[str, Any] | None = None,
    chat_template: str | None = None,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    console: Console | None = None,
) -> dict[str, Any]:
    """What `fastdpo eval` does, with its options by name; returns what eval.json holds: `numbers` (value and
    standard error of each, by model), `tests`, `sources`, `by_prompt`, `answers`.

        >>> import fastdpo
        >>> found = fastdpo.evaluate("runs/first", "held_out.jsonl", scorer="length", samples=50)
        >>> found["numbers"]["model"]["rewards/accuracies"]["value"]

    Raises FastDPOError, whose message says what to do.
    """
    from fastdpo.evaluation.evaluate import evaluate
    from fastdpo.evaluation.result import Settings

    console = console or _console()
    given = dict(model=model, data=data, reference=reference, versus=versus, objective=objective, beta=beta)
    given |= dict(max_length=max_length, data_format=data_format, chat_template=chat_template)
    given |= dict(samples=samples, per_prompt=per_prompt, max_new_tokens=max_new_tokens, seed=seed)
    settings = Settings(**plain(given | {"scorer": scorer}))
    settle_backends(console)
    return evaluate(settings, None if output is None else str(output), overwrite, console)


def explain(
    model: str | PathLike[str],
    after: str | PathLike[str] | None = None,
    *,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    console: Console | None = None,
    **options: Any,
) -> dict[str, Any]:
    """What `fastdpo explain` does: of a run or an adapter, what its training changed; or of two models,
    before and after. Takes the command's options by name (data, probe, causes, scorer, ...), and returns what
    explain.json holds: `weights`, `behaviour`, `direction`, `where`, `neurons`, `causes`.

        >>> import fastdpo
        >>> found = fastdpo.explain("runs/first")
        >>> {group["name"]: group["share"] for group in found["neurons"]["groups"]}

    Raises FastDPOError, whose message says what to do.
    """
    from fastdpo.explanation.explain import explain
    from fastdpo.explanation.result import Settings

    known = {field.name for field in dataclasses.fields(Settings)} - {"before", "after"}
    if unknown := sorted(options.keys() - known):
        raise ConfigError(f"{unknown[0]}: explain has no such option; there are {', '.join(sorted(known))}")
    before, after = (None, model) if after is None else (model, after)
    given = {"before": before, "after": after} | options
    settings = Settings(**plain({name: value for name, value in given.items() if value is not None}))
    console = console or _console()
    settle_backends(console)
    return explain(settings, None if output is None else str(output), overwrite, console)


def _config(given: Given | None, keys: dict[str, Any]) -> Config:
    if isinstance(given, Config):
        if not keys:
            return given
        given = {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    elif isinstance(given, str | PathLike):
        given = read(Path(given))
    elif not isinstance(given, Mapping | None):
        raise ConfigError(
            f"expected keys, a dict of keys, a Config or a YAML file's name, got a {type(given).__name__}"
        )
    return config_of(plain(given or {}), plain(keys))


def _console() -> Console:
    """In a notebook plain lines, as in a file: rich redraws no bar there without ipywidgets, and warns."""
    console = Console()
    return Console(force_jupyter=False, force_terminal=False) if console.is_jupyter else console
