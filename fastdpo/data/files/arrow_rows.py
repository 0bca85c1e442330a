"""Rows out of Arrow (parquet, the hub, save_to_disk), as they were before they were put into its types."""

from collections.abc import Iterator
from dataclasses import replace


class ArrowRows:
    """The rows of a datasets.Dataset, without what Arrow or datasets put there."""

    def __init__(self, data):
        from datasets import Features

        # images are refused by name, so nothing is gained by decoding them, which takes more libraries
        data.info.features = Features(_undecoded(data.features))
        self.data, self.features = data, data.features

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> dict:
        return self._as_written(self.data[number])

    def __iter__(self) -> Iterator[dict]:
        return map(self._as_written, self.data)

    def _as_written(self, row: dict) -> dict:
        return {name: _without_filled(value, self.features[name]) for name, value in row.items()}


def _without_filled(value, feature):
    """Without the nulls with which Arrow fills the keys that one struct lacks and another row's has; written
    ones look the same. Lists are not filled, and a Json value is as it was written."""
    if isinstance(value, dict) and isinstance(feature, dict):
        return {k: _without_filled(v, feature[k]) for k, v in value.items() if v is not None}
    inner = getattr(feature, "feature", None)
    if isinstance(value, list) and inner is not None:
        return [_without_filled(item, inner) for item in value]
    return value


def _undecoded(feature):
    from datasets import Json

    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):
        return replace(feature, feature=_undecoded(feature.feature))
    if hasattr(feature, "decode") and not isinstance(feature, Json):
        return replace(feature, decode=False)
    return feature
