"""The demo stopped; that it learns is seen where it is installed, in test_wheel.py."""

import signal

import pytest

from fastdpo.demo import demo
from fastdpo.errors import Stopped


def test_a_stopped_demo_says_how_to_go_on(tmp_path, monkeypatch):
    def stopped(config, console):
        raise Stopped(signal.SIGTERM, "stopped; the same command with --resume goes on")

    monkeypatch.setattr("fastdpo.demo.train", stopped)
    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command starts it over") as caught:
        demo(tmp_path / "demo")
    assert "--resume" not in str(caught.value)
    with pytest.raises(Stopped):  # and it does
        demo(tmp_path / "demo")
