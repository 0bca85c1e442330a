"""The reference cache: computed once, found by content, the same bits however a fill was interrupted."""

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastdpo.data.packing import in_row_order, pack
from fastdpo.errors import TrainingError
from fastdpo.reference import cache as ref_cache
from fastdpo.reference.cache_file import cache_path
from tests import tiny
from tests.reference.reference_runs import CAP, Counted, make_groups, packs_of
from tests.reference.test_fingerprint import learn, with_lora
from tests.rounding import model_ulps


@pytest.fixture(scope="module")
def counted():
    torch.manual_seed(0)
    return Counted()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep/reference.sqlite"


@pytest.fixture(scope="module")
def truth(counted, tmp_path_factory):
    """(groups, a cache file filled with them, their values)."""
    path, groups = tmp_path_factory.mktemp("truth") / "reference.sqlite", make_groups(40)
    table, _ = counted.load(path, groups)
    return groups, path, table.of(groups)


def test_in_row_order_is_next_fit():
    groups = make_groups(60)
    parts = in_row_order(groups, CAP)
    assert [g for part in parts for g in part] == groups and len(parts) > 10
    for part, after in pairwise(parts):
        tokens = sum(g.input_tokens for g in part)
        assert tokens <= CAP < tokens + after[0].input_tokens
    fewer = list(in_row_order(groups[:37], CAP))
    assert fewer[:-1] == list(parts)[: len(fewer) - 1]
    assert list(in_row_order(groups, 1)) == [[g] for g in groups]  # all are larger, and go alone
    for part in in_row_order(groups, CAP, share=False):
        width = max(len(g.prompt) + len(r.ids) - 1 for g in part for r in g.responses)
        assert len(part) == 1 or width * sum(len(g.responses) for g in part) <= CAP
    assert list(in_row_order([], CAP)) == []
    both = sum(g.input_tokens for g in groups[:2])
    assert in_row_order(groups, both)[0] == groups[:2] and in_row_order(groups, both - 1)[0] == groups[:1]


@pytest.fixture(scope="module")
def cache_of_a_fixture():
    return cache_path("auto")


def test_nobody_s_own_cache_is_met(cache_of_a_fixture, tmp_path_factory):
    """Neither by a test nor by a fixture that is made once for all of them, and so before their own."""
    for path in (cache_path("auto"), cache_of_a_fixture):
        assert path.is_relative_to(tmp_path_factory.getbasetemp())


@pytest.mark.parametrize("share", [True, False])
def test_values_are_those_of_the_policy_itself(path, share):
    counted, groups, held_out = Counted(share=share), make_groups(20), make_groups(9, first=50)
    table, said = counted.load(path, groups, held_out)
    counted.policy.model.zero_grad()
    for rows in (groups, held_out):
        for part in in_row_order(rows, CAP, share=share):
            with torch.no_grad():
                assert torch.equal(table.of(part), counted.policy.token_logp(pack(part, share)))
    assert f"{sum(len(g.responses) for g in groups + held_out)} computed" in said
    assert str(path) in said


def test_the_second_run_computes_nothing(counted, truth):
    groups, path, values = truth
    table, said = counted.load(path, groups)
    assert counted.batches == [] and "nothing to compute" in said
    assert torch.equal(table.of(groups), values)
    account = table.account
    assert account["hits"] == sum(len(g.responses) for g in groups) and account["misses"] == 0
    assert account["packs"] == account["tokens"] == 0 and account["bytes"] == path.stat().st_size
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no second file is left


def test_order_subset_caps_and_grouping_do_not_matter(counted, truth):
    groups, path, values = truth
    by_row = dict(zip([g.row for g in groups], values.split([g.scored_tokens for g in groups])))
    some = [groups[i] for i in (31, 3, 7, 2)]
    chosen = [g.only_chosen() for g in groups]
    moved = []  # the same sequences with a shorter shared prompt
    for g in some[:3]:
        first, rest = g.prompt[:1], g.prompt[1:]
        longer = lambda r, rest=rest: replace(
            r,
            ids=np.concatenate([rest, r.ids]),
            target_mask=np.concatenate([np.zeros(len(rest), bool), r.target_mask]),
        )
        moved.append(replace(g, prompt=first, responses=tuple(map(longer, g.responses))))
    table, _ = counted.load(path, groups[::-1], some, chosen, moved, max_tokens=10**6)
    assert counted.batches == []
    assert torch.equal(table.of(some), torch.cat([by_row[g.row] for g in some]))
    assert torch.equal(table.of(moved), torch.cat([by_row[g.row] for g in moved]))
    assert len(table.of(chosen)) == sum(g.scored_tokens for g in chosen)


def test_another_lora_rank_and_full_fine_tuning_share_one_reference(truth):
    groups, path, values = truth
    for rank in (2, 5):
        lora = Counted(learn(with_lora(tiny.policy(), rank)))
        table, _ = lora.load(path, groups, fresh_lora=True)
        assert lora.batches == [] and torch.equal(table.of(groups), values)


def test_a_fresh_lora_fills_with_its_adapter_off(path, truth):
    groups, _, values = truth
    lora = Counted(learn(with_lora(tiny.policy())))
    table, _ = lora.load(path, groups, fresh_lora=True)
    assert lora.batches == packs_of(groups) and torch.equal(table.of(groups), values)
    assert lora.policy.model.active_adapters == ["default"]
    batch = pack(groups[:1])
    assert not torch.equal(lora.policy.token_logp(batch), table.of(groups[:1]))  # it is on again


def test_a_learnt_adapter_is_part_of_its_reference(truth):
    groups, path, values = truth
    lora = Counted(learn(with_lora(tiny.policy())))
    table, said = lora.load(path, groups)
    assert lora.batches == packs_of(groups) and " 0 of " in said
    assert (table.of(groups) - values).abs().max() > 0.01
    assert torch.equal(table.of(groups[:3]), lora.policy.token_logp(pack(groups[:3])).detach()) or (
        packs_of(groups)[0] != (0, 1, 2)
    )


def test_changed_weights_and_changed_tokens_are_misses(truth, tmp_path):
    groups, path, _ = truth
    path = shutil.copy(path, tmp_path / "copy.sqlite")
    changed = Counted()
    with torch.no_grad():
        changed.policy.core.model.norm.weight[0] += 1e-3
    changed.load(path, groups)
    assert changed.batches == packs_of(groups)
    same, other_ids = Counted(), make_groups(40, vocab=97)
    same.load(path, other_ids)
    assert same.batches == packs_of(other_ids)


def test_only_packs_with_new_rows_are_computed(counted, path):
    old, new = make_groups(400), make_groups(100, first=400)
    counted.load(path, old)
    assert counted.batches == packs_of(old)
    before = counted.load(path, old)[0].of(old)
    table, _ = counted.load(path, old + new)
    assert counted.batches == [p for p in packs_of(old + new) if max(p) >= 400]
    assert table.account["misses"] == sum(len(g.responses) for g in new)
    assert torch.equal(table.of(old), before)  # what is stored does not change


def test_repeated_rows_are_computed_once(counted, path):
    groups = make_groups(10)
    repeats = groups + [replace(g, row=g.row + 10) for g in groups]
    table, said = counted.load(path, repeats, groups, max_tokens=1)
    once = sum(len(g.responses) for g in groups)
    assert f"{once} responses to compute" in said and f"{once} computed" in said
    assert counted.batches == [(row,) for row in range(10)]
    assert torch.equal(table.of(repeats[10:]), table.of(groups))


def test_without_a_file_all_is_computed_every_time(counted, truth):
    groups, _, values = truth
    for _ in range(2):
        table, said = counted.load(None, groups)
        assert counted.batches == packs_of(groups) and torch.equal(table.of(groups), values)
        assert "not kept" in said and table.account["file"] is None


def test_unknown_rows_are_named(counted, truth):
    groups, path, _ = truth
    table, _ = counted.load(path, groups)
    with pytest.raises(ValueError, match="row 77"):
        table.of([groups[0], *make_groups(1, first=77)])


def test_log_probs_that_are_no_numbers_are_not_stored(path):
    broken, groups = Counted(), make_groups(20)
    token_logp = broken.policy.token_logp

    def nan_in_the_third(batch):
        out = token_logp(batch)
        return out * float("nan") if len(broken.batches) == 3 else out

    broken.policy.token_logp = nan_in_the_third
    third = packs_of(groups)[2]
    with pytest.raises(TrainingError, match=f"rows {third[0]}, .*not numbers"):
        broken.load(path, groups)
    good = Counted()
    good.load(path, groups)
    assert good.batches == packs_of(groups)[2:]  # the two before it are stored


def test_a_resumed_run_computes_nothing_from_other_weights(path):
    policy, groups = Counted(), make_groups(8)
    started = policy.load(path, groups)[0].account["namespace"]
    policy.load(path, groups, expected_namespace=started)
    with torch.no_grad():
        policy.policy.core.model.norm.weight[0] += 1e-3
    for file in (path, None):
        with pytest.raises(TrainingError, match="not the start weights") as caught:
            policy.load(file, groups, expected_namespace=started)
        assert policy.batches == []
        assert ("what differs: weights" in str(caught.value)) == (file is not None)


def test_where_the_cache_is(monkeypatch, tmp_path):
    assert cache_path("off") is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_path("auto") == tmp_path / "fastdpo/reference.sqlite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert str(cache_path("auto")) == "/somewhere/.cache/fastdpo/reference.sqlite"
    assert str(cache_path("~/x.db")) == "/somewhere/x.db"


def test_fills_say_what_computed_them(counted, path):
    counted.load(path, make_groups(4))
    database = sqlite3.connect(path)
    ((environment,),) = database.execute("SELECT environment FROM fills").fetchall()
    assert '"torch"' in environment and '"device": "cpu"' in environment and '"share": true' in environment
    ((parts,),) = database.execute("SELECT parts FROM namespaces").fetchall()
    assert '"weights"' in parts and "/" not in parts  # no paths


# Interruptions


class Enough(Exception):
    pass


def stop_after(n):
    """A check that raises when it is called the n-th time."""
    calls = iter(range(1, 10**6))

    def check():
        if next(calls) == n:
            raise Enough

    return check


def test_a_stopped_fill_keeps_what_it_computed_and_ends_with_the_same_bits(counted, path, truth):
    groups, _, values = truth
    packs = packs_of(groups)
    for done in (1, 2, 4):  # commits are a second apart, so these are held back until the stop
        with pytest.raises(Enough):
            counted.load(path, groups, check=stop_after(done))
        assert len(counted.batches) == done
        computed, packs = packs[:done], packs[done:]
        assert counted.batches == computed
    table, _ = counted.load(path, groups)
    assert counted.batches == packs and torch.equal(table.of(groups), values)


def in_child(work):
    """Runs work() in a forked process and returns its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


def test_a_killed_fill_ends_with_the_same_bits(path, truth, monkeypatch):
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0)
    groups, _, values = truth
    counted, packs = Counted(), packs_of(groups)
    token_logp = counted.policy.token_logp

    def dying(batch):
        if len(counted.batches) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return token_logp(batch)

    counted.policy.token_logp = dying
    for _ in range(2):
        assert in_child(lambda: counted.load(path, groups)) == -signal.SIGKILL
    survivor = Counted()
    table, said = survivor.load(path, groups)
    assert survivor.batches == packs[6:] and torch.equal(table.of(groups), values)
    assert "is damaged" not in said


def test_kills_at_random_moments_leave_a_sound_file(path, truth, monkeypatch):
    """Commits are most of the time here, so most kills are inside one."""
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0)
    groups, _, values = truth
    counted, draw, longest, killed = Counted(), random.Random(0), 1.0, 0

    def dying(seconds):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends a process as SIGKILL does
        signal.setitimer(signal.ITIMER_REAL, seconds)
        counted.load(path, groups)

    while killed < 12:
        if in_child(partial(dying, draw.uniform(0.02, 0.25) * longest)) == -signal.SIGALRM:
            killed += 1
        else:  # it was faster
            longest /= 2
        with contextlib.suppress(Enough):
            Counted(counted.policy).load(path, groups, check=stop_after(1))  # one pack on, or all was there
            path.unlink()
    table, said = counted.load(path, groups)
    assert torch.equal(table.of(groups), values) and "is damaged" not in said
    assert not list(path.parent.glob("*damaged*"))


def test_two_fills_at_once_agree(path, truth, monkeypatch, tmp_path):
    """Two processes with other packs of the same rows, so that the last bits may differ."""
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0)
    groups, _, values = truth
    start = multiprocessing.get_context("fork").Barrier(2)

    def fill(number):
        counted = Counted()
        start.wait()
        rows = groups if number == 0 else groups[::-1]
        table, said = counted.load(path, rows, max_tokens=CAP + 50 * number)
        assert "is damaged" not in said
        torch.save(table.of(groups), tmp_path / f"{number}.pt")

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=fill, args=(number,)) for number in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    later = Counted()
    stored = later.load(path, groups)[0].of(groups)
    assert later.batches == []
    torch.testing.assert_close(stored, values, atol=model_ulps(values), rtol=0)
    for number in range(2):
        assert torch.equal(torch.load(tmp_path / f"{number}.pt"), stored)
    counts = sqlite3.connect(path).execute("SELECT sum(length(keys)) / 16 FROM packs").fetchone()
    assert counts == (sum(len(g.responses) for g in groups),)  # each stored once
