"""When weights are updated: all at the end of a step, or each in the backward once its gradient is complete.

In the backward (LOMO, Lv et al. 2023, arXiv 2306.09782), a gradient lives from its last addition to its
update; of several microbatches, the sum of all but the last waits in the host's memory.
"""

from collections import defaultdict
from functools import partial

import torch
from torch import Tensor

from fastdpo.optim.library import Library
from fastdpo.optim.offload import Host, HostPieces
from fastdpo.optim.pieces import Pieces, Whole, noise_seed
from fastdpo.optim.spec import OptimSpec


class WeightOptimizer(torch.optim.Optimizer):
    """Steps as any torch optimizer does; `param_groups` hold the learning rate and the weight decay, the
    library holds the states. close() it when no step follows."""

    def __init__(self, groups: list[dict], spec: OptimSpec):
        super().__init__(groups, {"lr": spec.learning_rate})
        self.library, self.seed, self.steps = Library(spec), spec.seed, 0
        self.offloads, self.in_backward = spec.offload_optimizer, spec.optimizer_in_backward
        way = lambda p: HostPieces if self.offloads else Pieces if p.dtype == torch.bfloat16 else Whole
        self.ways = {  # how each is stepped
            p: way(p)(p, self.library, group["weight_decay"])
            for group in self.param_groups
            for p in group["params"]
        }
        self.weights = list(self.ways)
        self.numbers = {p: number for number, p in enumerate(self.weights)}
        self.host = Host(self.weights[0].device) if self.offloads or self.in_backward else None

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without a closure
        """Updates every weight that has a gradient."""
        if all(isinstance(way, Whole) for way in self.ways.values()):
            groups = [(group["params"], group["weight_decay"]) for group in self.param_groups]
            self.library.step(groups, self.param_groups[0]["lr"])
        else:
            for p in self.weights:
                if p.grad is not None:
                    self._update(p, p.grad)
        self._end_step()

    def _update(self, p: torch.nn.Parameter, gradient: Tensor) -> None:
        """The random bits are a function of places, so that a run that goes on needs no generator's state."""
        seed = noise_seed(self.seed, self.steps, self.numbers[p])
        update = partial(self.ways[p].update, rate=self.param_groups[0]["lr"], seed=seed)
        if self.offloads:
            assert self.host
            self.host.submit(update, gradient, copy=self.in_backward)
        else:
            update(gradient)

    def _end_step(self) -> None:
        if self.host:
            self.host.wait()
        self.steps += 1

    def tensors(self) -> dict[str, Tensor]:
        """All states for a checkpoint, as "number.key", the same however the weights are stepped."""
        states = enumerate(way.tensors() for way in self.ways.values())
        return {f"{number}.{key}": value for number, state in states for key, value in state.items()}

    def load(self, tensors: dict[str, Tensor], steps: int) -> None:
        """Puts back what `tensors` gave after so many steps."""
        saved: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, tensor in tensors.items():
            place, key = name.split(".", 1)
            saved[int(place)][key] = tensor
        for number, state in saved.items():
            self.ways[self.weights[number]].load(state)
        self.steps = steps

    def close(self) -> None:
        if self.host:
            self.host.close()


class InBackward(WeightOptimizer):
    """Updates each weight in the backward of a step's last microbatch, which `last_microbatch` announces.
    Weights that only earlier microbatches reached are updated by `end_backward`."""

    host: Host

    def __init__(self, groups: list[dict], spec: OptimSpec):
        super().__init__(groups, spec)
        self.updates = False  # whether this backward is the last of its step
        self.sums: dict[torch.nn.Parameter, Tensor] = {}  # gradients so far, on the host, not below fp32
        self.squares: list[Tensor] = []  # the sums of squares of this step's gradients
        self.hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in self.weights]

    def last_microbatch(self) -> None:
        """Say so before the backward of a step's last microbatch."""
        self.host.wait()
        self.updates = True

    @torch.no_grad()
    def _arrived(self, p: torch.nn.Parameter) -> None:
        gradient, p.grad = p.grad, None
        assert gradient is not None
        if self.updates:
            self._finish(p, gradient)
        else:
            self.host.submit(partial(self._add, p), gradient, copy=True)

    def _add(self, p: torch.nn.Parameter, gradient: Tensor) -> None:
        gradient = gradient.to(_sum_dtype(gradient))
        self.sums[p] = self.sums[p].add_(gradient) if p in self.sums else gradient

    def _finish(self, p: torch.nn.Parameter, gradient: Tensor | None) -> None:
        """Updates with the last microbatch's gradient and what the earlier ones left."""
        earlier = self.sums.pop(p, None)
        if earlier is not None:
            earlier = earlier.to(p.device, non_blocking=True)
            gradient = earlier if gradient is None else earlier.add_(gradient)
        assert gradient is not None
        self.squares.append(torch.linalg.vector_norm(gradient, dtype=_sum_dtype(gradient)) ** 2)
        self._update(p, gradient)

    @torch.no_grad()
    def end_backward(self) -> Tensor:
        """After a step's last backward: the norm of the whole gradient, once every weight is updated."""
        self.host.wait()
        for p in list(self.sums):
            self._finish(p, None)
        none = torch.zeros((), device=self.weights[0].device)
        norm = torch.stack(self.squares).sum().sqrt() if self.squares else none
        self.updates, self.squares = False, []
        return norm

    def step(self) -> None:  # type: ignore[override]  # without a closure
        """Ends a step, all of whose updates are under way."""
        self.end_backward()
        self._end_step()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
        super().close()


def _sum_dtype(gradient: Tensor) -> torch.dtype:
    """What gradients are added up in."""
    return torch.promote_types(gradient.dtype, torch.float32)
