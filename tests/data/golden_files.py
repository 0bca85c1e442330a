"""Files of every kind that the tests know, several of them, and shared data: cases of golden_rows.py."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict

from tests.data.conversations import random_row
from tests.data.golden_cases import PARTS, Case, lines, text
from tests.data.shared_data import (
    DATA,
    assistant,
    chat_row,
    ranked_row,
    real_tokenizer,
    template,
    text_row,
    user,
    write_lines,
)
from tests.data.templates.case import CONVERSATIONS
from tests.data.test_fuzz_rows import GOOD, broken

ROWS = [text_row(chosen=f" Hi {i}!") for i in range(7)] + [
    text_row(rejected=" morning"),
    chat_row(),
    text_row(),
]
TEXTS = [text_row(chosen=f" Hi {i}!") for i in range(9)] + [
    text_row(rejected=" morning"),
    text_row("None", "NA", "1"),
]


def files() -> Iterator[tuple[str, Case]]:
    row = json.dumps(text_row())
    bad = "\n".join(["\ufeff" + row, "", "{", "  ", "7", row + "\r", '{"a": 1, "a": 2}', "[" * 99_999, row])
    yield "file jsonl", Case(text(bad + "\n\n" + row, "d.jsonl"))
    yield "file json, lines", Case(text(f"\n{row}\n\n{row}\r\n{{\n{row}", "d.json"))
    yield "file json, array", Case(text(f'\n [ {row},\n\n{{\n"prompt": "p"}}\n, 3, {row}]\n\n', "d.json"))
    yield "file json, 16 bits", Case(text(json.dumps(ROWS), "d.json", "utf-16"))
    yield "file jsonl, not utf-8", Case(text(f'{row}\n{row[:-3]}é"}}\n{row}', "d.jsonl", "latin-1"))
    quoted = (
        '\ufeffprompt,chosen,rejected,score_chosen\r\n"a\nb, ""c""",x,y,1\r\n\r\np,"x\r\n\n",y,\r\nq,x\r\n'
    )
    yield "file csv", Case(text(quoted + "r,x,y,z", "d.csv"))
    judged = "prompt,completion,label\ntrue,1,TRUE\na,b,0.0\na,b,perhaps\n"
    yield "file csv, labels", Case(text(judged, "d.csv"))
    yield "file parquet", Case(partial(arrow, "d.parquet"))
    yield "file parquet, part", Case(lambda folder: arrow("d.parquet", folder) + "#train[2:90%]")
    yield "folder of save_to_disk", Case(partial(arrow, "saved"))
    yield "folder of splits", Case(splits)
    yield "folder of files", Case(folder_of("d{}.jsonl", ROWS))
    yield "folder of csv files", Case(folder_of("d{}.csv", TEXTS))
    yield "folder of parquet files", Case(folder_of("d{}.parquet", TEXTS))
    yield "parts of a file", Case(lambda folder: lines(ROWS)(folder) + "#train[-3:]+train[:20%]")


def arrow(name: str, folder: Path, rows: list = TEXTS) -> str:
    """With columns that only some rows fill."""
    turns = {"tools": [{"name": "f", "x": None}], "system": "S"}
    data = Dataset.from_list([row | (turns if i % 3 else {}) for i, row in enumerate(rows)])
    (data.to_parquet if name.endswith("parquet") else data.save_to_disk)(folder / name)
    return str(folder / name)


def splits(folder: Path) -> str:
    parts = {"train": Dataset.from_list(TEXTS), "test": Dataset.from_list(TEXTS[:2])}
    DatasetDict(parts).save_to_disk(folder / "saved")
    return f"{folder}/saved#test+train[4:]"


def folder_of(name: str, rows: list[dict]) -> Callable[[Path], str]:
    def write(folder: Path) -> str:
        for number in range(3):
            path = folder / name.format(number)
            if path.suffix == ".parquet":
                Dataset.from_list(rows).to_parquet(path)
            elif path.suffix == ".jsonl":
                write_lines(path, [*rows, "{"])
            else:
                with path.open("w", newline="") as file:
                    csv.writer(file).writerows([rows[0], *(row.values() for row in rows)])
        return str(folder)

    return write


def several() -> Iterator[tuple[str, Case]]:
    def sets(folder: Path) -> list[str]:
        first, second = lines([*ROWS, "{"], "a.jsonl")(folder), lines(ROWS[3:], "b.jsonl")(folder)
        return [first, f"{second}#train[1:]", arrow("c.parquet", folder)]

    yield "several sets", Case(sets)
    yield "several sets, some held out", Case(sets, keys={"eval_data": 0.2, "seed": 3})
    yield "several sets, held-out ones", Case(sets, keys={"eval_data": ["FOLDER/b.jsonl"]})
    yield "held out by number", Case(lines(ROWS), keys={"eval_data": 4, "seed": 1})
    yield "all held out", Case(lines(ROWS), keys={"eval_data": 900})
    yield "no row left", Case(lines([ROWS[7], "{", {"a": 1}, ROWS[7], "{"]))
    yield "no file", Case(lambda folder: f"{folder}/d.jsonl")
    cut = chat_row() | {"chosen": [assistant("a"), user("b")]}
    for name, bad in {"line": "{", "row": ROWS[7], "note": cut}.items():
        rows = [*ROWS[:6], "", bad, "{", ROWS[7]]
        yield f"strict, a bad {name}", Case(lines(rows), keys={"strict": True})
    yield "strict, several sets", Case(sets, keys={"strict": True})
    one_missing = lambda folder: [lines(["{", *ROWS])(folder), f"{folder}/b.jsonl"]
    yield "strict, second set missing", Case(one_missing, keys={"strict": True})
    one_broken = lambda folder: [lines(["{", *ROWS])(folder), text("[{},\n,{}]", "b.json")(folder)]
    yield "strict, second set no JSON", Case(one_broken, keys={"strict": True})
    yield "many rows", Case(many)


def many(folder: Path) -> str:
    """More than a shard holds, with drops, notes, formats and duplicates on both sides of its end."""
    chance, good = random.Random(2), [row for rows in GOOD.values() for row in rows]
    rows: list = [text_row(chosen=f" {i // 2}", rejected=f" {i}!") for i in range(2046)]
    rows += [ROWS[7], "{", *good, chat_row(), *rows[:40], ROWS[7]]
    rows += [broken(chance.choice(good), chance) for _ in range(100)]
    rows += [ranked_row(*[(f" {i}", i % 3) for i in range(n % 4 + 1)]) for n in range(2000)]
    return write_lines(folder / "d.jsonl", rows)


def shared() -> Iterator[tuple[str, Case]]:
    parts = {("pref/hh_rlhf_test", "gpt2"): "", ("pref/hh_rlhf_train", "qwen2.5"): "#train[:2300]"}
    parts |= {("ranked/ranked_responses", name): "#train[:150]" for name in ("gpt2", "qwen2.5")}
    for (file, name), part in parts.items():
        write, keys = lambda folder, part=f"{file}.jsonl{part}": str(DATA / part), {"max_length": 300}
        yield f"shared {file}, {name}", Case(write, partial(real_tokenizer, name), keys, True)
    for name in ("chatml", "qwen2.5-instruct", "zephyr", "mistral-instruct", "llama-3-instruct"):

        def with_template(name=name):
            tokenizer = real_tokenizer("stories260K")
            tokenizer.chat_template = template(name)
            return tokenizer

        rows = [*CONVERSATIONS.values(), *(random_row(seed) for seed in range(6))]
        yield f"shared template {name}", Case(lines(rows), with_template, needs_shared=True)


CASES: dict[str, Case] = {name: case for part in (*PARTS, files, several, shared) for name, case in part()}
