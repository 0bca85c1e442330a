"""The formats of preference rows: each is told by its columns, or named by the user, never guessed.

Where the columns fit several formats or none, the row is an error that names them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from fastdpo.data.formats import pairs
from fastdpo.data.formats import ranked as several
from fastdpo.data.formats.columns import Columns, column
from fastdpo.data.formats.turns import Tags
from fastdpo.data.row_fields import RowProblem


@dataclass(frozen=True)
class Format:
    """One format: whose it is, what its rows look like, how it is told and how it is read."""

    tool: str
    looks: str
    fits: Callable[[dict], bool]
    read: Callable[[dict, Tags | None], Columns]


def detect(row: dict) -> str:
    """The one format that the row's columns fit. Raises RowProblem for none and for several."""
    if "completion" in row and "label" in row and (_pair(row) or "responses" in row):
        message = "both an unpaired row's completion and label, and a paired row's columns; make it two rows"
        raise RowProblem("ambiguous_row", "row", message)
    found = [name for name, format in FORMATS.items() if format.fits(row)]
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


# ---- what tells a format: which columns the row has


def at_a_glance(row: dict) -> str | None:
    """The format of a row of TRL's or ours and no column of another tool: of most rows, and cheap to tell."""
    if not _OTHERS.isdisjoint(row):
        return None
    if "completion" not in row and "chosen" in row and "rejected" in row:
        return "trl"
    if "chosen" in row or "rejected" in row or ("completion" in row and "responses" in row):
        return None
    return "trl_unpaired" if "completion" in row else "ranked" if "responses" in row else None


def _pair(row: dict) -> bool:
    return "chosen" in row and "rejected" in row


def _whole(row: dict) -> bool:
    """Chosen and rejected are whole conversations, so that no other column asks the question."""
    lists = [row[name] for name in ("chosen", "rejected") if isinstance(row[name], list) and row[name]]
    starts = [turns[0].get("role", "assistant") for turns in lists if isinstance(turns[0], dict)]
    return len(starts) == 2 and "assistant" not in starts


def _asks(row: dict, *names: str) -> bool:
    """A pair whose question is in one of these columns (none: in the responses themselves)."""
    if not _pair(row) or _whole(row):
        return False
    there = [name for name in _QUESTIONS if name in row and not (name == "input" and "instruction" in row)]
    return any(name in there for name in names) if names else not there


def _trl(row: dict) -> bool:
    if "system" in row or row.get("history"):
        return False
    return _pair(row) and (_whole(row) or _asks(row, "prompt") or _asks(row))


def _ultra(row: dict) -> bool:
    return _pair(row) and "system" in row and _whole(row)


def _prompt_pairs(row: dict) -> bool:
    return "system" in row and not row.get("history") and _asks(row, "prompt")


def _turns(name: str) -> Callable[[dict], bool]:
    """Turns in this column beside a pair; beside whole conversations only where it says something else."""

    def fits(row: dict) -> bool:
        if _asks(row, name):
            return True
        if name not in row or "prompt" in row or not _pair(row) or not _whole(row):
            return False
        return not isinstance(row[name], list) or row[name] != row["chosen"][: len(row[name])]

    return fits


def _columns(*names: str, one_of: tuple[str, ...] = ()) -> Callable[[dict], bool]:
    """All of these columns (and one of those), in a row without chosen and rejected."""
    return lambda row: (
        not _pair(row) and all(n in row for n in names) and (not one_of or any(n in row for n in one_of))
    )


_UNPAIRED = lambda row: "completion" in row and "chosen" not in row and "rejected" not in row
_ALIGNER = _columns("prompt", "chosen_response", "rejected_response")
_JUDGED = ("label", "kto_tag")
_NEVER = lambda row: False  # only where data_format names it

FORMATS: dict[str, Format] = {
    "trl": Format(
        "TRL; Axolotl's argilla_chat; OpenRLHF",
        "{prompt, chosen, rejected} or {chosen, rejected}, text or messages",
        _trl,
        pairs.trl,
    ),
    "trl_unpaired": Format("TRL's KTO", "{prompt, completion, label}", _UNPAIRED, pairs.unpaired),
    "ranked": Format(
        "fastdpo", "{prompt, responses: [{text, score}]}", _columns("responses"), several.responses
    ),
    "prompt_pairs": Format("Axolotl", "{system, prompt, chosen, rejected}", _prompt_pairs, pairs.with_system),
    "ultra": Format(
        "Axolotl", "{system, chosen: [...], rejected: [...]}, whole conversations", _ultra, pairs.with_system
    ),
    "intel": Format(
        "Axolotl",
        "{question, chosen, rejected}",
        lambda row: _asks(row, "question"),
        pairs.question("question"),
    ),
    "icr": Format(
        "Axolotl", "{input, chosen, rejected}", lambda row: _asks(row, "input"), pairs.question("input")
    ),
    "argilla": Format(
        "Axolotl",
        "{instruction, chosen_response, rejected_response}",
        _columns("instruction", "chosen_response", "rejected_response"),
        pairs.argilla,
    ),
    "nectar": Format(
        "Axolotl, Nectar",
        "{prompt, answers: [{answer, rank}]}",
        _columns("prompt", "answers"),
        several.nectar,
    ),
    "messages": Format(
        "Axolotl's chat_template, LLaMA-Factory's openai",
        "{messages, chosen, rejected}",
        _turns("messages"),
        pairs.messages("messages"),
    ),
    "messages_kto": Format(
        "LLaMA-Factory, ms-swift",
        "{messages, label} or {messages, kto_tag}",
        _columns("messages", one_of=_JUDGED),
        pairs.messages_kto("messages"),
    ),
    "alpaca": Format(
        "LLaMA-Factory",
        "{instruction, input, chosen, rejected}",
        lambda row: _asks(row, "instruction"),
        pairs.alpaca,
    ),
    "alpaca_kto": Format(
        "LLaMA-Factory",
        "{instruction, input, output, kto_tag}",
        _columns("output", "kto_tag"),
        pairs.alpaca_kto,
    ),
    "sharegpt": Format(
        "LLaMA-Factory",
        "{conversations: [{from, value}], chosen, rejected}",
        _turns("conversations"),
        pairs.messages("conversations"),
    ),
    "sharegpt_kto": Format(
        "LLaMA-Factory",
        "{conversations, kto_tag}",
        _columns("conversations", one_of=_JUDGED),
        pairs.messages_kto("conversations"),
    ),
    "swift": Format(
        "ms-swift",
        "{messages, rejected_response} or {messages, rejected_messages}",
        _columns("messages", one_of=("rejected_response", "rejected_messages")),
        pairs.swift,
    ),
    "nemo": Format(
        "NeMo-RL",
        "{context, completions: [{rank, completion}]}",
        _columns("context", "completions"),
        several.nemo,
    ),
    "nemo_aligner": Format(
        "NeMo-Aligner",
        "{prompt, chosen_response, rejected_response}",
        lambda row: _ALIGNER(row) and "system" not in row,
        pairs.aligner,
    ),
    "openai": Format(
        "OpenAI",
        "{input: {messages}, preferred_output, non_preferred_output}",
        _columns("input", "preferred_output", "non_preferred_output"),
        pairs.openai,
    ),
    "ultrafeedback": Format(
        "UltraFeedback",
        "{instruction, completions: [{response, overall_score}]}",
        _columns("instruction", "completions"),
        several.ultrafeedback("overall_score"),
    ),
    "ultrafeedback_fine_grained": Format(
        "UltraFeedback",
        "{instruction, completions: [{response, fine-grained_score}]}",
        _NEVER,
        several.ultrafeedback("fine-grained_score"),
    ),
}
_QUESTIONS = ("prompt", "instruction", "question", "input", "messages", "conversations", "context")
_OTHERS = frozenset(  # columns without which a row has one of TRL's formats, or ours
    {*_QUESTIONS, "system", "history", "kto_tag", "answers", "completions", "chosen_response"}
    | {"rejected_response", "rejected_messages", "preferred_output"}
) - {"prompt"}


def formats_table() -> str:
    """The README's table of formats, in Markdown."""
    lines = ["| format | of | its rows |", "|---|---|---|"]
    lines += [f"| `{name}` | {f.tool} | `{f.looks}` |" for name, f in FORMATS.items()]
    return "\n".join(lines) + "\n"
