"""python -m fastdpo.doctor.child DEVICE FD: the process that checks run in, and may die of.

Takes orders, ("module:name", arguments, seconds), from the connection FD, and answers each at once, with one
of {"value", "not_here", "failed"}. Whatever is printed goes to its parent's log. After a failure the parent
ends it: an illegal memory access would fail every later check.
"""

import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import traceback
from multiprocessing.connection import Connection

DEAD_SECONDS = 60  # after the time that an order has: the parent, which ends it then, is gone
PR_SET_PDEATHSIG = 1  # of Linux's <sys/prctl.h>: the end of the thread that started this process is its own


def reach(device: str) -> None:
    """Makes this the current device, which synchronize waits for, and raises where it cannot be used: that is
    no fault of a kernel."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    torch.zeros(1, device=device)


def main() -> None:
    if sys.platform == "linux":  # or who kills the parent's group would leave this one, which has its own
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.set_inheritable(int(sys.argv[2]), False)  # for its end tells the parent of ours
    parent = Connection(int(sys.argv[2]))
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, chain=True)  # says where it hangs, and dies
    import torch

    torch.set_num_threads(1)  # on a busy machine each small operation of two would wait for the slower one
    reach(sys.argv[1])
    from fastdpo.doctor.measuring import NotHere

    parent.send({"value": "ready"})
    while True:
        function, arguments, seconds = parent.recv()
        faulthandler.dump_traceback_later(seconds + DEAD_SECONDS, exit=True)
        try:
            module, name = function.split(":")
            value = getattr(importlib.import_module(module), name)(**arguments)
            if torch.device(sys.argv[1]).type == "cuda":
                torch.cuda.synchronize()  # what a kernel did shows here at the latest
            parent.send({"value": value})
        except NotHere as reason:
            parent.send({"not_here": str(reason)})
        except Exception as error:
            traceback.print_exc()
            parent.send({"failed": f"{type(error).__name__}: {error}"})
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
