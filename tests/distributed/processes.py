"""Ranks of one world for tests: processes with gloo on the CPU, which run function after function."""

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

TIMEOUT = 180  # seconds that a function may take on a busy machine


class Ranks:
    """`ranks(function, ...)` calls function(world, ...) in n processes and returns what each one returned. A
    function that raises ends them all. Functions have to be importable."""

    def __init__(self, size: int, per_node: int | None = None):
        import torch.distributed as dist

        context = multiprocessing.get_context("spawn")
        self.store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            told = environment(rank, size, self.store.port, per_node)
            process = context.Process(target=_serve, args=(rank, told, there), daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def __call__(self, function: Callable, *args: Any, **keys: Any) -> list:
        for pipe in self.pipes:
            pipe.send((function, args, keys))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(TIMEOUT), f"rank {rank} does not answer"
            answers.append(pipe.recv())
        errors = [text for is_error, text in answers if is_error]
        assert not errors, "\n".join(errors)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def environment(rank: int, size: int, port: int, per_node: int | None = None) -> dict[str, str]:
    """What torchrun tells a process; the store is this one's, as it is torchrun's agent's."""
    numbers = dict(RANK=rank, WORLD_SIZE=size, LOCAL_RANK=rank % (per_node or size))
    numbers |= dict(LOCAL_WORLD_SIZE=per_node or size, MASTER_PORT=port)
    fixed = dict(MASTER_ADDR="127.0.0.1", TORCHELASTIC_USE_AGENT_STORE="True", OMP_NUM_THREADS="1")
    return {name: str(value) for name, value in (numbers | fixed).items()}


def _serve(rank: int, told: dict[str, str], pipe) -> None:
    os.environ.update(told)
    from fastdpo.distributed.world import joined

    with contextlib.suppress(EOFError), joined() as world:
        while True:
            function, args, keys = pipe.recv()
            try:
                pipe.send((False, function(world, *args, **keys)))
            except BaseException:
                pipe.send((True, f"rank {rank}:\n{traceback.format_exc()}"))
                sys.stdout.flush()
