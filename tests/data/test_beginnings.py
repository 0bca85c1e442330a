"""What sequences have in common is computed once, and each token still sees its own sequence and no other."""

import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from rich.console import Console

from fastdpo.data import beginnings as module
from fastdpo.data.beginnings import beginnings, once, own_prompts, own_tokens
from fastdpo.data.packing import in_row_order, pack
from fastdpo.data.store.digests import response_keys
from fastdpo.data.store.facts import Facts
from fastdpo.data.store.shards import Shard, encoded
from fastdpo.data.store.stored import StoredGroups, facts_of, joined
from fastdpo.model.attention import attend
from fastdpo.model.support import stock_logp
from fastdpo.records import PreferenceGroup, Response
from fastdpo.reference.fill import load_reference
from tests import tiny
from tests.data.test_packing import contexts, expected
from tests.model.test_shared_prompt import FAMILIES, assert_gradients_close, double_logp, gradients
from tests.rounding import model_ulps


def made(row, prompt, *responses, unscored=0):
    """A group of these ids; the first `unscored` tokens of each response are no targets."""
    masks = [np.arange(len(ids)) >= unscored for ids in responses]
    some = tuple(Response(np.array(ids), mask) for ids, mask in zip(responses, masks))
    return PreferenceGroup(row, np.array(prompt), some, ())


def some(n, *more):
    """n tokens, and these."""
    return [*(3 + np.arange(n) % 50), *more]


def odd_groups():
    """Prompts that are beginnings of others and of other rows' sequences, equal ones, responses of one token,
    responses that part late, are others' beginnings, or are equal; and rows that have nothing in common."""
    return [
        made(0, some(30, 60, 61), [70, 71, 72], [80, 81]),
        made(1, some(30, 60, 61), [70, 71, 72], [90]),  # the same prompt, one of its responses
        made(2, some(30), [60], [61, 60, 62]),  # ends in the middle of the others
        made(3, some(30, 60, 61, 70, 71, 72, 63), [64, 65], [66]),  # the turn behind row 0's first response
        made(4, some(20, 100), [101, 102, 103], [104]),
        made(5, [99], [7], [8, 9, 10, 11, 12, 13], unscored=0),
        made(6, [99, 7], some(25, 1), some(25, 2), some(10), unscored=1),  # part late; one is their beginning
        made(7, some(30, 60, 61), [80, 81, 82, 83]),
        made(8, [45], some(40)),
    ]


def random_groups(seed, n=14):
    """Of three tokens, so that much is in common by chance."""
    draw = np.random.default_rng(seed)
    ids = lambda most: draw.integers(3, 6, draw.integers(1, most)).tolist()
    return [made(row, ids(9), *(ids(7) for _ in range(draw.integers(1, 4)))) for row in range(n)]


@pytest.fixture
def share_all(monkeypatch):
    monkeypatch.setattr(module, "LEAST", 0)


def sequences(groups):
    return [tuple([*g.prompt, *g.inputs(r)]) for g in groups for r in g.responses]


def different_beginnings(groups):
    return len({ids[:n] for ids in sequences(groups) for n in range(1, len(ids) + 1)})


def check(groups):
    batch = pack(groups, True, beginnings(groups))
    assert list(zip(contexts(batch), batch.target.tolist())) == list(expected(groups))
    ids, layout = batch.input_ids[0], batch.layout
    seen = list(contexts_of_all(batch))
    covered = []
    for q0, q1, k0, k1 in layout.segments:
        keys = ids[layout.kv_index[k0:k1]].tolist()
        for i, q in enumerate(range(q0, q1)):
            depth = i + (k1 - k0) - (q1 - q0)
            assert keys[: depth + 1] == seen[q]
            assert batch.position_ids[0, q] == depth
            covered.append(q)
    assert covered == list(range(batch.input_tokens))
    plain = pack(groups)
    for name in ("target", "cu_resp", "pairs", "score", "chosen"):
        torch.testing.assert_close(getattr(batch, name), getattr(plain, name), equal_nan=True, rtol=0, atol=0)
    assert batch.rows == plain.rows and batch.group_scored == plain.group_scored
    return batch.input_tokens, plain.input_tokens


def contexts_of_all(batch):
    ids, until = batch.input_ids[0].numpy(), batch.layout.seen_until.numpy()
    places = np.arange(len(ids))
    return (ids[(places <= q) & (q < until)].tolist() for q in places)


def test_each_token_sees_its_own_sequence():
    tokens, plain = check(odd_groups())
    assert tokens < plain / 2


@pytest.mark.parametrize("seed", range(40))
def test_nothing_is_computed_twice(share_all, seed):
    groups = random_groups(seed)
    tokens, plain = check(groups)
    assert tokens == different_beginnings(groups) < plain


@pytest.mark.parametrize("seed", range(40))
def test_short_beginnings_stay_apart(seed, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 3)
    groups = random_groups(seed)
    tokens, plain = check(groups)
    assert different_beginnings(groups) <= tokens <= plain


def test_rows_with_nothing_in_common_are_packed_as_for_training():
    """And a row alone, where its responses part early: the same bits come of it."""
    for groups in (tiny.groups(), [made(0, some(20), some(15, 1), some(15, 2))]):
        assert beginnings(groups) == own_prompts(groups)
    assert beginnings([made(0, [5], some(16, 1), some(16, 2))])[1] == (0, 17)


def test_a_short_prompt_of_two_rows_is_computed_once():
    assert beginnings([made(0, [5, 6], [7]), made(1, [5, 6], [8, 9]), made(2, [5], [4])]) == [
        (None, 0), (0, 2), (0, 1)
    ]  # fmt: skip


def test_a_beginning_is_found_behind_one_that_is_too_short():
    """All rows begin with the template's few tokens; later ones share more."""
    head, a, b = [10, 11, 12], some(30), [x + 51 for x in some(30)]
    groups = [made(i, [*head, *(a, b)[i % 2], 120 + i], [7, 8], [9]) for i in range(6)]
    assert [branch for branch in beginnings(groups)[::2]] == [
        (None, 0), (None, 0), (0, 33), (2, 33), (0, 33), (2, 33)
    ]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_separate_rows(family):
    """Windows are shorter than what is shared."""
    policy, groups = tiny.policy(family, **FAMILIES[family]), odd_groups()
    with torch.no_grad():
        apart = torch.cat([stock_logp(policy, group) for group in groups])
        policy.set_sharing(True)
        batch = pack(groups, True, beginnings(groups))
        together = policy.token_logp(batch)
    assert batch.input_tokens < pack(groups).input_tokens / 2
    torch.testing.assert_close(together, apart, rtol=0, atol=model_ulps(apart))


@pytest.mark.parametrize("least", [0, 4, 16])
def test_gpt2_in_fp64_is_exact(least, monkeypatch):
    monkeypatch.setattr(module, "LEAST", least)
    policy, groups = tiny.policy("gpt2", torch.float64), odd_groups()
    upstream = torch.randn(sum(g.scored_tokens for g in groups), dtype=torch.float64)
    apart = torch.cat([double_logp(policy, group) for group in groups])
    (apart * upstream).sum().backward()
    truth = gradients(policy.model)
    policy.set_sharing(True)
    together = policy.token_logp(pack(groups, True, beginnings(groups)))
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    (together * upstream).sum().backward()
    assert_gradients_close(gradients(policy.model), truth, 1e-11)


@pytest.mark.parametrize("window", [None, 3, 11])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_backends_agree(window, softcap):
    groups = odd_groups()
    layout = pack(groups, True, beginnings(groups)).layout
    q, k, v = (torch.randn(len(layout.seen_until), heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    call = partial(attend, q, k, v, layout, window=window, softcap=softcap)
    torch.testing.assert_close(call(backend="dense"), call(backend="segments"), rtol=0, atol=1e-12)


# Which of the training rows are computed, and in which packs


def stored(groups):
    return StoredGroups([Shard(encoded(some, {})) for some in (groups[:4], groups[4:])], [0, 0])


def repeated_groups():
    """Rows 2 and 6 have row 0's prompt; 4 is row 1 again; all of 5 is in 0 and 2, 7 is new."""
    a, b = some(20, 1), some(12, 2)
    rows = [(a, [1, 2], [3]), (b, [4, 5], [6, 7]), (a, [1, 2], [8, 9, 10]), ([99], [5])]
    rows += [(b, [4, 5], [6, 7]), (a, [8, 9, 10], [3]), (a, [11]), ([98], [5, 5])]
    return [made(row, *parts) for row, parts in enumerate(rows)]


@pytest.mark.parametrize("lazy", [False, True])
def test_what_repeats_is_left_out(lazy):
    groups = repeated_groups()
    kept, tokens = once(stored(groups) if lazy else groups)
    assert [g.row for g in kept] == [0, 2, 6, 1, 3, 7]  # behind the first row of their prompt
    keys = [key for g in kept for key in response_keys(g)]
    assert sorted(keys) == sorted({key for g in groups for key in response_keys(g)})
    assert [len(g.responses) for g in kept] == [2, 1, 1, 2, 1, 1] and not any(g.pairs for g in kept)
    by_row = [g.input_tokens for g in groups]
    # row 5 is left out behind row 2, 4 behind 1
    expected = [by_row[0], by_row[2] + by_row[5], by_row[6], by_row[1] + by_row[4], by_row[3], by_row[7]]
    assert tokens.tolist() == expected
    facts, again = facts_of(kept), Facts.of(list(kept))
    for name in ("row", "prompt", "cu_resp", "cu_pairs", "length", "scored", "first", "key", "input_tokens"):
        assert np.array_equal(getattr(facts, name), getattr(again, name)), name
    assert [g.row for g in kept[1:4]] == [2, 6, 1] and kept[1:4][0].responses[0].ids.tolist() == [8, 9, 10]
    assert len(once(stored(groups)[:0] if lazy else [])[0]) == 0


def test_rows_without_repeats_stay_as_they_are():
    groups = tiny.groups()
    kept, tokens = once(groups)
    assert [g.row for g in kept] == [g.row for g in groups]
    assert tokens.tolist() == [g.input_tokens for g in groups]


def test_joined_groups_are_read_from_where_they_are():
    groups = repeated_groups()
    both, plain = joined(stored(groups), stored(groups[::-1])), joined(groups, groups[::-1])
    assert [g.row for g in both] == [g.row for g in plain]
    assert np.array_equal(facts_of(both).key, facts_of(plain).key)
    assert [g.row for g in both[6:10]] == [6, 7, 7, 6]
    kept, _ = once(both)
    assert [g.row for g in kept] == [g.row for g in once(plain)[0]] == [0, 2, 6, 1, 3, 7]


def fill(policy, *sets, max_tokens=120):
    console = Console(record=True, file=open(os.devnull, "w"), width=1000)
    options = dict(path=None, fresh_lora=False, max_tokens=max_tokens, console=console)
    return load_reference(policy, list(sets), **options), console.export_text()


def test_a_reference_has_the_values_of_every_row():
    policy = tiny.policy()
    policy.set_sharing(True)
    groups = [*odd_groups(), *(replace(g, row=g.row + 20) for g in repeated_groups())]
    held_out = [odd_groups()[0], *tiny.groups(), made(9, some(9), [4], [5]), made(10, some(9), [6])]
    held_out = [replace(g, row=row) for row, g in enumerate(held_out, 40)]
    batches, token_logp = [], policy.token_logp
    policy.token_logp = lambda batch: batches.append(batch) or token_logp(batch)
    table, said = fill(policy, groups, held_out)
    policy.set_sharing(False)
    with torch.no_grad():
        for rows in (groups, held_out):
            apart = token_logp(pack(rows, share=False))
            torch.testing.assert_close(table.of(rows), apart, rtol=0, atol=model_ulps(apart))
    account = table.account
    training = [batch for batch in batches if max(batch.rows) < 40]
    cuts = in_row_order(once(groups)[0], 120)
    assert [batch.rows for batch in training] == [tuple(g.row for g in part) for part in cuts]
    of_training = sum(batch.input_tokens for batch in training)
    assert of_training == sum(sum(map(len, own_tokens(part, beginnings(part)))) for part in cuts)
    apart = sum(group.input_tokens for group in groups)
    assert account["repeated_tokens"] == apart - of_training > 0
    assert f"({apart - of_training:,} more repeat these and are not computed)" in said
    # held-out rows are what an evaluation packs
    assert [b.input_tokens for b in batches[len(training) :]] == [
        pack(part).input_tokens for part in in_row_order(held_out, 120)
    ]


@pytest.mark.parametrize("how", ["separate rows", "whole groups"])
def test_others_are_packed_as_they_are(how):
    policy, groups = tiny.policy(), odd_groups()
    policy.set_sharing(how == "whole groups")
    if how == "whole groups":
        groups = [replace(group, whole=True) for group in groups]
    batches, token_logp = [], policy.token_logp
    policy.token_logp = lambda batch: batches.append(batch) or token_logp(batch)
    table, said = fill(policy, groups)
    parts = in_row_order(groups, 120, policy.share)
    assert [b.input_tokens for b in batches] == [pack(part, policy.share).input_tokens for part in parts]
    assert table.account["repeated_tokens"] == 0 and "repeat" not in said


def test_a_pack_with_much_in_common_gathers_no_more_keys_than_without():
    """Many short answers to one long prompt: the cap counts the prompt with each."""
    groups = [made(row, some(100), [60 + row % 60, row % 7, row % 5]) for row in range(40)]
    for part in in_row_order(once(groups)[0], 500):
        assert len(pack(part, True, beginnings(part)).layout.kv_index) <= 500
