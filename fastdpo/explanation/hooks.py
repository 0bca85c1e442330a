"""Hooks that see, or replace, what enters and leaves modules: counted, and off again together."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastdpo.errors import ModelError

Call = Callable[[Tensor], Tensor | None]  # of [T, width]: what to put in its place, None: nothing else
FINAL = "the final norm"  # which may be computed elsewhere in a forward, too: the last time is the final one


class Hooks:
    """Calls that get a module's first input or first output as rows [T, width], whatever its leading
    dimensions are: [1, T, width], [R, L, width] or [R * L, width]."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}  # how often each was called
        self.shapes: dict[str, torch.Size] = {}  # of what entered the module, as it was
        self._handles: list[RemovableHandle] = []

    def before(self, module: nn.Module, name: str, call: Call) -> None:
        """`call` gets what enters the module."""
        self.calls[name] = 0
        hook = partial(self._entering, name, call)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, name: str, call: Call) -> None:
        """`call` gets what leaves the module; of a tuple its first."""
        self.calls[name] = 0
        self._handles.append(module.register_forward_hook(partial(self._leaving, name, call)))

    def _entering(self, name: str, call: Call, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        self.calls[name] += 1
        x = args[0] if args else kwargs["hidden_states"]
        self.shapes[name] = x.shape
        new = call(x.flatten(0, -2))
        if new is None:
            return None
        new = new.view(x.shape)
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def _leaving(self, name: str, call: Call, module: nn.Module, args: tuple, out: Any) -> Any:
        self.calls[name] += 1
        x = out[0] if isinstance(out, tuple) else out
        new = call(x.flatten(0, -2))
        if new is None:
            return None
        new = new.view(x.shape)
        return (new, *out[1:]) if isinstance(out, tuple) else new

    def check(self) -> None:
        """Raises ModelError where one was called less often than another, or all never."""
        most = max((count for name, count in self.calls.items() if name != FINAL), default=0)
        for name, count in self.calls.items():
            if not count and not most:
                raise ModelError(f"{name} was not computed: no forward was made where it is looked at")
            if count < most:
                raise ModelError(
                    f"{name} was computed {count} times in {most} forwards: this model's code does not go "
                    "through its modules as fastdpo explain needs it"
                )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@contextmanager
def hooks() -> Iterator[Hooks]:
    """Hooks that are off again whatever happens; Hooks.check() is made where nothing was raised."""
    made = Hooks()
    try:
        yield made
        made.check()
    finally:
        made.remove()
