"""How OpenMP's threads wait for each other on a CPU: asleep, so that busy cores do the work."""

import os
import sys

_THEIRS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")  # any of them: hands off


def wait_asleep() -> None:
    """For the command's own process and its children, before torch is there: its OpenMP reads the
    environment once, when it is loaded. By default a thread spins at every barrier, for longer than a
    barrier takes, and beside other processes it takes the core that the last thread needs."""
    if "torch" not in sys.modules and not any(name in os.environ for name in _THEIRS):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
