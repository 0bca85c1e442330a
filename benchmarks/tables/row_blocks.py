"""From a file to rows that can be trained on: what fastdpo and TRL took, from a record to Markdown."""

import statistics

from benchmarks.tables.markdown import markdown, number, where

COLUMNS = ("seconds", "cpu_seconds", "peak_bytes", "peak_own_bytes", "disk_bytes")


def median(record: dict, column: str, **wanted) -> float | None:
    """Of a column over the runs that are so; None where there is none."""
    found = [run[column] for run in record["runs"] if wanted.items() <= run.items()]
    return statistics.median(found) if found else None


def sizes(record: dict) -> list[int]:
    return sorted({run["rows"] for run in record["runs"]})


def core_counts(record: dict) -> list[int]:
    return sorted({run["cores"] for run in record["runs"]})


def rows(record: dict, link: str) -> str:
    """First and second starts on all cores, first starts on fewer, a resumed run."""
    before = [median(record, "before_seconds", who=who, start="second") for who in ("ours", "trl")]
    most = sizes(record)[-1]
    tokens = median(record, "tokens", who="ours", rows=most) / most
    wanted = {"who": "ours", "rows": most, "start": "second"}
    slowest = max(run["seconds"] for run in record["runs"] if wanted.items() <= run.items())
    text = (
        f"From a .jsonl file to rows that can be trained on, on {where(record)} ({link}): random words with "
        f"the lengths of {record['plan']['mix']}, {tokens:.0f} tokens a row, tokenizer "
        f"{record['tokenizer']}, in TRL's conversational format; TRL's part is `load_dataset` and the "
        "`dataset.map` of its DPOTrainer with num_proc = cores. A first start finds no cache, a second one "
        "what the first has left. Peak memory is that of the process and all that it starts, what they share "
        "counted once. Imports and the tokenizer come before, "
        f"{number(before[0])} s and TRL's {number(before[1])} s; they are in the memory and not in the "
        f"seconds. Medians: our slowest second start with {most:,} rows took {number(slowest)} s:"
    )
    tables = [text, _starts(record), f"First starts, rows a second:\n\n{_cores(record)}"]
    if record["resumed"]:
        tables.append(_resumed(record["resumed"]))
    return "\n\n".join([*tables, *(f"Left out: {why}." for why in record["left_out"])])


def _starts(record: dict) -> str:
    """A line a size and start, on all cores."""
    lines, cores = [], core_counts(record)[-1]
    for size in sizes(record):
        for start in ("first", "second"):
            found = {
                who: [
                    _scaled(column, median(record, column, who=who, rows=size, cores=cores, start=start))
                    for column in COLUMNS
                ]
                for who in ("ours", "trl")
            }
            if found["ours"][0] is None:
                continue
            ours, theirs = found["ours"][0], found["trl"][0]
            cells = [_pair(*pair) for pair in zip(*found.values())]
            cells.insert(1, f"{theirs / ours:.2f}x" if theirs else "")
            lines.append([f"{size:,} rows, {start} start", *cells])
    header = ("seconds", "faster", "CPU seconds", "peak memory, GB", "without files' pages", "on disk, GB")
    return markdown(("fastdpo / TRL 1.16", *header), lines)


def _pair(ours: float, theirs: float | None) -> str:
    return f"{number(ours)} / {'not run' if theirs is None else number(theirs)}"


def _scaled(column: str, value: float | None) -> float | None:
    """Bytes in GB."""
    return value / 1e9 if value is not None and column.endswith("_bytes") else value


def rate(record: dict, who: str, size: int, cores: int) -> float | None:
    """Rows a second of first starts."""
    seconds = median(record, "seconds", who=who, rows=size, cores=cores, start="first")
    return size / seconds if seconds else None


def _cores(record: dict) -> str:
    """A line a size that more than one number of cores has run."""
    counts, lines = core_counts(record), []
    for size in sizes(record):
        rates = [[rate(record, who, size, n) for n in counts] for who in ("ours", "trl")]
        cells = [_pair(*pair) if pair[0] else "not run" for pair in zip(*rates)]
        lines.append([f"{size:,} rows", *cells])
    return markdown(["fastdpo / TRL 1.16", *(f"{n} core{'s' * (n > 1)}" for n in counts)], lines)


def _resumed(found: list[dict]) -> str:
    """A line an objective and size."""
    lines = []
    for kind in dict.fromkeys((one["rows"], one["objective"], one["reference"]) for one in found):
        runs = [one for one in found if (one["rows"], one["objective"], one["reference"]) == kind]
        columns = ("stage_seconds", "step_seconds", "peak_bytes")
        stage, step, peak = (statistics.median(one[column] for one in runs) for column in columns)
        label = f"{kind[0]:,} rows, {kind[1]}, reference: {kind[2]}"
        lines.append([label, number(stage), number(step), f"{number(peak / 1e9)} GB"])
    text = (
        "`fastdpo train --resume` on a model of a few weights, imports and all, seconds from the command to "
        "the beginning of its first step and to the end of it:"
    )
    return f"{text}\n\n{markdown(('', 'begins', 'ends', 'peak memory'), lines)}"
