"""The command's OpenMP threads wait asleep, where nobody said otherwise."""

import os
import subprocess
import sys

import pytest

from benchmarks.process import python_path
from fastdpo.console import threads

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
TELLS = """
import subprocess, sys
subprocess.run([sys.executable, "-c", "import os; print('policy', os.environ.get('OMP_WAIT_POLICY'))"])
sys.exit(0)
"""


def command(*words, folders=(), **environment):
    """What a command of ours prints."""
    clean = {name: value for name, value in os.environ.items() if name not in NAMES}
    env = clean | python_path(*folders) | environment
    done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "environment, policy",
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")]
    + [({name: "1"}, "None") for name in NAMES[1:]],
)
def test_it_is_said_before_torch_is_loaded_and_to_child_processes(tmp_path, environment, policy):
    """A torch that starts a process, and ends, when it is loaded."""
    (tmp_path / "torch.py").write_text(TELLS)
    words = ("-m", "fastdpo.cli", "demo", str(tmp_path / "demo"))
    assert f"policy {policy}\n" in command(*words, folders=[tmp_path], **environment)


def test_openmp_has_heard_it():
    """libgomp's own word for it, beside what it says of a Python without the command."""
    alone = command("-c", "import torch", OMP_DISPLAY_ENV="verbose")
    if "GOMP_SPINCOUNT" not in alone:
        pytest.skip("this torch has another OpenMP than libgomp")
    assert "GOMP_SPINCOUNT = '0'" not in alone
    assert "GOMP_SPINCOUNT = '0'" in command("-m", "fastdpo.cli", "objectives", OMP_DISPLAY_ENV="verbose")


def test_a_python_that_has_torch_already_keeps_its_environment(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "torch", sys)
    threads.wait_asleep()
    assert "OMP_WAIT_POLICY" not in os.environ
