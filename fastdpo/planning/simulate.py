"""One training step of a microbatch on tensors without data: what it allocates, whose, and when."""

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from fastdpo_kernels import ops
from fastdpo_kernels.linear_logp import backward_pass, forward_pass
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen  # noqa: F401 (makes the operator)

from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.errors import FastDPOError, ModelError
from fastdpo.model import offloading
from fastdpo.model.activations import decoder_layers
from fastdpo.optim.bytes import state_bytes, step_bytes
from fastdpo.planning import stand_ins
from fastdpo.planning.allocations import (
    ADAPTERS,
    BATCH,
    GRADIENTS,
    HEAD,
    HOST,
    LAYER,
    SAVED,
    STATES,
    WEIGHTS,
    Peak,
    Tracker,
)
from fastdpo.planning.fake_model import FakePolicy, fake_batch, fake_policy
from fastdpo.planning.target import Target
from fastdpo.records import PackedGroups, PreferenceGroup


@dataclass(frozen=True)
class Load:
    """The microbatch that a step is simulated with."""

    groups: tuple[PreferenceGroup, ...]
    several: bool  # the step has other microbatches too, so that gradients are there from the start
    batch: PackedGroups | None = None  # in the place of the groups

    def packed(self, share: bool) -> PackedGroups:
        return pack(self.groups, share) if self.batch is None else self.batch


class Step:
    """A fake policy and its optimizer's states, ready for one step."""

    def __init__(self, config: Config, model_config, target: Target):
        self.config, self.target, self.several = config, target, False
        self.tracker = Tracker(target.block)
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.policy: FakePolicy = fake_policy(config, model_config, target, self.mode, self.tracker)
        self.kept: list = []  # what lives throughout
        backward = torch.ops.torch_attn._varlen_attn_backward.default
        self.tracker.inside[backward] = stand_ins.varlen_backward_bytes

    def run(self, load: Load) -> list[Peak]:
        """The step's peaks, place by place."""
        policy, tracker = self.policy, self.tracker
        batch = fake_batch(load.packed(policy.share), self.mode)
        with self.mode, tracker, _without_huge_pages(), self._host():
            self.several = load.several
            self._settle_in(batch, load.several)
            if batch.layout is not None and not self.target.is_cpu:
                object.__setattr__(batch.layout, "seen", tracker)
            handles = list(self._follow_layers())
            tracker.where = "forward"
            hidden = policy.hidden(batch)
            tracker.settle(SAVED)
            tracker.where = "head"
            with tracker.owned_by(HEAD):
                logp = self._head(hidden, batch)
                del hidden
                tracker.where = "backward of the head"
                grad = torch.ones_like(logp)
                logp.backward(grad)
            tracker.where = "optimizer step"
            largest = max(p.numel() for p in policy.trained())
            torch.empty(max(1, step_bytes(self.config, largest)), dtype=torch.uint8)
            for handle in handles:
                handle.remove()
        return tracker.peaks()

    def _settle_in(self, batch, several: bool) -> None:
        """What is there before the step: weights, states, the microbatch, gradients of earlier ones."""
        tracker = self.tracker
        tracker.where = "before the step"
        model, has_adapter = self.policy.model, self.policy.core is not self.policy.model
        for tensor in (*model.parameters(), *model.buffers()):
            tracker.add(tensor, ADAPTERS if has_adapter and tensor.requires_grad else WEIGHTS)
        for tensor in tensors_of(batch):
            tracker.add(tensor, BATCH)
        if self.target.cublas:
            with tracker.owned_by(LAYER):
                self.kept.append(torch.empty(self.target.cublas, dtype=torch.uint8))
        for parameter in self.policy.trained():
            size = state_bytes(
                self.config, parameter.numel(), parameter.dtype.itemsize, tuple(parameter.shape)
            )
            with tracker.owned_by(STATES):
                self.kept.append(torch.empty(size, dtype=torch.uint8))
            if several and not self.config.optimizer_in_backward:  # that one adds up on the host
                with tracker.owned_by(GRADIENTS):
                    parameter.grad = torch.empty_like(parameter)
            parameter.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, parameter) -> None:
        self.tracker.own(parameter.grad, GRADIENTS)
        if self.config.optimizer_in_backward:
            with torch.no_grad(), self.tracker.owned_by(GRADIENTS):
                gradient, parameter.grad = parameter.grad, None
                if self.several:  # optim_stepping.InBackward adds what earlier microbatches left, in fp32
                    earlier = torch.empty(parameter.shape, dtype=torch.float32)
                    gradient = earlier.add_(gradient)
                    del earlier
            torch.empty(step_bytes(self.config, parameter.numel()), dtype=torch.uint8)

    def _head(self, hidden, batch) -> torch.Tensor:
        """Policy.token_logp from the hidden states on."""
        policy = self.policy
        rows = hidden[batch.score_row].to(policy.dtype)
        del hidden
        tensors = policy.head.tensors(policy.dtype)
        how = policy.plan(len(rows))
        if not self.target.is_cpu:
            return stand_ins.head(rows, how, tensors)
        a, b, scale = tensors["lora"] or (None, None, 1.0)
        weights = (tensors["weight"], tensors["bias"], a, b)
        options = (scale, policy.head.scale, policy.head.softcap)
        return _TorchHead.apply(rows, *weights, batch.target, options, how)

    def _follow_layers(self) -> Iterator:
        """Hooks that tell the tracker which layer the step is in."""
        layers = decoder_layers(self.policy.core)
        for number, layer in enumerate(layers, 1):
            yield layer.register_forward_pre_hook(self._enters(number))
            yield layer.register_forward_hook(self._leaves(number))

    def _enters(self, number: int):
        def hook(module, args):
            if self.tracker.where == "forward" or self.tracker.where.startswith("forward of"):
                self.tracker.where = f"forward of layer {number}"

        return hook

    def _leaves(self, number: int):
        tracker = self.tracker

        def backward_begins(grad):
            tracker.where, tracker._owner = f"backward of layer {number}", None

        def hook(module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            if out.requires_grad and tracker.where.startswith("forward"):
                out.register_hook(backward_begins)

        return hook

    @contextlib.contextmanager
    def _host(self) -> Iterator[None]:
        """Inside, what is offloaded goes where the tracker does not count, unless a CPU itself is planned."""
        before = offloading.HOST
        offloading.HOST = before if self.target.is_cpu else HOST
        try:
            yield
        finally:
            offloading.HOST = before


class _TorchHead(torch.autograd.Function):
    """linear_logp on a CPU, without its look at the targets' values."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, a, b, target, options, how):
        args = (hidden, weight, bias, a, b, target, *options)
        logp, *saved = forward_pass(*args, "", how.name, how.width)
        ctx.how, ctx.options = how, options
        ctx.save_for_backward(*args[:6], logp, *saved)
        return logp

    @staticmethod
    def backward(ctx, grad):
        *inputs, logp = ctx.saved_tensors[:7]
        saved, how = list(ctx.saved_tensors[7:]), ctx.how
        if how.name == "frozen":
            return (saved[-1] * grad[:, None]).to(saved[-1].dtype), *(None,) * 7
        need = list(ctx.needs_input_grad[:5])
        options = (*ctx.options, how.name, how.width, need)
        grads = iter(backward_pass(grad, None, *inputs, logp, None, saved, *options))
        return *(next(grads) if wanted else None for wanted in need), None, None, None


@contextlib.contextmanager
def _without_huge_pages() -> Iterator[None]:
    """The head asks Linux for huge pages by a tensor's address, and these have none."""
    libc, ops._libc = ops._libc, None
    try:
        yield
    finally:
        ops._libc = libc


def tensors_of(record) -> Iterator[torch.Tensor]:
    """All tensors of a packed batch and its layout."""
    for value in vars(record).values():
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from (v for v in value if isinstance(v, torch.Tensor))
        elif hasattr(value, "kv_index"):
            yield from tensors_of(value)


def simulate(config: Config, model_config, load: Load, target: Target) -> list[Peak]:
    """The peaks of one step, place by place. Raises ConfigError for keys that the model does not allow, and
    ModelError where it does not run without data."""
    log = logging.getLogger("torch._subclasses.fake_tensor")  # which prints what it raises, with its stack
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a model says of its own settings, it says when it is loaded
        quiet, log.disabled = log.disabled, True
        try:
            return Step(config, model_config, target).run(load)
        except FastDPOError:
            raise
        except Exception as error:
            name = (getattr(model_config, "architectures", None) or [model_config.model_type])[0]
            what = (str(error).strip().splitlines() or [""])[0]
            raise ModelError(
                f"{name} cannot be planned, as a step of it does not run on tensors without data "
                f"({type(error).__name__}: {what}); leave memory out, and set max_tokens and "
                "gradient_checkpointing yourself"
            ) from error
        finally:
            log.disabled = quiet
