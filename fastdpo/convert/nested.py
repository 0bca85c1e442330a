"""Configs whose parts have keys of their own, as torchtune's, with dots in their names."""

import re


def flattened(values: dict) -> dict:
    """A config of torchtune with `loss: {beta: 0.1}` as `loss.beta: 0.1`, and ${output_dir} put in; any other
    config as it is."""
    if not any(isinstance(value, dict) and "_component_" in value for value in values.values()):
        return values
    flat: dict = {}
    for key, value in values.items():
        one = key in ("metric_logger", "profiler") or not isinstance(value, dict)
        flat |= {key: value} if one else {f"{key}.{name}": inner for name, inner in value.items()}
    put_in = lambda match: str(flat.get(match[1], match[0]))
    return {k: re.sub(r"\$\{([\w.]+)\}", put_in, v) if isinstance(v, str) else v for k, v in flat.items()}
