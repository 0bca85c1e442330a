"""The `fastdpo` command: cyclopts reads the words and writes the help. What a command needs is imported when
it runs, so that help is quick."""

import os
import shlex
import sys
from pathlib import Path
from typing import Literal

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError
from rich.console import Console

from fastdpo import __version__
from fastdpo.commands import (
    cache,
    convert,
    demo,
    doctor,
    merge,
    objectives,
    prune,
    push,
    report,
)
from fastdpo.console.threads import wait_asleep
from fastdpo.distributed.launch import is_first, on_gpus, say
from fastdpo.errors import ConfigError, FastDPOError, Stopped
from fastdpo.evaluation.options import Options
from fastdpo.explanation import options as explained
from fastdpo.flags import UNEXPECTED, takes_keys, with_values

Device = Literal["cpu", "cuda"]
app = App(
    name="fastdpo",
    help="Preference training (DPO and its family) at the limit of one GPU. `train --help` lists the keys.",
    help_format="plaintext",
    version=f"fastdpo {__version__}",
    default_parameter=Parameter(name_transform=lambda name: name, negative=()),
    result_action="return_value",
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
)


_words: list[str] = []  # of the command that is run


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0, or 1 when it could not go on, 2 for a wrong config or command, 3 for a plan
    that does not fit, or 128 + the number of the signal that stopped it (130 for SIGINT, 143 for SIGTERM)."""
    wait_asleep()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not is_first():  # of several processes, which would all say the same
            sys.stdout = open(os.devnull, "w")
        _words[:] = argv = with_values(argv)
        code = app(argv) or 0
        return code if argv else 2
    except Stopped as stop:
        say(stop, str(stop))
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except UnusedCliTokensError as error:
        word = error.unused_tokens[0]  # type: ignore[index]
        keyed = argv[0] in [command.__name__ for command in KEYED]
        takes = f"unexpected argument {word!r}: `fastdpo {argv[0]} --help` says what there is"
        text = UNEXPECTED.format(word) if keyed else takes
        say(error, f"error: {text}")
        return 2
    except (FastDPOError, CycloptsError) as error:
        say(error, f"error: {error}")
        return 2 if isinstance(error, ConfigError | CycloptsError) else 1


@takes_keys
def train(config, *, gpus: int | None = None):
    """train on preference rows; the model ends up in OUTPUT_DIR/model

    :param gpus: so many of this machine (without any: processes on its CPU), by torchrun; the same steps
    """
    if (code := on_gpus(gpus, _words)) is not None:
        return code
    from fastdpo.api import train

    folder = train(config)
    if config.push_to_hub is None:
        is_adapter, run = (folder / "model/adapter_config.json").exists(), shlex.quote(str(folder))
        whole = f"fastdpo merge {run} makes one model of adapter and base; " if is_adapter else ""
        print(f"next: {whole}fastdpo push {run} --to me/NAME shares it on the Hugging Face hub")


@takes_keys
def reward(config, *, gpus: int | None = None):
    """train a reward model on preference rows; it ends up in OUTPUT_DIR/model

    :param gpus: so many of this machine, by torchrun
    """
    if (code := on_gpus(gpus, _words)) is not None:
        return code
    from fastdpo.api import train_reward

    folder = train_reward(config)
    run = shlex.quote(str(folder))
    if (folder / "model/adapter_config.json").exists():
        print(f"next: fastdpo merge {run} makes one model of adapter and base, which a scorer has to be")
        return
    print(f"next: fastdpo eval MODEL DATA --samples 100 --scorer {run} has it judge a model's answers")


@takes_keys
def ref(config, *, gpus: int | None = None):
    """compute the reference's log-probs into the cache, before any training

    :param gpus: so many of this machine, by torchrun
    """
    if (code := on_gpus(gpus, _words)) is not None:
        return code
    from fastdpo.api import fill_reference

    fill_reference(config)


@takes_keys
def sample(config, *, output: Path = Path("samples.jsonl"), gpus: int | None = None):
    """answer prompts of the data, score the answers, and write them as ranked rows

    One round of a config with `rounds`, which trains nothing: for best-of-n, a look,
    or scripts of your own. Without `reward` nothing is scored. Goes on with a file
    that was not finished.

    :param output: JSON lines, which the key data takes once they have scores
    :param gpus: so many of this machine, by torchrun
    """
    if (code := on_gpus(gpus, _words)) is not None:
        return code
    from fastdpo.api import sample

    sample(config, output)


@takes_keys
def data(config):
    """show what the rows become: counts, lengths, drops, one row decoded"""
    from fastdpo.data.show import show_data
    from fastdpo.model.loading import load_tools
    from fastdpo.training.job import data_of

    console = Console()
    tokenizer, processor = load_tools(config, console)
    show_data(data_of(config), tokenizer, console, processor)


@takes_keys
def plan(
    config, *, card: str | None = None, device: Device = "cuda", gpus: int | None = None, nodes: int = 1
):
    """predict the GPU memory of a run, whose it is, and what would make it fit

    Reads no weight. Exit code 3 where it does not fit, and nothing that leaves the
    learning as it is would make it; 0 where it fits, or would, or no memory is known.

    :param card: a card's name, as in 4090; a wrong one is told all (default: the GPU here)
    :param device: cpu plans a run on a CPU
    :param gpus: also what each of so many would hold, by mode of the key shard, and how long a step takes
    :param nodes: so many nodes, each with those GPUs
    """
    from fastdpo.planning.command import plan

    return 0 if plan(config, card, device, gpus=gpus, nodes=nodes) else 3


def evaluate(model: str, /, *data: str, options: Options | None = None):
    """is a model better, and by how much is that noise?

    Its accuracies, margins, loss and KL on preference rows, each with its
    standard error; paired tests against its reference and, if you name one,
    another model; and, where answers are sampled, their scores and exact KL.
    Writes eval.json and eval.html.

    :param model: a run folder, an adapter's or a model's folder, or a hub name
    :param data: preference rows, as the key data takes them
    """
    from fastdpo.api import evaluate

    evaluate(model, list(data) if len(data) != 1 else data[0], **vars(options or Options()))


def explain(model: str, after: str | None = None, /, *, options: explained.Options | None = None):
    """what did the training change inside the model, and what of it matters?

    Which weights, how deep in an answer, along which direction, by which layers and
    neurons; and how much of the effect comes back when some of them are patched into
    the model before. Writes explain.html, explain.json and neurons.parquet.

    :param model: a run folder or an adapter's; or, with another model, the one before training
    :param after: the one after it
    """
    from fastdpo.api import explain

    explain(model, after, **vars(options or explained.Options()))


def completion(shell: Literal["bash", "zsh", "fish", "powershell"], /):
    """print the script that completes commands and keys in a shell

    bash: `source <(fastdpo completion bash)` in ~/.bashrc
    fish: `fastdpo completion fish | source` in config.fish
    zsh: `fastdpo completion zsh >DIR/_fastdpo`, DIR being one of $fpath
    """
    print(app.generate_completion(shell=shell))


KEYED = (train, reward, ref, sample, data, plan)
for place, command in enumerate(
    (*KEYED[:4], cache, *KEYED[4:], report, merge, push, convert, doctor, objectives, demo, completion)
):
    app.command(command, sort_key=place)
app.command(evaluate, name="eval", sort_key=1)
app.command(explain, sort_key=1)
app["cache"].command(prune)

if __name__ == "__main__":
    sys.exit(main())
