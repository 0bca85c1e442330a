"""What becomes of data of every kind: the same token ids, masks, pairs, drops, notes and report, bit for bit,
in whatever way the rows are read. Where a change is meant, golden_rows.py writes the record anew."""

from pathlib import Path

import pytest
import yaml

from fastdpo.data.store import making, work, workers
from tests.data.golden_files import CASES
from tests.data.golden_rows import record
from tests.data.shared_data import SHARED
from tests.data.store.doubles import take_as_others

GOLDEN = yaml.safe_load(Path(__file__).with_name("golden_rows.yaml").read_text(encoding="utf-8"))
LONG = {"many rows", "shared pref/hh_rlhf_train, qwen2.5"}  # more than one shard as they are
BY_WORKERS = (
    "many rows | several sets | folder of splits | folder of files | file json, array | file csv"
    " | file parquet | dataset_info.json | date | odd rows | tokenizer of Python | template kimi_k2"
    " | no row left | data_format text around | strict, several sets"
).split(" | ")


def case_of(name: str, folder: Path):
    """(the case, its files' folder, what `data` is there)"""
    case = CASES[name]
    if case.needs_shared and not SHARED.exists():
        pytest.skip("needs ../shared")
    return case, folder, case.write(folder)


def test_every_case_is_recorded():
    assert list(GOLDEN) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_rows_are_what_they_were(name, tmp_path, tmp_path_factory, monkeypatch):
    """Without a cache, at its first use and at the second, which makes nothing."""
    case = case_of(name, tmp_path)
    assert record(*case) == GOLDEN[name]
    monkeypatch.setattr(making, "SHARD_ROWS", 600 if name in LONG else 3)
    monkeypatch.setattr(making, "_FEW", 99)  # this process makes them
    cache = str(tmp_path_factory.mktemp("tokens"))
    assert record(*case, data_cache=cache) == GOLDEN[name]
    if "error" not in GOLDEN[name]:
        monkeypatch.setattr(work, "shard_of", lambda *_: pytest.fail("it is made again"))
    assert record(*case, data_cache=cache) == GOLDEN[name]


@pytest.mark.parametrize("name", BY_WORKERS)
def test_rows_that_several_processes_make_are_what_they_were(name, tmp_path, tmp_path_factory, monkeypatch):
    case, started = case_of(name, tmp_path), []
    monkeypatch.setattr(making, "SHARD_ROWS", 600 if name in LONG else 1)
    start = workers._process
    monkeypatch.setattr(workers, "_process", lambda: started.append(start()) or started[-1])
    for module in (making, workers):
        monkeypatch.setattr(module, "cores", lambda: 3)
    monkeypatch.setattr(making, "_FEW", 1)
    monkeypatch.setattr(workers.Todo, "take", take_as_others)
    cache = str(tmp_path_factory.mktemp("tokens"))
    assert record(*case, data_cache=cache) == GOLDEN[name]
    assert started
    assert record(*case, data_cache=cache) == GOLDEN[name]
