"""The commands that take no config, each with its help; what one needs is imported when it runs."""

from pathlib import Path
from typing import Literal

from rich.console import Console

from fastdpo.errors import ConfigError


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
