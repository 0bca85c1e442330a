"""fastdpo: preference training at the limit of one GPU.

What a trainer author needs is importable from here; each name is loaded when first asked for, so that
`fastdpo --help` does not wait for torch.
"""

import importlib

import fastdpo.moved  # noqa: F401 (old import paths)
from fastdpo.console.quiet import leave_out_noise

_HOME = {
    "Config": "config.keys",
    "FastDPOError": "errors",
    "Limits": "data.groups",
    "Policy": "model.policy",
    "PreferenceGroup": "records",
    "ResponseLogps": "records",
    "load_groups": "data.groups",
    "pack": "data.packing",
    "prepare": "model.support",
    "split_step": "data.packing",
    "to_group": "data.groups",
    "train": "api",
}
__all__ = list(_HOME)
leave_out_noise()


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastdpo.{_HOME[name]}"), name)
