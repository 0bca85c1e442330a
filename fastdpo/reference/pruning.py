"""`fastdpo cache prune`: log-probs and tokenised data sets by age or id."""

from pathlib import Path

from rich.console import Console

from fastdpo.data.store import contents
from fastdpo.errors import ConfigError
from fastdpo.reference import cache_contents as reference
from fastdpo.values import as_age


def prune(
    where: Path | None,
    older_than: str | None,
    namespace: list[str],
    tokens: list[str],
    dry_run: bool,
    console: Console,
) -> None:
    """Removes what the command's options name, or says what would go. Raises ConfigError."""
    if older_than is None and not namespace and not tokens:
        raise ConfigError(
            "cache prune: say what goes: --older_than 30d, or --namespace or --tokens and how its id begins "
            "in `fastdpo cache`. To remove everything, delete the file and the folder"
        )
    age = None if older_than is None else as_age("--older_than", older_than)
    folder = contents.folder_of(where)
    if where and (wrong := tokens and "--tokens" if folder is None else namespace and "--namespace"):
        raise ConfigError(f"{wrong}: {where} holds none of them; name what does, or leave one of the two out")
    sets = folder if tokens or not namespace else None
    gone = contents.chosen(sets, age, tokens) if sets else []  # a wrong id is told before anything goes
    if (where is None or folder is None) and (namespace or not tokens):
        reference.prune(where, age, namespace, dry_run, console)
    if sets:
        contents.prune(sets, gone, dry_run, console)
