"""Optimizer states and steps in the host's memory, while the device goes on.

Not torchao's CPUOffloadOptimizer: that copies gradients in the backward, so it never sees what clipping or
Dr. DPO's rescaling does to them afterwards, and it needs a GPU to be tested. Weights are not kept twice:
each piece comes over, is stepped, and goes back.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdpo.moving import to_host
from fastdpo.optim.pieces import Pieces


class Host:
    """A thread that works on the host's copies of a device's tensors. On CUDA its copies have a stream of
    their own, and so have the gradients': the thread would wait for gradients that are not computed yet."""

    def __init__(self, device: torch.device):
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="fastdpo-host")
        self.jobs: list[Future] = []
        # (event, the device's tensor) of the newest gradient on its way
        self.leaving: tuple[torch.cuda.Event, Tensor] | None = None
        self.cuda = device.type == "cuda"
        streams: Any = (torch.cuda.Stream(device) if self.cuda else None for _ in range(2))
        self.stream, self.copies = streams

    def submit(self, job: Callable[[Tensor], None], tensor: Tensor, copy: bool) -> None:
        """job(tensor) in the thread, after the device's work so far and the earlier jobs; with copy,
        job(a copy on the host), and the caller's reference may be the last."""
        event = None
        if self.cuda and copy:
            tensor, event = self._sent(tensor)
        elif self.cuda:
            event = torch.cuda.current_stream(tensor.device).record_event()
        self.jobs.append(self.worker.submit(self._run, job, tensor, event))

    def _sent(self, tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """(a copy on its way, when it is there). The device's memory is free once the next one is sent: not
        by record_stream, for Python launches the backward long before it is computed, so that no memory
        would be free again when the next gradient needs some."""
        computing = torch.cuda.current_stream(tensor.device)
        self.copies.wait_stream(computing)
        with torch.cuda.stream(self.copies):
            copy, _ = to_host(tensor)
            event = self.copies.record_event()
        if self.leaving:
            computing.wait_event(self.leaving[0])
        self.leaving = event, tensor
        return copy, event

    @torch.no_grad()
    def _run(self, job, tensor: Tensor, event) -> None:
        with torch.cuda.stream(self.stream) if self.cuda else nullcontext():
            if event:
                event.synchronize()  # a copy is complete; the device no longer reads the weight
            job(tensor)

    def wait(self) -> None:
        """Until all jobs are done; raises what one of them raised."""
        jobs, self.jobs = self.jobs, []
        for job in jobs:
            job.result()
        self.leaving = None  # its job waited for it
        if self.cuda:
            torch.cuda.current_stream().wait_stream(self.stream)

    def close(self) -> None:
        self.worker.shutdown(cancel_futures=True)


class HostPieces(Pieces):
    """A weight of the device whose pieces are stepped on the host, the next one on its way meanwhile."""

    where = "cpu"

    @torch.no_grad()
    def update(self, gradient: Tensor, rate: float, seed: int) -> None:
        flat, generator = self.weight.detach().view(-1), self.generator(seed)
        for piece, span, (values, part) in zip(self.pieces, self.spans, self._fetched(flat, gradient)):
            self.step_piece(piece, values, part, rate)
            if flat.is_cuda and not values.is_pinned():
                values = values.pin_memory()  # from there the device copies while the host goes on
            self.put_back(flat[span], values, generator)

    def _fetched(self, flat: Tensor, gradient: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Each piece's (weights, gradient) on the host, fp32; the next is asked for before one is used."""
        gradient, coming = gradient.reshape(-1), None
        sent = to_host if gradient.is_cuda else lambda part: (part, lambda: None)
        for span in [*self.spans, None]:
            here, coming = coming, span and (to_host(flat[span]), sent(gradient[span]))
            if here:
                (values, arrived), (part, part_arrived) = here
                arrived(), part_arrived()
                yield values.float(), part.float()
