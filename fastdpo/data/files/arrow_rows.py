"""Rows out of Arrow (parquet, the hub, save_to_disk), as they were before they were put into its types."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

_BATCH = 256  # rows that are taken out of Arrow at once


class ArrowRows:
    """The rows of a datasets.Dataset, without what Arrow or datasets put there. What is pickled of it is
    where its files are."""

    def __init__(self, data):
        from datasets import Features

        # images are decoded where their pixels are asked for, and by us
        data.info.features = Features(_undecoded(data.features))
        self.data, self.features = data, data.features
        self._first, self._size = 0, len(data)

    def __len__(self) -> int:
        return self._size

    def taken(self, start: int, stop: int) -> "ArrowRows":
        some = object.__new__(ArrowRows)
        some.data, some.features = self.data, self.features
        some._first, some._size = self._first + start, stop - start
        return some

    def range(self, start: int, stop: int) -> Iterator[dict]:
        start, stop = self._first + start, self._first + stop
        for first in range(start, stop, _BATCH):
            some = range(first, min(first + _BATCH, stop))
            try:
                columns = self.data[some.start : some.stop]
                rows = (dict(zip(columns, values)) for values in zip(*columns.values()))
            except Exception:
                rows = (self.data[number] for number in some)  # which raises for one of them
            yield from map(self._as_written, rows)

    def line(self, number: int) -> str:
        return ""

    @property
    def files(self) -> list[Path]:
        """What it lies in; none where it is in memory."""
        return [Path(file["filename"]) for file in self.data.cache_files]

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
