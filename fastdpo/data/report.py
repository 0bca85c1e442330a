"""What became of every row: kept, dropped and why, cut, and what was noted on the way."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, TypeGuard

from fastdpo.console.formatting import printable
from fastdpo.errors import DataError

if TYPE_CHECKING:  # numpy: `fastdpo train --help` comes by this file
    from fastdpo.data.store.facts import Facts

_EXAMPLES = 5
_BINS = 12
_PRINTS_NOT = "that the chat template does not print, so no token holds them"
NOT_PRINTED = {  # notes on what a row says and its text does not
    "system_not_printed": f"system prompts {_PRINTS_NOT}",
    "message_not_printed": f"user's or assistant's messages {_PRINTS_NOT}",
    "reasoning_not_printed": f"messages with reasoning {_PRINTS_NOT}",
    "tool_call_not_printed": f"messages with tool calls {_PRINTS_NOT}",
    "tool_result_not_printed": f"tool results {_PRINTS_NOT}",
    "tools_not_printed": f"tools {_PRINTS_NOT}",
}
MEANING = NOT_PRINTED | {  # of the notes
    "prompt_only": "rows of a prompt alone, without responses",
    "truncated": "responses whose sequence was cut to max_length",
    "tie_pair": "pairs skipped, their scores being equal",
    "identical_pair": "pairs skipped, their responses having the same tokens",
    "merged_boundary": "responses whose first token holds text of the prompt too, so it is not scored",
    "merged_white_space": "responses whose first token holds the prompt's last white space too; it is scored",
    "duplicate_row": "rows with the tokens, labels and pairs of an earlier row; they are trained on too",
    "trailing_turns": "turns cut that follow a response's last assistant turn",
    "span_unscored": "spans without a scored token, so nothing is weighted by them",
    "no_end_of_turn": "responses with a turn that the chat template ends with no token of its own",
    "template_not_prefix": "responses whose prompt the template prints otherwise when alone",
    "prompt_as_for_generation": "responses behind the prompt as printed for generation: before an answer the "
    "template leaves some of it out",
    "images": "images in prompts",
    "image_resized": "images made smaller, to image_max_pixels",
    "image_cmyk": "images in CMYK, converted to RGB as PIL does",
    "ref_columns": "responses with a reference log-prob in the row's columns",
    "ref_columns_white_space": "of them count white space after the end of turn too, if TRL computed them",
    "ref_columns_unusable": "responses not scored as the row's reference log-probs are: cut or in part",
}


class RowProblem(DataError):
    """One row cannot be used: `field` says where in the row, `reason` is what reports count by. By the file
    that raises them the reasons are

    one_row.py      faulty_row, lone_surrogate
    files/json_rows.py  invalid_json, not_utf8
    files/csv_rows.py   cell_count
    formats/        unknown_format, ambiguous_row, missing_column, wrong_type, unknown_role, prompt_end,
                    nan_score, faulty_score, malformed_label, malformed_ref_logps, too_few_responses, no_pair
    rows.py         messages_as_text, prompt_mismatch, empty_prompt, empty_response, response_start, identical
    chat/arguments.py   template_kwargs
    media.py, images/   media, image_missing, image_outside, image_unreadable, image_url, image_animated,
                    image_mode, image_too_large, image_count, image_in_response
    spans.py        malformed_spans, malformed_token_weights, spans_not_found, token_weights_length
    chat/rendering.py   template_error
    chat/stretches.py   no_rendering
    chat/printed.py     content_not_printed
    tokenizing.py   nothing_scored
    groups.py       too_long, prompt_too_long, response_too_long, images_too_long, identical_after_truncation
    """

    def __init__(self, reason: str, field: str, message: str):
        field, message = printable(field), printable(message)  # both may hold what the row holds
        super().__init__(f"{field}: {message}")
        self.reason, self.field, self.message = reason, field, message


def kind(value) -> str:
    """A wrong value as messages name it."""
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def is_number(value) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: int | float) -> bool:
    """As a float, which an int can be too large for."""
    return abs(value) <= sys.float_info.max


def expect(value, type, field: str, wanted: str):
    """The value, if it has this type; `wanted` is the type in words."""
    if not isinstance(value, type):
        raise RowProblem("wrong_type", field, f"{wanted}, not {kind(value)}")
    return value


@dataclass
class Tally:
    """How often something happened, and in which rows first."""

    rows: int = 0
    items: int = 0  # responses or pairs, where a row can have several; otherwise the rows again
    examples: list[int] = field(default_factory=list)
    message: str = ""  # of the first row, where it had one

    def add(self, row: int, items: int = 1, message: str = "") -> None:
        self.rows += 1
        self.items += items
        self.message = self.message or message
        if len(self.examples) < _EXAMPLES:
            self.examples.append(row)

    def join(self, other: "Tally", first: int) -> None:
        """What happened in later rows, which are numbered from `first` here."""
        self.rows += other.rows
        self.items += other.items
        self.message = self.message or other.message
        self.examples = [*self.examples, *(row + first for row in other.examples)][:_EXAMPLES]

    def numbers(self) -> str:
        return ", ".join(map(str, self.examples)) + (", ..." if self.rows > _EXAMPLES else "")

    def to_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "message" or value}


@dataclass
class DataReport:
    """The account of one data source. `rows == kept.rows + sum of dropped rows`, always."""

    source: str
    kept: Tally = field(default_factory=Tally)  # items: responses
    dropped: dict[str, Tally] = field(default_factory=dict)
    notes: dict[str, Tally] = field(default_factory=dict)
    formats: Counter = field(default_factory=Counter)  # what rows were read as, see formats/known.py
    kinds: dict[str, int] = field(
        default_factory=dict
    )  # of kept rows, see Draft.kind: the first one's number
    counts: Counter = field(default_factory=Counter)  # see Facts.totals
    lengths: Sequence[int] = ()  # prompt + response, one a response
    dates: list[str] = field(default_factory=list)  # what the chat template was told of the time
    image_files: list = field(default_factory=list)  # see images.reader.File, of all rows
    rows_read: int = 0

    @property
    def rows(self) -> int:
        return self.kept.rows + sum(tally.rows for tally in self.dropped.values())

    def drop(self, row: int, problem: RowProblem, told: str = "") -> None:
        """`told`: what to say of it, where that is more than the problem (see Rows.told)."""
        self.dropped.setdefault(problem.reason, Tally()).add(row, message=told or str(problem))

    def note(self, row: int, notes: Mapping[str, int]) -> None:
        """Of a row that is kept."""
        for name, items in notes.items():
            self.notes.setdefault(name, Tally()).add(row, items)

    def account(self) -> dict:
        """What `add` takes over: all that is told of rows one by one, as JSON."""
        tallies = lambda some: {name: asdict(tally) for name, tally in some.items()}
        told = {"dropped": tallies(self.dropped), "notes": tallies(self.notes), "rows": self.rows_read}
        told |= {"formats": dict(self.formats), "kinds": self.kinds, "dates": self.dates}
        return told | {"image_files": self.image_files}

    def add(self, account: dict, first: int = 0) -> None:
        """Another report's account, whose rows are numbered from `first` here."""
        for mine, name in ((self.dropped, "dropped"), (self.notes, "notes")):
            for key, tally in account[name].items():
                mine.setdefault(key, Tally()).join(Tally(**tally), first)
        self.formats.update(account["formats"])
        self.rows_read += account["rows"]
        for kind, row in account["kinds"].items():
            self.kinds.setdefault(kind, row + first)
        self.dates += [date for date in account["dates"] if date not in self.dates]

    def keep(self, facts: "Facts") -> None:
        """The groups of all rows that are kept."""
        counts = facts.totals(alone=self.notes.get("prompt_only", Tally()).rows)
        self.kept = Tally(len(facts), counts["responses"], facts.row[:_EXAMPLES].tolist())
        self.counts, self.lengths = Counter(counts), facts.prompt[facts.group_of] + facts.length

    def histogram(self) -> tuple[list[int], list[int]]:
        """(edges, counts): how many sequences have edges[i] <= length < edges[i + 1]."""
        import numpy as np  # late: `fastdpo train --help` comes by this file

        longest = int(max(self.lengths, default=0))
        width = max(1, -(-(longest + 1) // _BINS))
        edges = list(range(0, longest + 1 + width, width))
        counts, _ = np.histogram(self.lengths, edges)
        return edges, counts.tolist()

    def length_percentiles(self) -> dict[str, int]:
        import numpy as np

        names, at = ("p50", "p90", "p99", "max"), (50, 90, 99, 100)
        found = np.percentile(self.lengths if len(self.lengths) else [0], at, method="inverted_cdf")
        return dict(zip(names, map(int, found)))

    def to_dict(self) -> dict:
        edges, counts = self.histogram()
        return {
            "source": self.source,
            "rows": self.rows,
            "formats": dict(self.formats),
            "kept": self.kept.to_dict(),
            "dropped": {name: tally.to_dict() for name, tally in self.dropped.items()},
            "notes": {name: tally.to_dict() for name, tally in self.notes.items()},
            **self.counts,
            "dates": self.dates,
            "lengths": {**self.length_percentiles(), "edges": edges, "counts": counts},
        }

    def losses(self) -> str:
        """The dropped rows, a line a reason: for an error message."""
        return "\n".join(
            f"  {name}: {tally.rows} (rows {tally.numbers()}); the first: {tally.message}"
            for name, tally in self.dropped.items()
        )

    def print(self, console) -> None:
        from rich.markup import escape
        from rich.table import Column, Table

        console.print(f"[bold]data: {escape(self.source)}", highlight=False, soft_wrap=True)
        formats = ", ".join(f"{name} ({rows:,} rows)" for name, rows in self.formats.most_common())
        console.print(f"format: {formats or 'none known'}", highlight=False, soft_wrap=True)
        columns = "rows", Column(justify="right"), "example rows", Column(overflow="fold")
        table = Table(*columns, box=None, pad_edge=False)
        table.add_row("kept", f"{self.kept.rows:,} of {self.rows:,}")
        for name, tally in self.dropped.items():
            cells = (f"dropped: {name}", f"{tally.rows:,}", tally.numbers(), tally.message)
            table.add_row(*map(escape, cells))
        for name, tally in self.notes.items():
            meaning = f"{tally.items:,} {MEANING.get(name, '')}"
            style = "yellow" if name in NOT_PRINTED else None
            table.add_row(name, f"{tally.rows:,}", tally.numbers(), meaning, style=style)
        console.print(table)
        n = self.counts
        saved = 1 - n["shared_forward_tokens"] / max(n["separate_rows_tokens"], 1)
        lines = [
            f"{n['responses']:,} responses, {n['pairs']:,} pairs; tokens: {n['prompt_tokens']:,} "
            f"prompt, {n['response_tokens']:,} response ({n['scored_tokens']:,} scored)",
            f"a pass over the data: {n['shared_forward_tokens']:,} tokens with each prompt once, "
            f"{n['separate_rows_tokens']:,} with a row a response ({saved:.0%} saved)",
        ]
        if again := n["groups"] - n["prompts"]:
            lines += [f"{n['prompts']:,} different prompts: {again:,} rows share theirs with an earlier row"]
        if n["unpaired_rows"]:
            labels = f"{n['desirable']:,} desirable, {n['undesirable']:,} undesirable"
            lines += [f"{n['unpaired_rows']:,} unpaired rows ({labels}), {n['paired_rows']:,} rows of pairs"]
        if n["weighted_responses"]:
            relevant = f"{n['relevant_tokens']:,} relevant tokens"
            lines += [f"{n['weighted_responses']:,} responses have token weights: {relevant}"]
        console.print("\n".join(lines), highlight=False)
        if self.dates:
            text = (
                f"the chat template prints the date ({', '.join(self.dates)}): a run keeps it when it "
                "resumes, but one of another day has other tokens, so the reference cache misses. Where the "
                f'template reads it, chat_template_kwargs: {{date_string: "{self.dates[0]}"}} stays for all'
            )
            console.print(escape(text), highlight=False, soft_wrap=True)

    def print_lengths(self, console) -> None:
        percentiles = ", ".join(f"{n} {v:,}" for n, v in self.length_percentiles().items())
        console.print(f"prompt + response in tokens: {percentiles}", highlight=False)
        edges, counts = self.histogram()
        for start, end, count in zip(edges, edges[1:], counts):
            bar = _bar(40 * count / max(counts)) if count else ""
            console.print(f"{start:>7,} to {end - 1:>6,} {count:>7,} {bar}", highlight=False)


def _bar(length: float) -> str:
    """A bar of character cells, the last one drawn in eighths; anything above 0 shows."""
    eighths = max(round(8 * length), 1)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
