"""When memory ends in the update or on held-out rows, and how gradients leave a device."""

import contextlib
import gc
import weakref
from contextlib import closing

import pytest
import torch
from rich.console import Console

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.errors import TrainingError
from fastdpo.optim import offload
from fastdpo.optim.library import Library
from fastdpo.optim.offload import Host
from fastdpo.training.accumulate import Accumulator
from fastdpo.training.stage import Stage
from tests.tiny import rows, save_model, write_jsonl


def no_memory(*args, **keys):
    raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return dict(model=save_model(folder / "model"), data=write_jsonl(folder / "rows.jsonl", rows(12)))


def ends(inputs, tmp_path, **keys):
    """How a run ends that cannot go on."""
    common = dict(batch_size=4, max_steps=4, save_steps=2, max_length=64, samples=0, dtype="fp32")
    config = Config(output_dir=str(tmp_path / "run"), **(inputs | common | keys))
    with pytest.raises(TrainingError) as error:
        train(config, Console(quiet=True))
    return str(error.value)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        dict(offload_optimizer=True),
        dict(offload_optimizer=True, optimizer_in_backward=True, max_grad_norm=0),
    ],
    ids=str,
)
def test_no_memory_for_an_update_says_what_to_try(inputs, tmp_path, monkeypatch, keys):
    """In the third step, wherever it is: the checkpoint of the second stays, and is named."""
    real, rates = Library.step, set()

    def step(self, groups, rate):
        rates.add(rate)  # each step has its own
        if len(rates) == 3:
            no_memory()
        real(self, groups, rate)

    monkeypatch.setattr(Library, "step", step)
    text = ends(inputs, tmp_path, **keys)
    assert "step 3: out of GPU memory in the optimizer's update. " in text
    assert ("offload_optimizer: true" in text) == (not keys)  # not where it is in use
    for word in ("predicted", "measured", "next: ", "checkpoints/step-2"):
        assert word in text, text


def test_no_memory_for_held_out_rows_says_which(inputs, tmp_path, monkeypatch):
    real = Stage.score
    out = lambda self, batch, stats=(): no_memory() if stats else real(self, batch, stats)
    monkeypatch.setattr(Stage, "score", out)
    text = ends(inputs, tmp_path, eval_data=0.2, eval_steps=2)
    assert "step 0: out of GPU memory on a microbatch of" in text and "measured" in text


def test_the_factor_on_bf16_gradients_is_not_rounded_to_bf16():
    """Dr. DPO's 1 / total: rounded, it would be off by up to 2^-9, the same way in every gradient."""
    gradient = torch.randn(1000).bfloat16()
    p = torch.nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient.clone()
    accumulator = Accumulator([p], *[None] * 4, memory={})
    accumulator._scale_gradients(torch.tensor(1 / 3, dtype=torch.float64))
    assert torch.equal(p.grad, (gradient.float() / 3).bfloat16())


class Stream:
    """A CUDA stream that only keeps what it waits for."""

    def __init__(self, *args):
        self.waits = []

    def wait_stream(self, other):
        self.waits.append(other)

    def wait_event(self, event):
        self.waits.append(event)

    def record_event(self):
        return Event()


class Event:
    def synchronize(self):
        pass


def test_gradients_on_their_way_hold_up_no_work_on_the_host(monkeypatch):
    """As on CUDA: the stream of the thread never waits for the device, the device waits for a gradient's
    copy before its memory is used again, and it keeps one gradient at most."""
    computing = Stream()
    for name, fake in dict(
        Stream=Stream,
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=lambda *args: computing,
    ).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(offload, "to_host", lambda tensor: (tensor.clone(), None))
    with closing(Host(torch.device("cuda"))) as host:
        done, gone = [], []
        for number in range(4):
            gradient = torch.full((3,), float(number))
            gone.append(weakref.ref(gradient))
            host.submit(lambda copy: done.append(float(copy[0])), gradient, copy=True)
            del gradient
            gc.collect()
            assert [ref() is None for ref in gone] == [True] * number + [False]
            assert len(computing.waits) == number
        host.wait()
        assert done == [0, 1, 2, 3] and gone[-1]() is None
        assert not host.stream.waits and computing.waits[-1] is host.stream
        assert host.copies.waits == [computing] * 4
