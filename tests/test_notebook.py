"""examples/quickstart.ipynb runs, here shorter; what is shown in it is of its code, and of no machine."""

import re

import pytest

pytest.importorskip("nbclient", reason="needs nbclient and ipykernel: pip install 'fastdpo[test]'")
pytest.importorskip("ipykernel", reason="needs nbclient and ipykernel: pip install 'fastdpo[test]'")

from nbformat.v4 import new_code_cell

from tests import notebook

SHORTER = {"num_epochs=10": "num_epochs=0.1", "num_epochs=2": "max_steps=6"}
INTERRUPTED = """\
import os, signal
from fastdpo.training.log import RunLog

advance = RunLog.advance
RunLog.advance = lambda *args: advance(*args) or os.kill(os.getpid(), signal.SIGINT)
keys = shared | dict(model=sft / "model", data=folder / "data/train.jsonl", output_dir="cut", max_steps=2)
fastdpo.train(keys)"""
RESUMED = "RunLog.advance = advance\nprint(fastdpo.train(keys, resume=True))"


def printed(cell, stream: str) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == stream)


def shown(cell, kind: str) -> list[str]:
    return [output.data[kind] for output in cell.outputs if kind in output.get("data", {})]


def test_it_runs(tmp_path):
    """And then, as a reader would: interrupts a run, and goes on from it in the same kernel."""
    book = notebook.read()
    for cell in notebook.code(book):
        for long, short in SHORTER.items():
            cell.source = cell.source.replace(long, short)
    assert all(short in str(book.cells) for short in SHORTER.values())
    stops = {"tags": ["raises-exception"]}
    book.cells += [new_code_cell(INTERRUPTED, metadata=stops), new_code_cell(RESUMED)]
    notebook.run(book, tmp_path)
    *_, sft, dpo, plot, table, cut, resumed = notebook.code(book)
    for cell in (sft, dpo, resumed):  # plain lines, each once
        said = printed(cell, "stdout")
        assert "\x1b" not in said and said.count("done: the model is in") == 1
        assert "ipywidgets" not in printed(cell, "stderr") and not shown(cell, "text/html")
    assert shown(plot, "image/png") and "What do I buy?" in shown(table, "text/html")[0]
    assert cut.outputs[-1].ename == "Stopped" and "resume goes on from it" in cut.outputs[-1].evalue
    assert "step-1" in printed(resumed, "stdout") and printed(resumed, "stdout").endswith("cut\n")


def test_what_it_shows_is_of_its_code_and_of_no_machine():
    book = notebook.read()
    assert book.metadata["outputs_of"] == notebook.digest(book), "run: python -m tests.notebook"
    cells = notebook.code(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} == {"display_data", "execute_result"}
    words = "".join(output.data["text/plain"] for output in outputs)
    assert not re.search(r"/(home|tmp|root|work|Users)/|tokens/s|pairs/s|\d:\d\d:\d\d", words)
    assert any(shown(cell, "image/png") for cell in cells)
