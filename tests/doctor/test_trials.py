"""One check in a child process: whatever becomes of it costs no other check, and is told in a line."""

import os
import signal
import subprocess
import sys

import pytest

from benchmarks.process import python_path
from fastdpo.doctor import trials
from fastdpo.doctor.trials import Children, NotStarted, try_check

PLANTS = "tests.doctor.doctor_plants"


def tried(*names):
    """{plant: Outcome} of all in turn, and how many processes that took."""
    with Children("cpu") as children:
        outcomes = {name: try_check(children, f"{PLANTS}:{name}", {"device": "cpu"}) for name in names}
        return outcomes, children.started


def test_all_right_takes_one_process():
    outcomes, started = tried("right", "is_not_here", "wrong", "right")
    assert [o.verdict for o in outcomes.values()] == ["right", "not here", "inexact"]
    assert started == 1
    assert outcomes["right"].worst == ("gradient", 2e-4, 1e-3)  # nearest to its bound
    assert outcomes["is_not_here"].why == "this chip has none"


FAULTS = {
    "raises": ("failed", "RuntimeError: no kernel image is available"),
    "segfaults": ("failed", "died of SIGSEGV"),
    "aborts": ("failed", "died of SIGABRT"),
    "exits": ("failed", "exit code 7"),
    "wrong": ("inexact", "gradient: 2.5e-01, 1.0e-03 allowed"),
    "not_a_number": ("inexact", "gradient: nan"),
    "prints_rubbish": ("inexact", "gradient: 2.5e-01"),
    "measures_nothing": ("failed", "measured nothing"),
    "out_of_memory": ("unknown", "CUDA out of memory"),
    "returns_something_else": ("failed", "returned {'right': True}"),
}


def test_every_fault_costs_its_own_check_alone():
    """... and the good checks between them are still made."""
    with Children("cpu") as children:
        for name, (verdict, why) in FAULTS.items():
            outcome = try_check(children, f"{PLANTS}:{name}", {"device": "cpu"})
            assert (outcome.verdict, why in outcome.why) == (verdict, True), outcome
            assert "\n" not in outcome.why
            if name in ("raises", "segfaults"):  # text for a bug report
                assert f"in {name}" in outcome.detail, outcome.detail
            assert try_check(children, f"{PLANTS}:right", {"device": "cpu"}).verdict == "right"


def test_a_hang_ends_at_its_limit_and_says_where():
    with Children("cpu") as children:
        hung = try_check(children, f"{PLANTS}:hangs", {"device": "cpu"}, 1)
        assert (hung.verdict, hung.why) == ("failed", "no answer within 1 s")
        assert "in hangs" in hung.detail
        assert try_check(children, f"{PLANTS}:right", {"device": "cpu"}).verdict == "right"
        assert children.started == 2


def test_a_child_that_does_not_start_is_no_verdict():
    with Children("cuda:99") as children, pytest.raises(NotStarted, match="exit code 1: "):
        try_check(children, f"{PLANTS}:right", {"device": "cuda:99"})


def test_what_is_known_stays_known_where_no_second_child_starts(monkeypatch):
    orders = [(f"{PLANTS}:{name}", {"device": "cpu"}) for name in ("right", "segfaults", "right", "right")]
    real, opened = trials.subprocess.Popen, []

    def once(*args, **keys):
        opened.append(args)
        if len(opened) > 1:
            raise OSError("no more processes")
        return real(*args, **keys)

    monkeypatch.setattr(trials.subprocess, "Popen", once)
    with Children("cpu") as children:
        outcomes = [try_check(children, *order) for order in orders]
    assert [o.verdict for o in outcomes] == ["right", "failed", "failed", "failed"]
    assert {o.why for o in outcomes[2:]} == {"no further process starts: no more processes"}
    assert len(opened) == 2  # which is not tried again for each check
    with Children("cpu") as children, pytest.raises(NotStarted, match="no more processes"):
        try_check(children, *orders[0])


def test_a_child_keeps_what_its_parent_carries(tmp_path, monkeypatch):
    """Packages on PYTHONPATH, or put on sys.path since; but none of the working directory."""
    (tmp_path / "carried").mkdir()
    (tmp_path / "carried/carried_package.py").write_text("")
    work = tmp_path / "work"
    work.mkdir()
    (work / "random.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(work)
    monkeypatch.setenv("CARRIED", "yes")
    monkeypatch.syspath_prepend(str(tmp_path / "carried"))
    monkeypatch.setattr(sys, "path", [os.path.abspath(p) for p in sys.path if p])
    assert tried("sees")[0]["sees"].verdict == "right"
    script = f"from fastdpo.doctor.trials import *\nwith Children('cpu') as c: print(c.ask('{PLANTS}:sees', "
    environment = os.environ | python_path(tmp_path / "carried")
    done = subprocess.run(
        [sys.executable, "-P", "-c", script + "{'device': 'cpu'}))"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert "carried_package" in done.stdout and "failed=None" in done.stdout, done.stdout + done.stderr


def test_a_signal_ends_the_child_and_is_no_verdict():
    """Ctrl-C is not for the child, whose death would be taken for a kernel's crash."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell ignores it
    with pytest.raises(KeyboardInterrupt), Children("cpu") as children:
        assert try_check(children, f"{PLANTS}:right", {"device": "cpu"}).verdict == "right"
        process = children._process
        assert os.getsid(process.pid) != os.getsid(0)
        try_check(children, f"{PLANTS}:interrupts", {"device": "cpu"})
    signal.signal(signal.SIGINT, before)
    assert process.returncode == -signal.SIGKILL
