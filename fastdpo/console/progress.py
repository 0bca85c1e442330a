"""How what takes long shows how far it is: a bar on a terminal; in a file or a notebook, where nothing can be
drawn over, a plain line now and then."""

from typing import Any

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Column

from fastdpo.console.formatting import about, duration

# Seconds. The first line of a task, then one each EVERY, or each tenth of the time so far where that is more:
# an hour is some thirty lines, and a day about a hundred.
FIRST, EVERY, LONGEST = 10, 30, 900
MEASURED = 3600.0  # seconds that the speed is measured over: steps may take minutes


def make_progress(console: Console) -> progress.Progress:
    """Tasks need what they count and an `info` field: `add_task(name, total=n, unit="rows", info="")`."""
    if not console.is_terminal or console.is_dumb_terminal:
        return Lines(console)
    whole = Column(no_wrap=True)  # where there is no room, the bar gives way, no number
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(table_column=whole),
        progress.TimeElapsedColumn(table_column=whole),
        progress.TextColumn("eta"),
        progress.TimeRemainingColumn(table_column=whole),
        progress.TextColumn("{task.fields[info]}"),
        console=console,
        speed_estimate_period=MEASURED,
    )


class Lines(progress.Progress):
    """reference: 120 of 800 packs, 2 min 10 s, about 12 min left. Of what is over in ten seconds, nothing."""

    def __init__(self, console: Console):
        super().__init__(console=console, disable=True)
        self._due: dict[progress.TaskID, float] = {}  # seconds after a task's start

    def add_task(self, description: str, **keys: Any) -> progress.TaskID:  # type: ignore[override]
        return super().add_task(description, began=keys.get("completed", 0), **keys)

    def advance(self, task_id: progress.TaskID, advance: float = 1) -> None:
        self.update(task_id, advance=advance)

    def update(self, task_id: progress.TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        task = self._tasks[task_id]
        spent = task.elapsed or 0.0
        if spent < self._due.get(task_id, FIRST) or task.finished:
            return
        self._due[task_id] = spent + min(max(EVERY, spent / 10), LONGEST)
        text = f"{task.description}: {task.completed:,.0f} of {task.total:,.0f} {task.fields['unit']}"
        done, left = task.completed - task.fields["began"], task.fields.get("left")
        if left is None and done:  # nobody knows better
            left = spent / done * (task.remaining or 0)
        parts = [text, duration(spent), "" if left is None else f"{about(left)} left", task.fields["info"]]
        self.console.print(escape(", ".join(filter(None, parts))), highlight=False, soft_wrap=True)
