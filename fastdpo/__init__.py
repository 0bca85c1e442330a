"""fastdpo: preference training at the limit of one GPU.

What a trainer author needs is importable from here; each name is loaded when first asked for, so that
`fastdpo --help` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING

import fastdpo.moved  # noqa: F401 (old import paths)
from fastdpo.console.quiet import leave_out_noise

__version__ = "0.1.0"

_HOME = {
    "Config": "config.keys",
    "FastDPOError": "errors",
    "Limits": "data.groups",
    "Policy": "model.policy",
    "PreferenceGroup": "records",
    "ResponseLogps": "records",
    "evaluate": "api",
    "explain": "api",
    "fill_reference": "api",
    "load_groups": "data.load",
    "pack": "data.packing",
    "prepare": "model.support",
    "sample": "api",
    "split_step": "data.packing",
    "to_group": "data.groups",
    "train": "api",
    "train_reward": "api",
}
__all__ = ["Config", "FastDPOError", "Limits", "Policy", "PreferenceGroup", "ResponseLogps", "evaluate"]
__all__ += [
    "explain",
    "fill_reference",
    "load_groups",
    "pack",
    "prepare",
    "sample",
    "split_step",
    "to_group",
    "train",
    "train_reward",
]
leave_out_noise()

if TYPE_CHECKING:  # the same in words that a type checker reads
    from fastdpo.api import evaluate, explain, fill_reference, sample, train, train_reward
    from fastdpo.config.keys import Config
    from fastdpo.data.groups import Limits, to_group
    from fastdpo.data.load import load_groups
    from fastdpo.data.packing import pack, split_step
    from fastdpo.errors import FastDPOError
    from fastdpo.model.policy import Policy
    from fastdpo.model.support import prepare
    from fastdpo.records import PreferenceGroup, ResponseLogps
else:

    def __getattr__(name: str):
        if name not in _HOME:
            raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
        return getattr(importlib.import_module(f"fastdpo.{_HOME[name]}"), name)
