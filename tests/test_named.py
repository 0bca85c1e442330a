"""A suite that is ended before its end names what failed, and what was running."""

import os
import signal
import subprocess
import sys

import pytest

from benchmarks.process import python_path

TESTS = {
    "conftest.py": r"""
import pytest

pytest_plugins = "tests.named"


@pytest.hookimpl(trylast=True)
def pytest_runtest_logstart(nodeid):
    print("\nBEGUN", nodeid)
""",
    "test_a.py": """
def test_right():
    pass


def test_wrong():
    assert "one" == "two"
""",
    "test_b.py": """
import threading


def test_hangs():
    threading.Event().wait()
""",
    "test_c.py": """
import os


def test_dies():
    os._exit(7)
""",
    "test_d.py": "nothing",
}


@pytest.fixture
def suite(tmp_path):
    """suite(*options): pytest over those files, in a process group of its own as under `timeout`."""
    started = []

    def start(*options):
        for name, text in TESTS.items():
            (tmp_path / name).write_text(text)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-s",
            "-p",
            "no:cacheprovider",
            "--rootdir=.",
            *options,
        ]
        around = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        started.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=around | python_path(),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


WRONG = "FAILED test_a.py::test_wrong - AssertionError: assert 'one' == 'two'"


@pytest.mark.parametrize("together", [(), ("-n", "2", "--dist", "loadfile")], ids=["alone", "xdist"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["TERM", "KILL"])
def test_a_suite_that_is_ended_has_named_what_failed(suite, together, number):
    process = suite("test_a.py", "test_b.py", *together)
    left = {WRONG, "BEGUN test_b.py::test_hangs"}
    for line in process.stdout:
        left.discard(line.rstrip())
        if not left:
            break
    assert not left
    os.killpg(process.pid, number)
    rest = process.communicate()[0]
    if number == signal.SIGTERM:
        assert "\nRUNNING test_b.py::test_hangs - ended by SIGTERM\n" in rest
        assert WRONG in rest and process.returncode == 2, rest  # pytest's own summary


def test_a_worker_that_dies_and_a_file_that_is_none(suite):
    said = suite("test_a.py", "test_c.py", "-n", "1", "--no-summary").communicate()[0]
    assert f"\n{WRONG}\n" in said and "\nFAILED test_c.py::test_dies - worker 'gw0' crashed" in said, said
    said = suite("test_a.py", "test_d.py", "-n", "1", "--no-summary").communicate()[0]
    assert "\nERROR test_d.py - NameError: name 'nothing' is not defined\n" in said, said


def test_verbose_output_names_each_test_once(suite):
    assert suite("test_a.py", "-vv", "--no-summary").communicate()[0].count("FAILED") == 1
