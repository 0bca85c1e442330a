"""How many tokens of a known response a sample begins behind."""

import json

import numpy as np
import pytest

from fastdpo.sampling.resets import reset_length
from tests.data.shared_data import SHARED, needs_shared

DRAWS = 20_000
ALL = np.ones(9, bool)
SOME = np.array([0, 1, 0, 0, 1, 1, 0, 1], bool)


def lengths(mask, share=1.0, room=None, draws=DRAWS):
    rng = np.random.default_rng(3)
    return np.array([reset_length(mask, share, rng, room) for _ in range(draws)])


@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize(
    "mask, room, places", [(ALL, None, range(9)), (SOME, None, [1, 4, 5, 7]), (SOME, 5, [1, 4, 5])]
)
def test_every_scored_token_is_equally_often_the_first_one_sampled(mask, room, places, share):
    """By chi-square, at the 0.1 % level; the share that is not reset begins at 0."""
    want = np.zeros(len(mask))
    want[[*places]] = share / len(places)
    want[0] += 1 - share
    seen = np.bincount(lengths(mask, share, room), minlength=len(mask))
    assert not seen[want == 0].any()
    want = DRAWS * want[want > 0]
    seen = seen[seen > 0]
    critical = {2: 13.82, 3: 16.27, 4: 18.47, 8: 26.12}[len(want) - 1]
    assert ((seen - want) ** 2 / want).sum() < critical


def test_no_reset_and_no_room_begin_at_the_prompt():
    assert not lengths(ALL, 0.0, draws=100).any()
    assert not lengths(SOME, 1.0, room=0, draws=100).any()
    assert not lengths(np.zeros(3, bool), draws=10).any()


def test_one_scored_token_is_begun_at():
    assert (lengths(np.array([False, False, True]), draws=10) == 2).all()


def test_a_seed_gives_the_same_lengths():
    assert (lengths(ALL, 0.5, draws=50) == lengths(ALL, 0.5, draws=50)).all()


@needs_shared
def test_the_papers_own_draw_leaves_the_first_token_out():
    of = json.loads((SHARED / "research/vectors.json").read_text())["drpo_rollin_prefix"]
    mask = np.arange(of["L"]) > 0
    assert np.unique(lengths(mask, draws=200)).tolist() == of["support"]
