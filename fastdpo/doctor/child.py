"""python -m fastdpo.doctor.child DEVICE: the process that checks run in, and may die of.

Reads one order a line from stdin, {"number", "function": "module:name", "arguments"}, and answers each with
one line on what was its stdout, {"number", "answer" | "not_here" | "failed"}, at once. Whatever else is
printed goes to stderr. After a failure its parent ends it: an illegal memory access would fail every later
check.
"""

import ctypes
import faulthandler
import importlib
import json
import os
import signal
import sys
import traceback

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
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tell = lambda **answer: print(json.dumps(answer), file=answers, flush=True)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    import torch

    torch.set_num_threads(1)  # on a busy machine each small operation of two would wait for the slower one
    reach(sys.argv[1])
    from fastdpo.doctor.measuring import NotHere

    tell(number=0, answer="ready")
    for line in sys.stdin:
        order = json.loads(line)
        faulthandler.dump_traceback_later(order["seconds"] + DEAD_SECONDS, exit=True)
        try:
            module, name = order["function"].split(":")
            answer = getattr(importlib.import_module(module), name)(**order["arguments"])
            if torch.device(sys.argv[1]).type == "cuda":
                torch.cuda.synchronize()  # what a kernel did shows here at the latest
            tell(number=order["number"], answer=answer)
        except NotHere as reason:
            tell(number=order["number"], not_here=str(reason))
        except Exception as error:
            traceback.print_exc()
            tell(number=order["number"], failed=f"{type(error).__name__}: {error}")
        faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    main()
