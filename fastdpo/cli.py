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
from fastdpo.console.threads import wait_asleep
from fastdpo.distributed.launch import is_first, on_gpus, say
from fastdpo.errors import ConfigError, FastDPOError, Stopped
from fastdpo.evaluation.options import Options
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
        keyed = argv[0] in ("train", "ref", "data", "plan")
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
def ref(config, *, gpus: int | None = None):
    """compute the reference's log-probs into the cache, before any training

    :param gpus: so many of this machine, by torchrun
    """
    if (code := on_gpus(gpus, _words)) is not None:
        return code
    from fastdpo.api import fill_reference

    fill_reference(config)


@takes_keys
def data(config):
    """show what the rows become: counts, lengths, drops, one row decoded"""
    from fastdpo.data.show import show_data
    from fastdpo.model.loading import load_tools

    console = Console()
    tokenizer, processor = load_tools(config, console)
    show_data(config, tokenizer, console, processor)


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


def merge(folder: str, /, *, output: str | None = None, dtype: Literal["auto", "bf16", "fp32"] = "auto"):
    """make one whole model of a LoRA adapter and its base

    :param folder: a run's folder, or an adapter's
    :param output: default: FOLDER-merged
    :param dtype: auto: the base's
    """
    from fastdpo.publish.merge import merge

    merge(folder, output=output, dtype=dtype)


def push(folder: str, /, *, to: str):
    """upload a run's model to the Hugging Face hub

    :param folder: a run's folder, or a model's
    :param to: the repository, as in me/my-dpo; a new one is made private
    """
    from fastdpo.publish.hub import check_hub, push
    from fastdpo.publish.model_card import model_folder

    model = model_folder(folder, "push")
    check_hub(to, "--to")
    push(model, to, Console())


def cache(where: Path | None = None, /):
    """show what is kept on disk: the reference's log-probs by model and data, and data sets as tokens

    :param where: a file of log-probs or a folder of tokens; default: those of auto
    """
    from fastdpo.data.store import contents as tokens
    from fastdpo.reference import cache_contents as reference

    console, folder = Console(), tokens.folder_of(where)
    if where is None or folder is None:
        reference.show(where, console)
    if folder is not None:
        tokens.show(folder, console)


def prune(
    where: Path | None = None,
    /,
    *,
    older_than: str | None = None,
    namespace: list[str] | None = None,
    tokens: list[str] | None = None,
    dry_run: bool = False,
):
    """remove some of what `fastdpo cache` shows, and give its space back

    Asks nothing. With an age and ids, only those of both go.

    :param where: a file of log-probs or a folder of tokens; default: those of auto
    :param older_than: log-probs last filled and tokens last used longer ago, as in 12h, 30d or 2w
    :param namespace: of log-probs, how its id begins, as `fastdpo cache` shows it; may be given again
    :param tokens: of a tokenised data set, how its id begins; may be given again
    :param dry_run: only say what would go
    """
    from fastdpo.reference.pruning import prune

    prune(where, older_than, namespace or [], tokens or [], dry_run, Console())


def convert(
    theirs: Path, /, *, output: Path | None = None, diff: bool = False, ignore: list[str] | None = None
):
    """write another trainer's config as one of ours

    Keeps the order of theirs, with a comment at each key that changed or went.

    :param theirs: their YAML file, shell script, Python script or notebook
    :param output: default: printed
    :param diff: show both beside each other instead, and what became of each key
    :param ignore: a key of theirs to go on without; may be given again
    """
    from fastdpo.convert import convert
    from fastdpo.convert.draft import as_lines

    values = convert.read(theirs)
    draft = convert.drafted(values, ignore or [])
    if diff:
        from fastdpo.convert.written import side_by_side

        Console().print(side_by_side(values, draft))
    text = convert.converted(values, draft)
    if output is None:
        print("" if diff else text, end="")
        return
    if output.exists():
        raise ConfigError(f"--output: {output} exists already; remove it, or name another file")
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output}: {error}") from None
    if not diff:
        print(f"read as a config of {draft.tool.name}", *as_lines(draft.fates), sep="\n")


def doctor():
    """check this machine: versions, every kernel against fp64, speed; text for a bug report

    Tries each way to compute the lm_head and the attention, offloading and
    4 bits on small problems against fp64, in a process of their own, and on a
    GPU how fast they are. Exit code 0 where all that a run stands on is right,
    1 otherwise. A GPU's verdict is kept for the next runs.
    """
    from fastdpo.doctor.command import doctor

    return doctor()


def report(*runs: Path, output: Path | None = None):
    """write a run's report.html anew, or compare several runs on one page

    Works while runs are going on, and of runs that were killed.

    :param runs: run folders, as in runs/beta-*
    :param output: the page of several runs (default: comparison.html in the folder that holds them)
    """
    from fastdpo.report.compare import report

    report(runs, output, Console())


def objectives():
    """list every loss: what it is, its options, its paper"""
    from fastdpo.objectives import table

    table(Console())


def demo(folder: str = "runs/demo", /):
    """make a small model and preferences, train, show before and after (no network)"""
    from fastdpo.demo import demo

    demo(folder)


def completion(shell: Literal["bash", "zsh", "fish", "powershell"], /):
    """print the script that completes commands and keys in a shell

    bash: `source <(fastdpo completion bash)` in ~/.bashrc
    fish: `fastdpo completion fish | source` in config.fish
    zsh: `fastdpo completion zsh >DIR/_fastdpo`, DIR being one of $fpath
    """
    print(app.generate_completion(shell=shell))


for place, command in enumerate(
    (train, ref, cache, data, plan, report, merge, push, convert, doctor, objectives, demo, completion)
):
    app.command(command, sort_key=place)
app.command(evaluate, name="eval", sort_key=1)
app["cache"].command(prune)

if __name__ == "__main__":
    sys.exit(main())
