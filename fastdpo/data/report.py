"""What became of every row: kept, dropped and why, cut, and what was noted on the way."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from rich.markup import escape
from rich.table import Table

from fastdpo.data.row_fields import RowProblem
from fastdpo.records import PreferenceGroup

_EXAMPLES = 5
_BINS = 12
MEANING = {  # of the notes
    "truncated": "responses whose sequence was cut to max_length",
    "tie_pair": "pairs skipped, their scores being equal",
    "identical_pair": "pairs skipped, their responses having the same tokens",
    "merged_boundary": "responses whose first token also ends the prompt, so it is not scored",
    "trailing_turns": "turns cut that follow a response's last assistant turn",
    "span_unscored": "spans without a scored token, so nothing is weighted by them",
    "no_end_of_turn": "responses that the chat template ends with no token of its own",
    "template_not_prefix": "responses whose prompt the template prints otherwise when alone",
    "ref_columns": "responses with a reference log-prob in the row's columns",
    "ref_columns_white_space": "of them count white space after the end of turn too, if TRL computed them",
    "ref_columns_unusable": "responses not scored as the row's reference log-probs are: cut or in part",
}


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

    def to_dict(self) -> dict:
        counts = {"rows": self.rows, "items": self.items, "examples": self.examples}
        return counts | ({"message": self.message} if self.message else {})


@dataclass
class DataReport:
    """The account of one data source. `rows == kept.rows + sum of dropped rows`, always."""

    source: str
    kept: Tally = field(default_factory=Tally)  # items: responses
    dropped: dict[str, Tally] = field(default_factory=dict)
    notes: dict[str, Tally] = field(default_factory=dict)
    formats: Counter = field(default_factory=Counter)  # what rows were read as, see formats.py
    responses: int = 0
    pairs: int = 0
    desirable: int = 0  # of unpaired rows, one response each
    undesirable: int = 0
    weighted: int = 0  # responses with token weights
    relevant_tokens: int = 0  # of these, the scored tokens with a weight above 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    scored_tokens: int = 0
    shared_tokens: int = 0  # of one forward with each prompt once, last tokens left out
    separate_tokens: int = 0  # of one row a response
    lengths: list[int] = field(default_factory=list)  # prompt + response, one a response

    @property
    def rows(self) -> int:
        return self.kept.rows + sum(tally.rows for tally in self.dropped.values())

    @property
    def unpaired_rows(self) -> int:
        return self.desirable + self.undesirable

    def drop(self, row: int, problem: RowProblem) -> None:
        self.dropped.setdefault(problem.reason, Tally()).add(row, message=str(problem))

    def keep(self, group: PreferenceGroup, notes: dict[str, int]) -> None:
        self.kept.add(group.row, len(group.responses))
        for name, items in notes.items():
            self.notes.setdefault(name, Tally()).add(group.row, items)
        lengths = [len(group.prompt) + len(r.ids) for r in group.responses]
        self.responses += len(group.responses)
        self.pairs += len(group.pairs)
        for response in group.responses:
            self.desirable += response.label is True
            self.undesirable += response.label is False
            if response.token_weight is not None:
                self.weighted += 1
                self.relevant_tokens += int((response.token_weight > 0).sum())
        self.prompt_tokens += len(group.prompt)
        self.response_tokens += sum(len(r.ids) for r in group.responses)
        self.scored_tokens += group.scored_tokens
        self.shared_tokens += group.input_tokens
        self.separate_tokens += sum(lengths)
        self.lengths += lengths

    def histogram(self) -> tuple[list[int], list[int]]:
        """(edges, counts): how many sequences have edges[i] <= length < edges[i + 1]."""
        longest = max(self.lengths, default=0)
        width = max(1, -(-(longest + 1) // _BINS))
        edges = list(range(0, longest + 1 + width, width))
        counts, _ = np.histogram(self.lengths, edges)
        return edges, counts.tolist()

    def length_percentiles(self) -> dict[str, int]:
        names, at = ("p50", "p90", "p99", "max"), (50, 90, 99, 100)
        found = np.percentile(self.lengths or [0], at, method="inverted_cdf")
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
            "groups": self.kept.rows,
            "responses": self.responses,
            "pairs": self.pairs,
            "paired_rows": self.kept.rows - self.unpaired_rows,
            "unpaired_rows": self.unpaired_rows,
            "desirable": self.desirable,
            "undesirable": self.undesirable,
            "weighted_responses": self.weighted,
            "relevant_tokens": self.relevant_tokens,
            "prompt_tokens": self.prompt_tokens,
            "response_tokens": self.response_tokens,
            "scored_tokens": self.scored_tokens,
            "shared_forward_tokens": self.shared_tokens,
            "separate_rows_tokens": self.separate_tokens,
            "lengths": {**self.length_percentiles(), "edges": edges, "counts": counts},
        }

    def losses(self) -> str:
        """The dropped rows, a line a reason: for an error message."""
        lines = [
            f"  {name}: {tally.rows} (rows {_numbers(tally)}); the first: {tally.message}"
            for name, tally in self.dropped.items()
        ]
        return "\n".join(lines)

    def print(self, console) -> None:
        console.print(f"[bold]data: {escape(self.source)}", highlight=False, soft_wrap=True)
        formats = ", ".join(f"{name} ({rows:,} rows)" for name, rows in self.formats.most_common())
        console.print(f"format: {formats or 'none known'}", highlight=False, soft_wrap=True)
        table = Table(box=None, pad_edge=False)
        for name, justify in (("rows", "left"), ("", "right"), ("example rows", "left")):
            table.add_column(name, justify=justify)
        table.add_column("", overflow="fold")
        table.add_row("kept", f"{self.kept.rows:,} of {self.rows:,}")
        for name, tally in self.dropped.items():
            cells = (f"dropped: {name}", f"{tally.rows:,}", _numbers(tally), tally.message)
            table.add_row(*map(escape, cells))
        for name, tally in self.notes.items():
            meaning = f"{tally.items:,} {MEANING.get(name, '')}"
            table.add_row(name, f"{tally.rows:,}", _numbers(tally), meaning)
        console.print(table)
        saved = 1 - self.shared_tokens / max(self.separate_tokens, 1)
        console.print(
            f"{self.responses:,} responses, {self.pairs:,} pairs; tokens: {self.prompt_tokens:,} "
            f"prompt, {self.response_tokens:,} response ({self.scored_tokens:,} scored)\n"
            f"a pass over the data: {self.shared_tokens:,} tokens with each prompt once, "
            f"{self.separate_tokens:,} with a row a response ({saved:.0%} saved)",
            highlight=False,
        )

        if self.unpaired_rows:
            console.print(
                f"{self.unpaired_rows:,} unpaired rows ({self.desirable:,} desirable, {self.undesirable:,} "
                f"undesirable), {self.kept.rows - self.unpaired_rows:,} rows of pairs",
                highlight=False,
            )
        if self.weighted:
            console.print(
                f"{self.weighted:,} responses have token weights: {self.relevant_tokens:,} relevant tokens",
                highlight=False,
            )

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


def _numbers(tally: Tally) -> str:
    return ", ".join(map(str, tally.examples)) + (", ..." if tally.rows > _EXAMPLES else "")
