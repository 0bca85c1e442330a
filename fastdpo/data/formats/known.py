"""The formats of preference rows: each is told by its columns, or named by the user, never guessed.

Where the columns fit several formats or none, the row is an error that names them. To add a format, add its
entry to FORMATS and the function that reads it; a column no other format has goes into COLUMNS.
"""

from collections.abc import Callable
from typing import NamedTuple

from fastdpo.data.formats import columns, prompts
from fastdpo.data.formats.columns import NOWHERE, WHOLE, Columns, about, about_chat, asks, column, has, pair
from fastdpo.data.formats.turns import Tags, from_human_and_assistant, text_or_turns, turns
from fastdpo.data.report import RowProblem, is_number, kind

COLUMNS = (  # all that are read, under our names
    "prompt chosen rejected system tools messages conversations instruction input question context history "
    "completion label output kto_tag responses answers completions chosen_response rejected_response "
    "rejected_messages preferred_output non_preferred_output score_chosen score_rejected chosen_reward "
    "rejected_reward ref_chosen_logps ref_rejected_logps chosen_spans rejected_spans chosen_token_weights "
    "rejected_token_weights chat_template_kwargs images image margin"
).split()

NUMBERS = {  # of them those that are a number or a truth value, and no text that looks like one
    *("label kto_tag score_chosen score_rejected chosen_reward rejected_reward ref_chosen_logps").split(),
    *("ref_rejected_logps reference_chosen_logps reference_rejected_logps margin").split(),
}


class Format(NamedTuple):
    """One format: whose it is, what its rows look like, how it is told and how it is read."""

    tool: str
    looks: str
    fits: Callable[[dict, set], bool]  # (row, columns.asked(row))
    read: Callable[[dict, Tags], Columns]


def detect(row: dict) -> str:
    """The one format that the row's columns fit. Raises RowProblem for none and for several."""
    where = columns.asked(row)
    if "completion" in row and "label" in row and (where or "responses" in row):
        message = "both an unpaired row's completion and label, and a paired row's columns; make it two rows"
        raise RowProblem("ambiguous_row", "row", message)
    found = [name for name, format in FORMATS.items() if format.fits(row, where)]
    if len(found) == 1:
        return found[0]
    has = ", ".join(map(str, row))
    if found:
        message = f"its columns ({has}) fit the formats {' and '.join(found)}: name one in data_format"
        raise RowProblem("ambiguous_row", "row", message)
    for name in ("chosen", "rejected"):
        column(row, name)
    message = f"no known format has these columns together ({has}): say in data_format which to read"
    raise RowProblem("unknown_format", "row", message)


# ---- one preferred and one other response


def _alpaca(row: dict, tags: Tags) -> Columns:
    """Before mid-2024 LLaMA-Factory had both responses in one list."""
    if "chosen" not in row and isinstance(both := row.get("output"), list) and len(both) == 2:
        row = row | {"chosen": both[0], "rejected": both[1]}
    return columns.paired("instruction", prompts.alpaca_prompt)(row, tags)


def _aligner(row: dict, tags: Tags) -> Columns:
    """NeMo-Aligner's: the prompt is text that already has its turns' markup."""
    prompt, *values = (text_or_turns(column(row, name), name, tags) for name in ("prompt", *_RESPONSES))
    scores = tuple(columns.score(row.get(name), name) for name in ("chosen_reward", "rejected_reward"))
    return pair(row, prompt, tuple(values), fields=_RESPONSES)._replace(scores=scores)


def _swift(row: dict, tags: Tags) -> Columns:
    """ms-swift's: the turns end with the preferred response, and the other one (or all turns that lead to it)
    has a column."""
    whole = turns(column(row, "messages"), "messages", tags)
    if "rejected_response" in row and "rejected_messages" in row:
        message = "both rejected_response and rejected_messages; leave one out"
        raise RowProblem("ambiguous_row", "rejected_messages", message)
    if "rejected_messages" in row:
        prompt, field = None, "rejected_messages"  # what the two have in common
        values: tuple = whole, turns(row[field], field, tags)
    else:
        prompt, chosen = columns.last_answer(whole, "messages")
        field = "rejected_response"
        values = chosen, text_or_turns(column(row, field), field, tags)
    return pair(row, prompt, values, fields=("messages", field), prompt_field="messages", **about_chat(row))


def _openai(row: dict, tags: Tags) -> Columns:
    """OpenAI's preference fine-tuning: {input: {messages, tools}, preferred_output, non_preferred_output}."""
    given = column(row, "input")
    if not isinstance(given, dict) or given.get("messages") is None:
        raise RowProblem("wrong_type", "input", f"an object with messages, not {kind(given)}")
    prompt, fields = turns(given["messages"], "input.messages", tags), _OUTPUTS
    values = tuple(text_or_turns(column(row, name), name, tags) for name in fields)
    more = about_chat(row | {"tools": given.get("tools")})
    return pair(row, prompt, values, fields=fields, prompt_field="input.messages", **more)


# ---- one judged response


def _unpaired(row: dict, tags: Tags) -> Columns:
    names = ("prompt", "completion")
    prompt, completion = (text_or_turns(column(row, name), name, tags) for name in names)
    return columns.judged(row, prompt, "completion", completion, "label", **about(row))


def _alpaca_kto(row: dict, tags: Tags) -> Columns:
    prompt, output = prompts.alpaca_prompt(row), text_or_turns(column(row, "output"), "output", tags)
    more = about_chat(row) | {"prompt_field": "instruction"}
    return columns.judged(row, prompt, "output", output, "kto_tag", **more)


# ---- several responses with scores or ranks


def _ranked(row: dict, tags: Tags) -> Columns:
    """fastdpo's own: {prompt, responses: [{text, score}, ...]}."""
    prompt = text_or_turns(column(row, "prompt"), "prompt", tags)
    answers = columns.answers(row, "responses", "text", "score", tags)
    marks = tuple((item, "", f"responses[{i}].") for i, item in enumerate(row["responses"]))
    return columns.ranked("responses", prompt, answers, marks, **about(row))


def _nectar(row: dict, tags: Tags) -> Columns:
    """Nectar: {prompt, answers: [{answer, rank}, ...]}, where rank 1 is the best."""
    prompt = text_or_turns(column(row, "prompt"), "prompt", tags)
    if isinstance(prompt, str):
        prompt = from_human_and_assistant(prompt, "prompt")
    answers = columns.answers(row, "answers", "answer", "rank", tags)
    return columns.ranked("answers", prompt, _lowest_best(answers), **about_chat(row))


def _nemo(row: dict, tags: Tags) -> Columns:
    """NeMo-RL: {context, completions: [{rank, completion}, ...]}, where the lowest rank is the best."""
    context = text_or_turns(column(row, "context"), "context", tags)
    answers = columns.answers(row, "completions", "completion", "rank", tags)
    more = about_chat(row) | {"prompt_field": "context"}
    return columns.ranked("completions", context, _lowest_best(answers), **more)


def _lowest_best(answers: list[tuple]) -> list[tuple]:
    return [(field, value, 0.0 - rank) for field, value, rank in answers]


def _ultrafeedback(rating: str, check=None):
    """The reader of UltraFeedback's {instruction, completions: [{response, ...}]} by one of its scores:
    overall_score (1 to 10, GPT-4's verdict) or fine-grained_score (the mean of four ratings, 1 to 5)."""

    def read(row: dict, tags: Tags) -> Columns:
        answers = columns.answers(row, "completions", "response", rating, tags, check)
        prompt = columns.text(row, "instruction")
        return columns.ranked("completions", prompt, answers, prompt_field="instruction", **about_chat(row))

    return read


def _no_10_for_1(score: float, item: dict, field: str) -> None:
    """Copies of UltraFeedback from before December 2023 give 10 to responses that were meant to have 1; its
    authors told them by fine-grained scores of at most 2."""
    fine = item.get("fine-grained_score")
    if score == 10 and is_number(fine) and fine <= 2:
        fault = f"10 beside a fine-grained_score of {fine}: a known fault of UltraFeedback's first version"
        way_out = "take the corrected one, or data_format: ultrafeedback_fine_grained"
        raise RowProblem("faulty_score", field, f"{fault}, where 1 was meant; {way_out}")


_RESPONSES = ("chosen_response", "rejected_response")
_OUTPUTS = ("preferred_output", "non_preferred_output")
_JUDGED = ("label", "kto_tag")
_with_system = columns.paired("prompt", lambda row: row.get("prompt"))

FORMATS: dict[str, Format] = {
    "trl": Format(
        "TRL; Axolotl's argilla_chat; OpenRLHF",
        "{prompt, chosen, rejected} or {chosen, rejected}, text or messages",
        lambda row, asked: (
            not row.get("history") and "system" not in row and bool(asked & {"prompt", WHOLE, NOWHERE})
        ),
        columns.paired(
            "prompt", lambda row: row.get("prompt"), about=lambda row: {"tools": row.get("tools")}
        ),
    ),
    "trl_unpaired": Format(
        "TRL's KTO",
        "{prompt, completion, label}",
        lambda row, asked: "completion" in row and "chosen" not in row and "rejected" not in row,
        _unpaired,
    ),
    "ranked": Format("fastdpo", "{prompt, responses: [{text, score}]}", has("responses"), _ranked),
    "prompt_pairs": Format(
        "Axolotl",
        "{system, prompt, chosen, rejected}",
        lambda row, asked: "system" in row and "prompt" in asked and not row.get("history"),
        _with_system,
    ),
    "ultra": Format(
        "Axolotl",
        "{system, chosen: [...], rejected: [...]}, whole conversations",
        lambda row, asked: "system" in row and WHOLE in asked,
        _with_system,
    ),
    "intel": Format(
        "Axolotl", "{question, chosen, rejected}", asks("question"), columns.question("question")
    ),
    "icr": Format("Axolotl", "{input, chosen, rejected}", asks("input"), columns.question("input")),
    "argilla": Format(
        "Axolotl",
        "{instruction, chosen_response, rejected_response}",
        has("instruction", *_RESPONSES),
        columns.question("instruction", _RESPONSES),
    ),
    "axolotl": Format(
        "Axolotl",
        "one of {prompt, input, question, instruction}, {chosen, rejected} or {..._response}",
        lambda row, asked: False,  # only where data_format names it
        columns.asked_first,
    ),
    "nectar": Format(
        "Axolotl, Nectar", "{prompt, answers: [{answer, rank}]}", has("prompt", "answers"), _nectar
    ),
    "messages": Format(
        "Axolotl's chat_template, LLaMA-Factory's openai",
        "{messages, chosen, rejected}",
        columns.turns_beside("messages"),
        columns.messages("messages"),
    ),
    "messages_kto": Format(
        "LLaMA-Factory, ms-swift",
        "{messages, label} or {messages, kto_tag}",
        has("messages", one_of=_JUDGED),
        columns.messages_kto("messages"),
    ),
    "alpaca": Format("LLaMA-Factory", "{instruction, input, chosen, rejected}", asks("instruction"), _alpaca),
    "alpaca_kto": Format(
        "LLaMA-Factory", "{instruction, input, output, kto_tag}", has("output", "kto_tag"), _alpaca_kto
    ),
    "sharegpt": Format(
        "LLaMA-Factory",
        "{conversations: [{from, value}], chosen, rejected}",
        columns.turns_beside("conversations"),
        columns.messages("conversations"),
    ),
    "sharegpt_kto": Format(
        "LLaMA-Factory",
        "{conversations, kto_tag}",
        has("conversations", one_of=_JUDGED),
        columns.messages_kto("conversations"),
    ),
    "swift": Format(
        "ms-swift",
        "{messages, rejected_response} or {messages, rejected_messages}",
        has("messages", one_of=("rejected_response", "rejected_messages")),
        _swift,
    ),
    "nemo": Format(
        "NeMo-RL", "{context, completions: [{rank, completion}]}", has("context", "completions"), _nemo
    ),
    "nemo_aligner": Format(
        "NeMo-Aligner",
        "{prompt, chosen_response, rejected_response}",
        lambda row, asked: "system" not in row and has("prompt", *_RESPONSES)(row, asked),
        _aligner,
    ),
    "openai": Format(
        "OpenAI",
        "{input: {messages}, preferred_output, non_preferred_output}",
        has("input", *_OUTPUTS),
        _openai,
    ),
    "ultrafeedback": Format(
        "UltraFeedback",
        "{instruction, completions: [{response, overall_score}]}",
        has("instruction", "completions"),
        _ultrafeedback("overall_score", _no_10_for_1),
    ),
    "ultrafeedback_fine_grained": Format(
        "UltraFeedback",
        "{instruction, completions: [{response, fine-grained_score}]}",
        lambda row, asked: False,  # only where data_format names it
        _ultrafeedback("fine-grained_score"),
    ),
    prompts.ALONE: Format(
        "TRL; with `rounds` only",
        "{prompt}, {messages}, {conversations}, {instruction}, {question}, {input} or {context}, no answer",
        lambda row, asked: False,  # see prompts.format_of
        prompts.alone,
    ),
    prompts.ANSWERED: Format(
        "TRL, LLaMA-Factory; with `rounds` only",
        "{prompt, completion}, {instruction, output}, or {messages} that end with an answer",
        lambda row, asked: False,
        prompts.answered,
    ),
}
