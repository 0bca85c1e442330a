"""The demo: what a newcomer runs first must learn what it says it learns."""

import signal

import pytest

from fastdpo.demo import demo
from fastdpo.errors import Stopped


def test_demo_learns(tmp_path):
    result = demo(tmp_path)
    assert result["accuracy_before"] < 0.75
    assert result["accuracy_after"] > 0.95
    assert result["polite_before"] < 0.8 and result["polite_after"] > 0.95


def test_a_stopped_demo_says_how_to_go_on(tmp_path, monkeypatch):
    def stopped(config, console):
        raise Stopped(signal.SIGTERM, "stopped; the same command with --resume goes on")

    monkeypatch.setattr("fastdpo.demo.train", stopped)
    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command starts it over") as caught:
        demo(tmp_path / "demo")
    assert "--resume" not in str(caught.value)
    with pytest.raises(Stopped):  # and it does
        demo(tmp_path / "demo")
