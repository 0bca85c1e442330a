"""The packed layout says exactly which tokens each scored token was predicted from."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch

from fastdpo.data.packing import (
    Size,
    epoch_order,
    epoch_steps,
    pack,
    places,
    places_of,
    sizes_of,
    split_step,
)
from fastdpo.data.store.stored import facts_of
from fastdpo.records import Pair
from tests.tiny import group, groups


def contexts(batch):
    """For each scored token, the ids that its row sees, by the dense definition of the layout."""
    ids, seen = batch.input_ids[0].numpy(), batch.layout.seen_until.numpy()
    keys = np.arange(len(ids))
    for q in batch.score_row.tolist():
        yield ids[(keys <= q) & (q < seen)].tolist()


def expected(groups):
    """(context, target) of each scored token, straight from the records."""
    for g in groups:
        for r in g.responses:
            for j in np.flatnonzero(r.target_mask):
                yield [*g.prompt, *r.ids[:j]], r.ids[j]


def test_each_scored_token_sees_its_own_prefix_and_nothing_else():
    batch = pack(groups())
    got = list(zip(contexts(batch), batch.target.tolist()))
    assert got == list(expected(groups()))


def test_segments_gather_the_same_context():
    """The key segments hold [prompt + own response] in order, and each query ends at itself."""
    batch = pack(groups())
    ids, layout = batch.input_ids[0], batch.layout
    by_row = dict(zip(batch.score_row.tolist(), contexts(batch)))
    seen_rows = 0
    for q0, q1, k0, k1 in layout.segments:
        keys = ids[layout.kv_index[k0:k1]].tolist()
        for i, q in enumerate(range(q0, q1)):
            if q in by_row:
                visible = keys[: i + (k1 - k0) - (q1 - q0) + 1]
                assert visible == by_row[q]
                seen_rows += 1
    assert seen_rows == len(by_row)
    assert layout.max_q == max(q1 - q0 for q0, q1, _, _ in layout.segments)
    assert layout.cu_k.tolist()[-1] == len(layout.kv_index)


def test_equal_ends_of_queries_and_keys_are_two_tensors():
    """Torch 2.15 would take one tensor for leave to use cuDNN, whose backward nothing here has seen."""
    layout = pack([group(0, 6, [7])]).layout.to("cpu")
    assert layout.cu_q.equal(layout.cu_k) and layout.cu_q is not layout.cu_k


def test_copies_are_the_inverse_of_the_gather():
    layout = pack(groups()).layout
    places = [[p] for p in layout.first_copy.tolist()]
    for rows, more in zip(layout.more_rows, layout.more_places):
        assert len(rows.unique()) == len(rows)  # index_add_ over them is deterministic
        for row, place in zip(rows.tolist(), more.tolist()):
            places[row].append(place)
    for row, copies in enumerate(places):
        assert copies == (layout.kv_index == row).nonzero()[:, 0].tolist()


def test_positions_restart_after_the_prompt():
    batch = pack([group(0, 4, [3, 5])])
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert batch.input_tokens == 10 and batch.unshared_tokens == 7 + 9


def test_separate_rows_score_the_same_tokens():
    shared, separate = pack(groups()), pack(groups(), share=False)
    width = separate.input_ids.shape[1]
    for (context, _), row in zip(expected(groups()), separate.score_row.tolist()):
        r, place = divmod(row, width)
        assert separate.input_ids[r, : place + 1].tolist() == context
        assert separate.attention_mask[r, : place + 1].all()
    for name in ("target", "cu_resp", "pairs", "offset", "weight", "chosen"):
        assert torch.equal(getattr(shared, name), getattr(separate, name))
    assert int(separate.attention_mask.sum()) == separate.input_tokens


def test_pairs_and_bounds_follow_the_groups():
    packed = pack([group(0, 3, [2, 2]), group(1, 3, [1, 5, 2], pairs=[Pair(2, 0, 0.5, 2.0)])])
    assert packed.pairs.tolist() == [[0, 1], [4, 2]]
    assert packed.offset.tolist() == [0, 0.5] and packed.weight.tolist() == [1, 2]
    assert packed.chosen.tolist() == [0, 3, 4]
    assert packed.group_resp == (0, 2, 5)
    assert packed.group_scored == (0, 4, 10)
    assert packed.cu_resp.tolist() == [0, 2, 4, 5, 8, 10]


@pytest.mark.parametrize("max_tokens", [1, 30, 64, 10_000])
@pytest.mark.parametrize("max_scored", [None, 5, 12])
def test_split_keeps_every_group_once_and_the_caps(max_tokens, max_scored):
    step = [group(i, 1 + i % 7, [1 + i % 5, 1 + i % 11]) for i in range(23)]
    parts = split_step(step, max_tokens, max_scored)
    assert sorted(g.row for part in parts for g in part) == list(range(23))
    for part in parts:
        assert len(part) == 1 or (
            sum(g.input_tokens for g in part) <= max_tokens
            and (max_scored is None or sum(g.scored_tokens for g in part) <= max_scored)
        )
    again = split_step(step[::-1], max_tokens, max_scored)
    assert [[g.row for g in p] for p in again] == [[g.row for g in p] for p in parts]


@pytest.mark.parametrize("max_tokens", [40, 100, 1000])
def test_the_cap_counts_padding_of_separate_rows(max_tokens):
    """One long group among short ones: every row of its microbatch is as wide as the longest."""
    step = [group(i, 2 + i % 5, [1 + i % 4, 2]) for i in range(40)] + [group(40, 30, [20, 4])]
    parts = split_step(step, max_tokens, share=False)
    assert sorted(g.row for part in parts for g in part) == list(range(41))
    for part in parts:
        assert len(part) == 1 or pack(part, share=False).input_ids.numel() <= max_tokens
    assert places(group(0, 4, [3, 5]), share=False) == 2 * 8
    assert places(group(0, 4, [3, 5]), share=True) == 4 + 2 + 4


@pytest.mark.parametrize("share", [True, False])
def test_sizes_say_what_groups_take(share):
    """Of facts as of the groups, and so that steps are cut alike."""
    step = [group(i, 1 + i % 7, [1 + (i * j) % 11 for j in range(1 + i % 4)]) for i in range(30)]
    step += [replace(one, row=one.row + 30, whole=True) for one in step]
    sizes = sizes_of(facts_of(step))
    assert [Size(*row) for row in sizes.tolist()] == [Size.of(one) for one in step]
    assert places_of(sizes, share).tolist() == [places(one, share) for one in step]
    for one in step:
        packed = pack([one], share)
        assert places(one, share) == packed.input_ids.numel() and Size.of(one).scored == len(packed.target)


def test_steps_are_the_epochs_in_pieces():
    steps = list(islice(epoch_steps(8, 3, seed=0), 7))
    assert [step.tolist() for step in steps[:3]] == [GOLDEN[:3], GOLDEN[3:6], GOLDEN[6:]]
    assert sorted(np.concatenate(steps[3:6])) == list(range(8)) and len(steps[6]) == 3


def test_order_is_a_function_of_seed_and_epoch():
    """The golden values pin the order: a change would silently reorder everybody's resumed runs."""
    orders = {tuple(epoch_order(8, s, e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert epoch_order(8, seed=0, epoch=0).tolist() == GOLDEN


GOLDEN = [2, 4, 3, 6, 5, 0, 1, 7]
