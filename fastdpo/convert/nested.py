"""Keys within keys, by names with dots: `loss.beta` is beta in loss."""

import re

from fastdpo.values import as_list


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


def within(values: dict, key: str):
    """The value of a key, or of "datasets.path" what `datasets` has there (a list of them where it has
    several); None where there is none."""
    if key in values or "." not in key:
        return values.get(key)
    first, rest = key.split(".", 1)
    found = [within(one, rest) for one in as_list(values.get(first)) if isinstance(one, dict)]
    return found[0] if len(found) == 1 else found or None


def remove(values: dict, key: str) -> None:
    """Takes a key out of a config, or of "datasets.path" what `datasets` has there."""
    first, _, rest = key.partition(".")
    if key in values or not rest:
        values.pop(key, None)
        return
    for one in as_list(values.get(first)):
        if isinstance(one, dict):
            remove(one, rest)


def put(values: dict, key: str, value) -> None:
    """Sets a key, or of "datasets.path" what the one data set has there."""
    first, _, rest = key.partition(".")
    inside = values.get(first)
    if isinstance(inside, list) and len(inside) == 1:
        (inside,) = inside
    if rest and key not in values and isinstance(inside, dict):
        put(inside, rest, value)
    else:
        values[key] = value
