"""Rows that lack what an objective reads are named before training."""

from dataclasses import replace

import numpy as np
import pytest

from fastdpo.data.store.facts import Facts
from fastdpo.errors import DataError
from fastdpo.objectives import check_rows, make
from fastdpo.objectives.catalogue import NAMES
from fastdpo.objectives.checks import _lacking, _problems
from fastdpo.records import Pair
from tests.tiny import group


def unpaired(row, label):
    some = group(row, 3, [4], pairs=())
    return replace(some, responses=(replace(some.responses[0], label=label),))


def with_scores(*scores):
    some = group(7, 3, [4] * len(scores))
    return replace(some, responses=tuple(replace(r, score=s) for r, s in zip(some.responses, scores)))


def with_weights(*present):
    some = group(7, 3, [4] * len(present))
    weights = [np.ones(4, np.float32) if p else None for p in present]
    return replace(some, responses=tuple(replace(r, token_weight=w) for r, w in zip(some.responses, weights)))


def with_offset(offset):
    return replace(group(7, 3, [4, 4]), pairs=(Pair(0, 1, offset),))


PAIRED = group(0, 3, [4, 4])
LOG_DIFFERENCE = dict(scaling="log_difference")


@pytest.mark.parametrize(
    "name, options, rows, message",
    [
        (
            "sigmoid",
            {},
            [PAIRED, unpaired(4, True)],
            "row 4: an unpaired row.*kto, apo_zero_unpaired, bco and sft",
        ),
        ("mpo", {}, [unpaired(4, False)], "row 4: an unpaired row"),
        ("sigmoid", {}, [group(3, 3, [4], pairs=())], "row 3: no pair"),
        ("kto", {}, [group(3, 3, [4], pairs=())], "row 3: neither a label nor a pair"),
        ("kto", {}, [unpaired(0, True), unpaired(1, True)], "no response is undesirable"),
        ("bco", {}, [unpaired(0, False)], "no response is desirable"),
        ("sft", {}, [PAIRED, unpaired(2, False)], "row 2: no chosen response"),
        (
            "odpo",
            {},
            [with_scores(2.0, None)],
            r"row 7: response 1 \(rejected\) has no score; add score_chosen",
        ),
        ("odpo", {}, [with_scores(3.0, 2.0, 4.0)], "row 7: the winner's score 3 is below the loser's 4"),
        ("odpo", LOG_DIFFERENCE, [with_scores(2.0, 0.0)], "row 7: score 0 is not above 0"),
        ("reward_rpo", {}, [with_scores(None, 1.0)], r"response 0 \(chosen\) has no score"),
        ("rloo", {}, [with_scores(1.0, None, 2.0)], "row 7: response 1 has no score, and this learns"),
        (
            "rloo",
            {},
            [with_scores(1.0, 1.0), with_scores(1.0)],
            "row 7: a single response, and this compares",
        ),
        ({"sft": 1, "rloo": 1}, {}, [PAIRED], "row 0: response 0 has no score"),
        (
            "sigmoid",
            dict(gamma=0.5),
            [with_weights(True, False)],
            r"response 1 \(rejected\) has no token weights",
        ),
        ("ipo", {}, [with_offset(0.5)], "row 7: a pair has an offset"),
        ({"sigmoid": 1, "ipo": 1}, {}, [with_offset(0.5)], "row 7: a pair has an offset"),
        ("drdpo", dict(base_loss="odpo"), [PAIRED], "has no score"),
        ("drdpo", dict(gamma=0.5), [PAIRED], "has no token weights"),
    ],
)
def test_rows_that_lack_something(name, options, rows, message):
    where = "" if message.startswith("no response is") else "held-out"  # where one kind is enough
    with pytest.raises(DataError, match=f"{where}.*{message}"):
        check_rows(make(name, **options), rows, where)


@pytest.mark.parametrize(
    "name, options, rows",
    [
        ("sigmoid", {}, [PAIRED, with_offset(0.5)]),
        ("kto", {}, [unpaired(0, True), unpaired(1, False)]),
        ("kto", {}, [PAIRED]),
        ("bco", {}, [PAIRED, unpaired(1, True)]),
        ("sft", {}, [PAIRED, unpaired(1, True)]),
        ("odpo", {}, [with_scores(2.0, 2.0), with_scores(0.0, -1.0)]),
        ("odpo", LOG_DIFFERENCE, [with_scores(2.0, 0.5)]),
        ("reward_rpo", {}, [with_scores(1.0, 2.0)]),
        ("sigmoid", dict(gamma=0.5), [with_weights(True, True)]),
        ("rloo", {}, [replace(with_scores(1.0, 1.0, -2.0), pairs=())]),
        ("kto", {}, []),
    ],
)
def test_rows_that_will_do(name, options, rows):
    check_rows(make(name, **options), rows)


WAYS = [({}, name) for name in NAMES] + [(dict(gamma=0.5), "sigmoid"), (LOG_DIFFERENCE, "odpo")]


@pytest.mark.parametrize("options, name", WAYS, ids=str)
def test_what_columns_say_is_what_is_said_of_each_row(options, name):
    """The first row that lacks something is found by columns of all, and described by itself."""
    draw, some = np.random.default_rng(0), []
    for row in range(200):
        n = int(draw.integers(1, 5))
        pairs = [
            Pair(i, j, float(draw.integers(2))) for i in range(n) for j in range(n) if draw.random() < 0.2 < j
        ]
        made = group(row, 3, [2] * n, pairs=pairs)
        label = lambda is_paired=bool(pairs): None if is_paired else (None, True, False)[draw.integers(3)]
        weight = lambda: np.ones(2, np.float32) if draw.random() < 0.7 else None
        score = lambda: float(draw.integers(-1, 4)) if draw.random() < 0.7 else None
        new = [replace(r, label=label(), token_weight=weight(), score=score()) for r in made.responses]
        some.append(replace(made, responses=tuple(new)))
    objective = make(name, **options)
    problem = lambda g: next(_problems(g, objective.needs), None)
    wrong = [problem(g) is not None or (objective.only_chosen and not g.chosen) for g in some]
    assert _lacking(Facts.of(some), objective).tolist() == wrong
