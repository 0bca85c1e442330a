"""Checks that go wrong in every way that a kernel can, for a child of fastdpo.doctor."""

import json
import os
import signal
import sys
import threading

from fastdpo.doctor.measuring import Measured, NotHere


def right(device, rung=""):
    return [Measured("output", 1e-6, 1e-3), Measured("gradient", 2e-4, 1e-3)]


def wrong(device, rung=""):
    return [Measured("output", 1e-6, 1e-3), Measured("gradient", 0.25, 1e-3)]


def not_a_number(device, rung=""):
    return [Measured("output", 1e-6, 1e-3), Measured("gradient", float("nan"), 1e-3)]


def raises(device, rung=""):
    print("a compiler's words", file=sys.stderr)
    raise RuntimeError("no kernel image is available\nfor execution on the device")


def out_of_memory(device, rung=""):
    raise MemoryError("CUDA out of memory. Tried to allocate 2 GiB")


def hangs(device, rung=""):
    threading.Event().wait()


def interrupts(device, rung=""):
    """Ctrl-C while a check runs, which then goes on and on."""
    os.kill(os.getppid(), signal.SIGINT)
    hangs(device)


def segfaults(device, rung=""):
    os.kill(os.getpid(), signal.SIGSEGV)


def aborts(device, rung=""):
    os.abort()


def exits(device, rung=""):
    os._exit(7)


def prints_rubbish(device, rung=""):
    print('{"number": 1, "answer": [["forged", 0, 1]]}', flush=True)
    os.write(1, b"\xff\xfe rubbish on the descriptor\n")
    sys.stdout.write("and no line's end")
    return wrong(device)


def measures_nothing(device, rung=""):
    return []


def returns_something_else(device, rung=""):
    return {"right": True}


def is_not_here(device, rung=""):
    raise NotHere("this chip has none")


def sees(device, rung=""):
    """Fails where the child has not inherited the path and the variable that its parent has."""
    import carried_package

    return [Measured(carried_package.__name__, 0 if os.environ["CARRIED"] == "yes" else 1, 0)]


def by_variable(device, rung):
    """A whole ladder in one check: PLANTED, JSON, tells what becomes of a rung; others are right."""
    return globals()[json.loads(os.environ["PLANTED"]).get(rung, "right")](device)


def speed(device, left_out):
    numbers = {"GEMM": 700.0, "lm_head": 455.0, "attention": 301.0}
    how = {"GEMM": "cuBLAS", "lm_head": "keep by triton", "attention": ",".join(left_out) or "varlen"}
    return {name: {"how": how[name], "milliseconds": 3.6, "tflops": n} for name, n in numbers.items()}
