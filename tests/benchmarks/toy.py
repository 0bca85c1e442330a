"""A worker for tests of the protocol: python -m tests.benchmarks.toy. No model, only losses."""

import os
import threading
import time

import torch

from benchmarks.peers.session import Absent, Session, serve


def train(job: dict, session: Session) -> None:
    print("libraries print into stdout")
    os.write(1, b"and below Python too\n")
    if job["fails"] == "memory":
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        except torch.OutOfMemoryError:
            raise RuntimeError("as a library puts it") from None
    if job["fails"] == "absent":
        raise Absent("toys are not installed")
    session.ready(fact=job["fails"])
    step = 0
    while session.next_step():
        step += 1
        if job["fails"] == "crash" and step == 3:
            os._exit(7)
        if job["fails"] == "slow":
            threading.Event().wait()
        time.sleep(0.02)
        session.done(lambda step=step: 1 / step)


if __name__ == "__main__":
    serve(train)
