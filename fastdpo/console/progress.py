"""The one look of all progress bars: what, how far, elapsed, time left, and free text."""

from rich import progress
from rich.console import Console


def make_progress(console: Console) -> progress.Progress:
    """Tasks need an `info` field: `add_task(name, total=n, info="")`."""
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("eta"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[info]}"),
        console=console,
    )
