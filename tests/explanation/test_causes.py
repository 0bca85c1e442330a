"""What is patched: which neurons, how many, which at random; how much of an effect comes back; on how many
rows there is room."""

import math
from collections import namedtuple
from itertools import pairwise

import numpy as np
import pytest
import torch

from fastdpo.evaluation.estimates import Estimate
from fastdpo.explanation import causes as module
from fastdpo.explanation.attribute import Table
from fastdpo.explanation.causes import ALL_FOUR, Plan, part_plans, plans, within_room
from fastdpo.explanation.result import Settings
from fastdpo.explanation.shares import share, shares
from fastdpo.training.held_out import standard_error
from tests import tiny

LAYERS, N = 3, 100


def table(cos=None, seed=0):
    draw = np.random.default_rng(seed)
    columns = [draw.normal(size=LAYERS * N) for _ in range(11)]
    columns[0] = columns[0] if cos is None else np.full(LAYERS * N, cos)
    return Table(np.repeat(np.arange(LAYERS), N), np.tile(np.arange(N), LAYERS), *columns)


def members(*sizes):
    """Groups of the first neurons, the next ones, ..."""
    ends = np.cumsum([0, *sizes])
    place = np.arange(LAYERS * N)
    return {f"G{i}": (place >= a) & (place < b) for i, (a, b) in enumerate(pairwise(ends))}


def planned(given, groups, sign=1, **keys):
    return list(plans(given, groups, sign, Settings("model", **keys)))


def neurons_of(patch):
    """Places in the table."""
    assert len(patch.neurons) == LAYERS
    return [layer * N + int(i) for layer, some in enumerate(patch.neurons) for i in some]


def values_of(patch):
    return torch.cat(patch.values).tolist()


def test_sets_and_their_sizes():
    made = {plan.name: plan for plan in planned(table(), members(20, 30, 10, 5))}
    along = (table().cos > 0).sum()
    sizes = {name: plan.size for name, plan in made.items() if plan.what != "random"}
    assert sizes == {
        "100 along the rejected, off": 100,
        f"{along} along the rejected, off": along,  # of 200 and 1000
        **{f"G{i}, {how}": n for i, n in enumerate((20, 30, 10, 5)) for how in ("means", "tokens")},
        **{f"{ALL_FOUR}, {how}": 65 for how in ("means", "tokens")},
        **{f"all neurons, {how}": 300 for how in ("means", "tokens")},
    }
    for name, plan in made.items():
        for patch in plan.patches:
            assert len(neurons_of(patch)) == len(set(neurons_of(patch))) == plan.size, name
    whats = {plan.name.split(", ")[1]: plan.what for plan in made.values() if plan.what != "random"}
    assert whats == {"off": "ablated", "means": "constant", "tokens": "token"}
    assert neurons_of(made["G1, means"].patches[0]) == list(range(20, 50))


def test_values_that_are_set():
    given = table()
    made = {plan.name: plan for plan in planned(given, members(20, 30, 10, 5))}
    for name, plan in made.items():
        for patch in plan.patches:
            if name.endswith("tokens"):
                assert patch.values is None
            elif name.endswith("off"):
                assert not any(values_of(patch))
            else:
                assert values_of(patch) == given.raw_after[neurons_of(patch)].tolist()


@pytest.mark.parametrize("sign", [1, -1])
def test_ablated_are_those_that_write_most_along_what_shall_fall(sign):
    given = table()
    first = planned(given, members(20, 30, 10, 5), sign)[0]
    order = sorted(range(LAYERS * N), key=lambda i: -sign * given.cos[i])
    assert sorted(neurons_of(first.patches[0])) == sorted(order[:100])


def test_controls_stand_behind_their_sets_and_are_as_large():
    made = planned(table(), members(20, 30, 10, 5), random_sets=4)
    assert len({plan.name for plan in made}) == len(made)  # their passes go by it
    along = (table().cos > 0).sum()
    ablated = [f"{k} along the rejected" for k in (100, along)]
    controlled = [*ablated, "G0", ALL_FOUR, "G0", ALL_FOUR]
    assert [plan.group for plan in made if plan.what == "random"] == controlled
    for before, plan in pairwise(made):
        if plan.what == "random":
            assert (plan.group, plan.how, plan.size) == (before.group, before.what, before.size)
            assert plan.name.startswith("random ") and len(plan.patches) == 4
            sets = [frozenset(neurons_of(patch)) for patch in plan.patches]
            assert len(set(sets)) == 4 and all(len(some) == plan.size for some in sets)


def test_controls_are_drawn_by_the_seed():
    drawn = lambda seed: [
        neurons_of(patch)
        for plan in planned(table(), members(20, 30, 10, 5), seed=seed)
        if plan.what == "random"
        for patch in plan.patches
    ]
    assert drawn(0) == drawn(0) != drawn(1)


def test_nothing_is_along_the_direction():
    made = planned(table(cos=-0.3), members(20, 30, 10, 5))
    assert {plan.how for plan in made} == {"constant", "token"}
    assert {plan.group for plan in made if plan.what == "random"} == {"G0", ALL_FOUR}
    turned = planned(table(cos=-0.3), members(20, 30, 10, 5), sign=-1)
    assert [plan.size for plan in turned if plan.what == "ablated"] == [100, 200, 300]


def test_empty_groups_are_left_out():
    made = planned(table(), members(0, 30, 0, 5))
    assert {plan.group for plan in made if plan.how == "token"} == {"G1", "G3", ALL_FOUR, "all neurons"}
    nobody = planned(table(), members(0, 0, 0, 0))
    assert {plan.group for plan in nobody if plan.how == "token"} == {"all neurons"}


def test_parts():
    mlps, attentions, everything = part_plans()
    assert mlps.patches[0].mlp and not mlps.patches[0].attention and not mlps.ends
    assert attentions.patches[0].attention and not attentions.patches[0].mlp and not attentions.ends
    whole = everything.patches[0]
    assert whole.embedding and whole.attention and whole.mlp and everything.ends


# ---- shares


def of(values):
    return Estimate.of(np.asarray(values, np.float64), np.arange(len(values)))


def made_up(prompts=400, seed=0, effect=2.0):
    """before, found, after: of each prompt a number; found brings some of the effect back, with noise."""
    draw = np.random.default_rng(seed)
    before = draw.normal(size=prompts)
    moved = effect + draw.normal(size=prompts)
    found = before + 0.6 * moved + 0.5 * draw.normal(size=prompts)
    return before, found, before + moved


def test_a_share_and_its_error_beside_a_jackknife():
    before, found, after = made_up()
    s, error = share(*map(of, (found, before, after)))
    assert s == pytest.approx((found.mean() - before.mean()) / (after.mean() - before.mean()), rel=1e-12)
    P = len(before)
    without = [np.delete(some, i).mean() for some in (found - before, after - before) for i in range(P)]
    ratios = np.divide(without[:P], without[P:])
    jackknife = math.sqrt((P - 1) / P * ((ratios - ratios.mean()) ** 2).sum())
    assert error == pytest.approx(jackknife, rel=0.01)
    assert abs(s - 0.6) < 4 * error


def test_a_share_of_all_has_no_error():
    before, _, after = made_up()
    assert share(*map(of, (after, before, after))) == (1, 0)
    assert share(*map(of, (before, before, after))) == (0, 0)
    one = share(of([3.0]), of([1.0]), of([5.0]))
    assert one == (0.5, None)


def told(found, planned, names=("margins",)):
    return shares(planned, {name: [{n: of(v) for n in names} for v in some] for name, some in found.items()})


SET = Plan("set, means", "constant", "constant", "set", (None,), 3)
RANDOM = Plan("random like set, means", "random", "constant", "set", (None,) * 3, 3)


def test_rows_of_the_table():
    before, found, after = made_up()
    draws = [before + f * (after - before) for f in (0.1, 0.2, 0.6)]
    made = told({"before": [before], "after": [after], SET.name: [found], RANDOM.name: draws}, [SET, RANDOM])
    apart = after - before
    assert made["effect"]["margins"]["value"] == pytest.approx(apart.mean())
    assert made["effect"]["margins"]["error"] == pytest.approx(standard_error(apart))
    assert made["effect"]["margins"]["told"] and made["columns"] == ["margins"]
    first, mine, drawn, last = made["rows"]
    assert [row["name"] for row in made["rows"]] == [
        "before training",
        "set, means",
        "random like set, means",
        "after training",
    ]
    assert [row["seeds"] for row in made["rows"]] == [None, None, 3, None]
    assert first["margins"]["share"] is None and last["margins"]["share"] is None
    assert last["margins"]["value"] == pytest.approx(after.mean())
    assert (mine["margins"]["share"], mine["margins"]["share_error"]) == share(
        *map(of, (found, before, after))
    )
    assert mine["margins"]["spread"] is None and (mine["size"], mine["group"]) == (3, "set")
    assert drawn["margins"]["share"] == pytest.approx(0.3)
    assert drawn["margins"]["spread"] == pytest.approx(np.std([d.mean() for d in draws], ddof=1))


@pytest.mark.parametrize("effect, is_told", [(2.0, True), (-2.0, True), (0.01, False)])
def test_shares_of_an_effect_within_two_errors_of_0_are_not_told(effect, is_told):
    before, found, after = made_up(effect=effect)
    made = told({"before": [before], "after": [after], SET.name: [found]}, [SET])
    assert made["effect"]["margins"]["told"] == is_told
    assert (made["rows"][1]["margins"]["share"] is not None) == is_told
    assert made["rows"][1]["margins"]["value"] == pytest.approx(found.mean())


def test_rounding_and_one_prompt_are_no_effect():
    before, found, _ = made_up()
    made = told({"before": [before], "after": [before + 1e-12], SET.name: [found]}, [SET])
    assert not made["effect"]["margins"]["told"]
    alone = told({"before": [before[:1]], "after": [before[:1] + 5], SET.name: [found[:1]]}, [SET])
    assert alone["effect"]["margins"] == {"value": pytest.approx(5), "error": None, "told": False}
    assert alone["rows"][1]["margins"]["share"] is None


def test_distances_and_damage_have_no_shares():
    before, found, after = made_up()
    names = ("kl", "perplexity")
    made = told({"before": [before], "after": [after], SET.name: [found]}, [SET], names)
    assert made["effect"]["kl"]["told"] and made["rows"][1]["kl"]["share"] is None
    assert made["rows"][1]["perplexity"]["share"] is None
    assert made["rows"][1]["perplexity"]["value"] == pytest.approx(math.exp(found.mean()))


def test_a_score_is_only_where_answers_are():
    before, found, after = made_up()
    columns = {"before": before, "after": after, SET.name: found}
    made = {name: [{"margins": of(some), "score": of(some)}] for name, some in columns.items()}
    del made[SET.name][0]["score"]
    rows = shares([SET], made)["rows"]
    assert ["score" in row for row in rows] == [True, False, True]


# ---- room


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Of six groups, with so much free on the disk: (the rows that are taken, what is said)."""
    groups = [tiny.group(row, 4, [3, 3] if row else [3, 6]) for row in range(6)]
    usage = namedtuple("usage", "total used free")

    def call(free, count=6, share=True):
        monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(0, 0, free))
        some, note = within_room(groups, count, 100, tmp_path, share)
        return [group.row for group in some], note

    return call


def test_all_prompts_that_were_asked_for_where_there_is_room(room):
    assert room(10**15, 4) == ([0, 1, 3, 4], "")
    assert room(10**15, 99) == ([0, 1, 2, 3, 4, 5], "")


def test_fewer_prompts_where_there_is_less_room(room):
    """Last tokens go through no model: 4 + 2 + 5 shared tokens of row 0, 4 + 2 + 2 of the others; separate
    rows are as wide as row 0's 4 + 5. Records take half of what is free."""
    rows, note = room(2 * 1900)
    assert rows == [0, 1] and "of disk" in note
    assert note.startswith("values are patched on 2 prompts and not 6: ")
    assert room(2 * 1899)[0] == [0]
    assert room(2 * 3600, share=False)[0] == [0, 1] and room(2 * 3599, share=False)[0] == [0]
    assert room(0)[0] == [0]  # one at least


def test_records_have_a_limit_of_their_own(room, monkeypatch):
    monkeypatch.setattr(module, "_MOST_BYTES", 2700)
    assert room(10**15)[0] == [0, 1, 2]
