"""`fastdpo data`: the report, and one row as the model will see it."""

import numpy as np
from rich.text import Text

from fastdpo.data_report import DataReport
from fastdpo.records import PreferenceGroup, Response

_SCORED, _UNSCORED = ("«", "»", "bold green"), ("⟦", "⟧", "yellow")


def show(groups: list[PreferenceGroup], report: DataReport, tokenizer, console) -> None:
    """Prints the report, the lengths and the first group, its scored tokens told by colour and by marks."""
    report.print(console)
    report.print_lengths(console)
    group = groups[0]
    console.print()
    console.print(Text(f"row {group.row}, decoded", style="bold"))
    legend = Text("prompt, never scored", style="dim")
    for text, (opening, closing, style) in zip(("scored", "read, not scored"), (_SCORED, _UNSCORED)):
        legend.append(" · ").append(f"{opening}{text}{closing}", style=style)
    console.print(legend)
    console.print(Text(f"── prompt, {len(group.prompt)} tokens", style="bold"))
    console.print(Text(_decode(tokenizer, group.prompt), style="dim"))
    for index, response in enumerate(group.responses):
        console.print(Text(f"── {_title(group, index, response)}", style="bold"))
        console.print(_marked(response, tokenizer))


def _title(group: PreferenceGroup, index: int, response: Response) -> str:
    beats = [pair.loser for pair in group.pairs if pair.winner == index]
    role = "rejected"
    if index in group.chosen:
        role = "chosen"
    elif beats:
        role = f"preferred to {', '.join(map(str, beats))}"
    score = "" if response.score is None else f", score {response.score:g}"
    scored = int(response.target_mask.sum())
    return f"response {index} ({role}{score}), {len(response.ids)} tokens, {scored} scored"


def _marked(response: Response, tokenizer) -> Text:
    """The response in runs of scored and unscored tokens, each between its marks."""
    text = Text()
    edges = np.flatnonzero(np.diff(response.target_mask)) + 1
    for run in np.split(np.arange(len(response.ids)), edges):
        opening, closing, style = _SCORED if response.target_mask[run[0]] else _UNSCORED
        text.append(f"{opening}{_decode(tokenizer, response.ids[run])}{closing}", style=style)
    return text


def _decode(tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
