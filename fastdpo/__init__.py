"""fastdpo: preference training at the limit of one GPU.

What a trainer author needs is importable from here; each name is loaded when first asked for, so that
`fastdpo --help` does not wait for torch.
"""

import importlib

_HOME = {
    "Config": "config",
    "FastDPOError": "errors",
    "Limits": "groups",
    "Policy": "model",
    "PreferenceGroup": "records",
    "ResponseLogps": "records",
    "load_groups": "groups",
    "pack": "packing",
    "prepare": "support",
    "split_step": "packing",
    "to_group": "groups",
    "train": "trainer",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastdpo.{_HOME[name]}"), name)
