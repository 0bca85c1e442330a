"""The benchmarks' tests write and read results of today: their day does not end at midnight."""

import pytest

from benchmarks import results


@pytest.fixture(autouse=True)
def one_day(monkeypatch):
    monkeypatch.setenv("BENCH_DATE", results.today())
