"""An explanation in the console: the summary, and the tables of classes and of causes."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastdpo.console.formatting import printable, signed
from fastdpo.explanation.cause_words import broken, not_told, share_of
from fastdpo.explanation.inside import title_of
from fastdpo.explanation.page import data_line
from fastdpo.explanation.summary import summary
from fastdpo.explanation.words import Made, looked_inside, small_percent


def show(made: Made, console: Console) -> None:
    _say(console, data_line(made))
    for about, sentence in summary(made).items():
        console.print(f"[bold]{escape(about)}[/]  {escape(printable(sentence))}", highlight=False)
    if looked_inside(made):
        for title, part in (("Neurons", _classes), ("Causes", _causes)):
            reason = (made.get(title.lower()) or {}).get("reason")
            table = None if reason else part(made)
            if table is not None:
                console.print(table)
                if title == "Causes" and (unsaid := not_told(made["causes"])):
                    named = ", ".join(map(title_of, unsaid))
                    _say(console, f"no share of {named}: within two standard errors of 0")
            elif reason:
                _say(console, f"{title}: {reason}")
    for note in made.get("notes") or []:
        _say(console, f"note: {note}")


def _say(console: Console, text: str) -> None:
    console.print(escape(printable(text)), highlight=False, soft_wrap=True)


def _classes(made: Made) -> Table | None:
    neurons = made.get("neurons")
    if not neurons:
        return None
    table = _table("class", "in the papers", "neurons", "sum", "share")
    for group in neurons["groups"]:
        share = "" if group.get("share") is None else small_percent(group["share"])
        of = f"{share} of {'gross' if group['lowers'] else 'raised'}" if share else ""
        row = (group["name"], group.get("paper") or "", f"{group['count']:,}", signed(group["sum"]), of)
        table.add_row(*row, end_section=group is _last_lowering(neurons["groups"]))
    return table


def _last_lowering(groups: list[Made]) -> Made | None:
    return next((group for group in reversed(groups) if group["lowers"]), None)


def _causes(made: Made) -> Table | None:
    """The shares of the effects that are told."""
    causes = made.get("causes")
    if not causes:
        return None
    has = lambda name: any((row.get(name) or {}).get("share") is not None for row in causes["rows"])
    names = [name for name in causes["columns"] if has(name)]
    table = _table("share of the effect", "neurons", *map(title_of, names))
    for row in causes["rows"]:
        if row["what"] not in ("before", "after"):
            cells = [share_of(causes, row, name) for name in names]
            name = row["name"] + (" (broken)" if broken(causes, row) else "")
            table.add_row(escape(printable(name)), f"{row['size']:,}" if row["size"] else "", *cells)
    return table


def _table(*columns: str) -> Table:
    table = Table()
    for at, column in enumerate(columns):
        table.add_column(column, justify="right" if at else "left")
    return table
