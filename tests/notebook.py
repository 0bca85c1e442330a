"""examples/quickstart.ipynb, run: `python -m tests.notebook` runs it whole and keeps what it shows, for those
who read it where nothing runs; tests/test_notebook.py runs it shortened."""

import hashlib
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).resolve().parents[1] / "examples/quickstart.ipynb"


def read():
    return nbformat.read(PATH, as_version=4)


def code(book) -> list:
    return [cell for cell in book.cells if cell.cell_type == "code"]


def digest(book) -> str:
    """Of the code that the outputs are of."""
    return hashlib.sha256("\n\n".join(cell.source for cell in code(book)).encode()).hexdigest()


def run(book, folder) -> None:
    """Every cell, in one kernel, in that folder. A cell that raises ends it with CellExecutionError."""
    where = {"metadata": {"path": str(folder)}}
    options = {"timeout": None, "startup_timeout": 600, "record_timing": False, "kernel_name": "python3"}
    NotebookClient(book, resources=where, **options).execute()


def main() -> None:
    book = read()
    with tempfile.TemporaryDirectory() as folder:
        run(book, folder)
    for cell in code(book):  # what is printed tells one machine's speed and folders
        cell.outputs = [output for output in cell.outputs if output.output_type != "stream"]
    book.metadata = {"kernelspec": book.metadata.kernelspec, "language_info": {"name": "python"}}
    book.metadata["outputs_of"] = digest(book)
    nbformat.write(book, PATH)


if __name__ == "__main__":
    main()
