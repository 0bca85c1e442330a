"""The reference of rows on disk: the same packs and bits as of lists, each row read when it is computed,
however a fill ends."""

import multiprocessing
import os
import signal

import pytest
import torch
from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.data.packing import in_row_order
from fastdpo.data.store.shards import Shard, encoded
from fastdpo.data.store.stored import StoredGroups
from fastdpo.reference import cache as ref_cache
from fastdpo.reference import values as ref_values
from fastdpo.reference.cache_contents import prune
from fastdpo.training.job import stage_job
from fastdpo.training.stage import Stage
from tests.reference.reference_runs import CAP, Counted, make_groups, packs_of
from tests.reference.test_ref_cache import Enough, in_child, stop_after
from tests.rounding import model_ulps

N = 40


def stored(groups, rows=7):
    """The same groups, in shards of so many rows."""
    parts = [groups[start : start + rows] for start in range(0, len(groups), rows)]
    return StoredGroups([Shard(encoded(part, {})) for part in parts], [0] * len(parts))


@pytest.fixture(autouse=True)
def in_a_file(monkeypatch):
    monkeypatch.setattr(ref_values, "IN_MEMORY", 64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep/reference.sqlite"


@pytest.fixture(scope="module")
def truth():
    """(the groups as a list, their values)"""
    torch.manual_seed(0)
    groups = make_groups(N)
    return groups, Counted().load(None, groups)[0].of(groups)


@pytest.fixture
def reads(monkeypatch):
    """The place of each group that is read from a shard."""
    read, group = [], Shard.group
    seen = lambda shard, place, *more: read.append(place) or group(shard, place, *more)
    monkeypatch.setattr(Shard, "group", seen)
    return read


def test_they_are_packed_and_computed_as_lists(path, truth):
    groups, values = truth
    counted, held_out = Counted(), make_groups(9, first=N)
    table, _ = counted.load(path, stored(groups), stored(held_out))
    assert counted.batches == packs_of(groups) + packs_of(held_out)
    assert torch.equal(table.of(groups), values) and torch.equal(table.of(stored(groups)), values)
    sums = [float(part.double().sum()) for g in groups for part in table.of([g]).split(lengths(g))]
    assert table.sums(stored(groups).facts).tolist() == pytest.approx(sums, rel=1e-12)


def lengths(group):
    return [int(response.target_mask.sum()) for response in group.responses]


@pytest.mark.parametrize("share", [True, False])
def test_rows_are_cut_as_lists_and_read_when_a_pack_is_asked_for(truth, reads, share):
    groups, _ = truth
    parts = in_row_order(stored(groups), CAP, share)
    assert len(parts) > 5 and not reads
    rows = [[g.row for g in part] for part in parts]
    assert rows == [[g.row for g in part] for part in in_row_order(groups, CAP, share)]
    assert len(reads) == N and [g.row for g in parts[-1]] == rows[-1]
    assert len(reads) == N + len(rows[-1])


def test_each_row_is_read_once_and_only_to_be_computed(path, truth, reads):
    groups, _ = truth
    half = packs_of(groups)[:3]
    with pytest.raises(Enough):
        Counted().load(path, stored(groups), check=stop_after(3))
    assert len(reads) == sum(map(len, half))
    reads.clear()
    Counted().load(path, stored(groups))
    assert len(reads) == N - sum(map(len, half))
    reads.clear()
    Counted().load(path, stored(groups))
    assert not reads


def test_a_killed_fill_ends_with_the_same_bits(path, truth, monkeypatch):
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0)
    groups, values = truth
    counted = Counted()
    token_logp = counted.policy.token_logp

    def dying(batch):
        if len(counted.batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return token_logp(batch)

    counted.policy.token_logp = dying
    for _ in range(2):
        assert in_child(lambda: counted.load(path, stored(groups))) == -signal.SIGKILL
    assert [file.name for file in path.parent.iterdir() if "journal" not in file.name] == [path.name]
    survivor = Counted()
    table, _ = survivor.load(path, stored(groups))
    assert survivor.batches == packs_of(groups)[6:] and torch.equal(table.of(stored(groups)), values)


def test_two_fills_at_once_agree(path, truth, monkeypatch, tmp_path):
    """With other packs of the same rows, so that the last bits may differ: the first to store decides."""
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0)
    groups, values = truth
    context = multiprocessing.get_context("fork")
    start = context.Barrier(2)

    def fill(number):
        start.wait()
        rows = stored(groups[::-1] if number else groups)
        table, _ = Counted().load(path, rows, max_tokens=CAP + 50 * number)
        torch.save(table.of(groups), tmp_path / f"{number}.pt")

    children = [context.Process(target=fill, args=(number,)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    later = Counted()
    found = later.load(path, stored(groups))[0].of(groups)
    assert later.batches == []
    torch.testing.assert_close(found, values, atol=model_ulps(values), rtol=0)
    for number in range(2):
        assert torch.equal(torch.load(tmp_path / f"{number}.pt"), found)


def test_another_process_s_value_takes_the_place_of_one_that_is_not_stored(path, truth):
    """This run computes a pack; before it commits, another one stores other values of the same rows."""
    groups, values = truth
    first, others = packs_of(groups)[0], []

    def meanwhile():
        if not others:
            other = Counted()
            token_logp = other.policy.token_logp
            other.policy.token_logp = lambda batch: token_logp(batch) + 0.5
            others.append(other.load(path, stored(groups[: len(first)]))[0].of(groups[: len(first)]))

    table, _ = Counted().load(path, stored(groups), check=meanwhile)
    n = len(others[0])
    assert torch.equal(others[0], values[:n] + 0.5)
    assert torch.equal(table.of(stored(groups)), torch.cat([others[0], values[n:]]))


def test_a_prune_while_a_fill_runs_takes_nothing_from_it(path, truth, monkeypatch):
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0)
    groups, values = truth
    counted = Counted()

    def prune_at_the_third():
        if len(counted.batches) == 3:
            prune(path, None, [namespace], False, Console(quiet=True))

    namespace = Counted().load(None, stored(groups[:1]))[0].account["namespace"]
    table, _ = counted.load(path, stored(groups), check=prune_at_the_third)
    assert torch.equal(table.of(stored(groups)), values)
    again = Counted()
    again.load(path, stored(groups))
    assert again.batches == packs_of(groups)[:3]


def test_held_out_rows_are_read_when_they_are_evaluated_and_packed_as_the_fill_packs_them(truth, reads):
    groups, values = truth
    counted = Counted()
    config = Config(model="-", data="-", output_dir="-", max_tokens=CAP, head_memory=None)
    stage = Stage(stage_job(config), counted.policy, [], stored(groups))
    stage.reference, _ = counted.load(None, [], stage.eval_groups)
    counted.batches.clear()
    reads.clear()
    batches = stage.in_row_order(stage.eval_groups)
    assert len(batches) == len(packs_of(groups)) and not reads
    for _ in range(2):  # every evaluation
        with torch.no_grad():
            scored = [stage.score(batch) for batch in batches]
        assert torch.equal(torch.cat([logps.ref_token_logp for logps in scored]), values)
        assert torch.equal(torch.cat([logps.token_logp for logps in scored]), values)
    assert counted.batches == packs_of(groups) * 2 and len(reads) == 2 * N
