"""Which optimizers this machine can step, and two weights that they are stepped on."""

import importlib.util
from contextlib import closing

import pytest
import torch

from fastdpo.config.keys import Config
from fastdpo.optim.stepping import InBackward, WeightOptimizer

RATE = 1e-2


def needs(library):
    found = importlib.util.find_spec(library) is not None
    return pytest.mark.skipif(not found, reason=f"{library} is not installed (pip install 'fastdpo[quant]')")


OPTIMIZERS = [
    "adamw_torch_fused",
    "sgd",
    "adafactor",
    "rmsprop",
    pytest.param("adamw_8bit", marks=needs("bitsandbytes")),
    pytest.param("adamw_torch_8bit", marks=needs("torchao")),
    pytest.param("adamw_torch_4bit", marks=needs("torchao")),
]


@pytest.fixture(autouse=True)
def eager():
    """torchao compiles its step, which is tens of seconds of C++ here; the formula is the same."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def config(**keys):
    keys = dict(learning_rate=RATE, max_grad_norm=0, weight_decay=0.1) | keys
    return Config(model="m", data="d", **keys)


def weights(dtype=torch.float32, shapes=((64, 130), (72,), (64, 128))):
    """Two matrices that are large enough for 8-bit states, one not of whole blocks, and a vector."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def make(some, **keys):
    """The optimizer of these weights; matrices decay."""
    keys = config(**keys)
    groups = [
        {"params": [p for p in some if p.ndim > 1], "weight_decay": keys.weight_decay},
        {"params": [p for p in some if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return (InBackward if keys.optimizer_in_backward else WeightOptimizer)(groups, keys)


def backward(some, step):
    """Gradients that are a function of the weights and of the step."""
    torch.manual_seed(100 + step)
    sum((w.float() * torch.randn(w.shape).to(w.device) + w.float() ** 2).sum() for w in some).backward()


def one_step(optimizer, some, step):
    if optimizer.in_backward:
        optimizer.last_microbatch()
    backward(some, step)
    optimizer.step()
    optimizer.zero_grad()


def stepped(steps=4, some=None, **keys):
    """(the weights after so many steps, the states)."""
    some = weights(torch.bfloat16 if keys.get("pure_bf16") else torch.float32) if some is None else some
    with closing(make(some, **keys)) as optimizer:
        for step in range(steps):
            one_step(optimizer, some, step)
        return some, optimizer.tensors()
