"""One training step of a microbatch on tensors without data: what it allocates, whose, and when."""

import importlib
import logging
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from unittest.mock import patch

import torch
from fastdpo_kernels import ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import varlen  # noqa: F401 (makes the operator)

from fastdpo.config.keys import Config
from fastdpo.errors import FastDPOError, ModelError
from fastdpo.model import offloading
from fastdpo.model.activations import decoder_layers, towers_layers
from fastdpo.model.towers import weights_beside
from fastdpo.optim.bytes import state_bytes, step_bytes
from fastdpo.optim.spec import OptimSpec
from fastdpo.planning import allocations, stand_ins
from fastdpo.planning.allocations import Peak, Tracker
from fastdpo.planning.fake_model import fake_policy
from fastdpo.planning.target import CUBLAS, Target
from fastdpo.planning.towers import Frozen, RealInputs
from fastdpo.records import PackedGroups, PreferenceGroup
from fastdpo.training.job import part

# the function hides the module of that name
head = importlib.import_module("fastdpo_kernels.linear_logp")


@dataclass(frozen=True)
class Load:
    """The microbatch that a step is simulated with."""

    groups: tuple[PreferenceGroup, ...]
    several: bool  # the step has other microbatches too, so that gradients are there from the start
    batch: PackedGroups | None = None  # in the place of the groups, where they have images
    images: bool = False  # some rows of the run have images, which a tower that trains learns from
    frozen: dict = field(default_factory=dict, compare=False)  # see towers.Frozen


class Step:
    """One step of a fake policy and its optimizer."""

    def __init__(self, config: Config, model_config, load: Load, target: Target):
        self.config, self.target, self.several = config, target, load.several
        self.optim = part(OptimSpec, config)
        block = allocations.CPU_BLOCK if target.is_cpu else allocations.CUDA_BLOCK
        mode, self.tracker = FakeTensorMode(allow_non_fake_inputs=True), Tracker(block)
        self.mode, self.policy = mode, fake_policy(config, model_config, target, mode, self.tracker)
        batch = self.policy.pack(load.groups) if load.batch is None else load.batch
        if batch.layout is not None:  # masks of a step before are not this one's
            batch = replace(batch, layout=replace(batch.layout, masks={}))
        elif self.policy.share:
            self.policy.set_sharing(False)
        self.batch = batch._with(partial(mode.from_tensor, static_shapes=True))
        if batch.images:
            self.batch = replace(self.batch, input_ids=batch.input_ids, images=batch.images)
            known = load.frozen.setdefault((block, self.policy.dtype, config.gradient_checkpointing), {})
            Frozen(towers_layers(self.policy.core), self.tracker, known)
        self.real = RealInputs() if batch.images else nullcontext()
        idle = set() if load.images else set(map(id, weights_beside(self.policy.core).values()))
        self.learning = [w for w in self.policy.trained() if id(w) not in idle]
        self.kept: list = []  # what lives throughout
        backward = torch.ops.torch_attn._varlen_attn_backward.default
        self.tracker.inside[backward] = stand_ins.varlen_backward_bytes, allocations.ATTENTION
        if not target.is_cpu:
            scatter = torch.ops.aten.masked_scatter.default
            self.tracker.inside[scatter] = stand_ins.masked_scatter_bytes, allocations.LAYER

    def run(self) -> list[Peak]:
        """The step's peaks, place by place."""
        policy, tracker, batch = self.policy, self.tracker, self.batch
        with self.mode, tracker, self.real:
            self.settle_in()
            if batch.layout is not None and not self.target.is_cpu:
                object.__setattr__(batch.layout, "seen", tracker)
            self._follow_layers()
            tracker.where = "forward"
            hidden = policy.hidden(batch)
            tracker.settle(allocations.SAVED)
            tracker.where = "head"
            with tracker.owned_by(allocations.HEAD):
                logp = self._head(hidden)
                del hidden
                for weight in self.learning:
                    weight.register_post_accumulate_grad_hook(self._accumulated)
                tracker.where = "backward of the head"
                grad = torch.ones_like(logp)
                logp.backward(grad)
            tracker.where = "optimizer step"
            largest = max(p.numel() for p in self.learning)
            torch.empty(max(1, step_bytes(self.optim, largest)), dtype=torch.uint8)
        return tracker.peaks()

    def settle_in(self) -> None:
        """What is there before the step: weights, states, the microbatch, gradients of earlier ones."""
        policy, tracker, config = self.policy, self.tracker, self.config
        tracker.where = "before the step"
        for tensor in (*policy.model.parameters(), *policy.model.buffers()):
            added = policy.core is not policy.model and tensor.requires_grad
            tracker.add(tensor, allocations.ADAPTERS if added else allocations.WEIGHTS)
        for tensor in self.batch._tensors():
            tracker.add(tensor, allocations.BATCH)
        if not self.target.is_cpu:
            self._keep(CUBLAS[self.target.capability >= (9, 0)], allocations.LAYER)
        for weight in self.learning:
            states = state_bytes(self.optim, weight.numel(), weight.dtype.itemsize, tuple(weight.shape))
            self._keep(states, allocations.STATES)
            if self.several and not config.optimizer_in_backward:  # that one adds up on the host
                with tracker.owned_by(allocations.GRADIENTS):
                    weight.grad = torch.empty_like(weight)

    def _keep(self, size: int, owner: str) -> None:
        with self.tracker.owned_by(owner):
            self.kept.append(torch.empty(size, dtype=torch.uint8))

    def _accumulated(self, parameter) -> None:
        self.tracker.own(parameter.grad, allocations.GRADIENTS)
        if self.config.optimizer_in_backward:
            with torch.no_grad(), self.tracker.owned_by(allocations.GRADIENTS):
                gradient, parameter.grad = parameter.grad, None
                if self.several:  # stepping.InBackward adds what earlier microbatches left, in fp32
                    earlier = torch.empty(parameter.shape, dtype=torch.float32)
                    gradient = earlier.add_(gradient)
                    del earlier
            torch.empty(step_bytes(self.optim, parameter.numel()), dtype=torch.uint8)

    def _head(self, hidden) -> torch.Tensor:
        """Policy.token_logp from the hidden states on."""
        policy, batch = self.policy, self.batch
        rows = hidden[batch.score_row].to(policy.dtype)
        with self.tracker.owned_by(allocations.GRADIENTS):
            into = None if self.config.optimizer_in_backward else policy.head.main_gradient(policy.dtype)
        tensors = policy.head.tensors(policy.dtype)
        if not self.target.is_cpu:
            if into is not None:
                tensors["weight"] = tensors["weight"].detach()  # no gradient is made of it
            return stand_ins.head(rows, policy.plan(len(rows)), tensors)
        tensors |= {"scale": policy.head.scale, "softcap": policy.head.softcap, "grad_into": into}
        return head.linear_logp(rows, target=batch.target, memory_budget=policy.head_budget, **tensors)

    def _follow_layers(self) -> None:
        """Hooks that tell the tracker which layer the step is in."""
        tracker = self.tracker

        def enter(number, module, args):
            if tracker.where.startswith("forward"):  # no recomputing
                tracker.where = f"forward of layer {number}"

        def leave(number, module, args, out):
            out = out[0] if isinstance(out, tuple) else out
            if out.requires_grad and tracker.where.startswith("forward"):
                out.register_hook(partial(turn, number))

        def turn(number, grad):
            tracker.where, tracker._owner = f"backward of layer {number}", None

        for number, layer in enumerate(decoder_layers(self.policy.core), 1):
            layer.register_forward_pre_hook(partial(enter, number))
            layer.register_forward_hook(partial(leave, number))


def simulate(
    config: Config, model_config, load: Load, target: Target, run: Callable[[Step], list[Peak]] = Step.run
) -> list[Peak]:
    """The peaks of one step, place by place, or of what else `run` does. Raises ConfigError for keys that the
    model does not allow, and ModelError where it does not run without data."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # a model says it all when it is loaded
            patch.object(log, "disabled", True),  # it prints what it raises, with its stack
            patch.object(ops, "_libc", None),  # asked for huge pages by an address, and these have none
            patch.object(head, "check_target_values", lambda target, V: None),  # nor values
            # what is offloaded goes where the tracker does not count, unless a CPU itself is planned
            patch.object(offloading, "HOST", offloading.HOST if target.is_cpu else allocations.HOST),
        ):
            return run(Step(config, model_config, load, target))
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
