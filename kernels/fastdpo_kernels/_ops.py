"""Where the operators are registered. A build for the Kernel Hub (kernels/hub.py) has a file of this name and
a namespace of its own, so that several builds may be loaded at once."""


def add_op_namespace_prefix(op_name: str) -> str:
    return f"fastdpo::{op_name}"
