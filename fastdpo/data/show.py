"""`fastdpo data`: the report, and one row of each kind as the model will see it."""

import re

import numpy as np
from rich.text import Text

from fastdpo.data.chat.arguments import Chat
from fastdpo.data.formats.prompts import ALONE
from fastdpo.data.groups import Limits
from fastdpo.data.load import DataSpec, image_reader, load_groups
from fastdpo.data.report import DataReport
from fastdpo.data.store.stored import facts_of
from fastdpo.preferences import Groups, PreferenceGroup, Response

_SCORED, _UNSCORED = ("«", "»", "bold green"), ("⟦", "⟧", "yellow")
_RELEVANT = ("【", "】", "bold magenta")  # tokens of a response with weights; a weight below 1 follows it
_REPEATED = re.compile(r"(<[^<>\s]+>)\1+")  # the tokens of an image
# what a terminal obeys: controls, marks of direction
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


def show_data(spec: DataSpec, tokenizer, console, processor=None) -> None:
    """Reads a run's data sources and prints what their rows become. Raises DataError, as load_groups does."""
    limits = Limits(spec.max_length, spec.truncation)
    chat = Chat(spec.chat_template_kwargs)
    how = dict(strict=spec.strict, console=console, data_format=spec.data_format, chat=chat)
    how |= dict(data_cache=spec.data_cache, images=image_reader(spec, processor))
    how |= dict(prompts_only=spec.prompts_only)
    for key, source in (("data", spec.data), ("eval_data", spec.eval_data)):
        if isinstance(source, str | list):
            show(*load_groups(source, tokenizer, limits, key=key, **how), tokenizer, console)


def show(groups: Groups, report: DataReport, tokenizer, console) -> None:
    """Prints the report, the lengths and the first group of each kind of row, its scored and its relevant
    tokens told by colour and by marks."""
    report.print(console)
    report.print_lengths(console)
    rows = facts_of(groups).row
    for row, kind in sorted((row, kind) for kind, row in report.kinds.items()):
        if len(places := np.flatnonzero(rows == row)):  # there may be some of the report's rows alone
            _show_group(groups[int(places[0])], kind, tokenizer, console)


def _weighted(group: PreferenceGroup) -> bool:
    return any(response.token_weight is not None for response in group.responses)


def _show_group(group: PreferenceGroup, kind: str, tokenizer, console) -> None:
    console.print()
    console.print(Text(f"row {group.row}, decoded: {kind}", style="bold"))
    legend = Text("prompt, never scored", style="dim")
    kinds = {"scored": _SCORED, "read, not scored": _UNSCORED}
    if _weighted(group):
        kinds = {"scored and relevant": _RELEVANT, "scored, irrelevant": _SCORED} | kinds
        kinds.pop("scored")
    for text, (opening, closing, style) in kinds.items():
        legend.append(" · ").append(f"{opening}{text}{closing}", style=style)
    console.print(legend)
    images = "".join(f", {i.tokens} of them an image of {i.size[0]} x {i.size[1]}" for i in group.images)
    console.print(Text(f"── prompt, {len(group.prompt)} tokens{images}", style="bold"))
    prompt = _shown(_decode(tokenizer, group.prompt))
    if group.images:
        prompt = _REPEATED.sub(lambda run: f"{run[1]}×{len(run[0]) // len(run[1])}", prompt)
    console.print(Text(prompt, style="dim"))
    if kind.startswith(f"{ALONE}, "):
        ends = _shown(_decode(tokenizer, group.responses[0].ids))
        console.print(Text(f"── prompt only: responses are sampled, and {ends} ends one", style="bold"))
        return
    for index, response in enumerate(group.responses):
        console.print(Text(f"── {_title(group, index, response)}", style="bold"))
        console.print(_marked(response, tokenizer))


def _title(group: PreferenceGroup, index: int, response: Response) -> str:
    beats = [pair.loser for pair in group.pairs if pair.winner == index]
    role = "rejected"
    if response.label is not None:
        role = "desirable" if response.label else "undesirable"
    elif index in group.chosen:
        role = "chosen"
    elif beats:
        role = f"preferred to {', '.join(map(str, beats))}"
    score = "" if response.score is None else f", score {response.score:g}"
    scored = int(response.target_mask.sum())
    title = f"response {index} ({role}{score}), {len(response.ids)} tokens, {scored} scored"
    if response.token_weight is not None:
        title += f", {int((response.token_weight > 0).sum())} relevant"
    return title


def _marked(response: Response, tokenizer) -> Text:
    """The response in runs of unscored, scored and equally relevant tokens, each between its marks."""
    text, n = Text(), len(response.ids)
    weight = np.zeros(n) if response.token_weight is None else response.token_weight
    edges = np.flatnonzero(np.diff(response.target_mask) | (np.diff(weight) != 0)) + 1
    for start, end in zip([0, *edges], [*edges, n]):
        opening, closing, style = _SCORED if response.target_mask[start] else _UNSCORED
        if weight[start] > 0:
            opening, closing, style = _RELEVANT
            closing += f"×{weight[start]:g}" if weight[start] < 1 else ""
        # a run alone may be spelt without the space in front of it
        run = _decode(tokenizer, response.ids[:end])[len(_decode(tokenizer, response.ids[:start])) :]
        text.append(f"{opening}{_shown(run)}{closing}", style=style)
    return text


def _decode(tokenizer, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)


def _shown(text: str) -> str:
    """The text, with what a terminal would obey spelt as in Python; but lines and tabs stay."""
    return _OBEYED.sub(lambda found: repr(found[0])[1:-1], text)
