"""Rows in columns: by hand, on responses some of whose tokens are not scored."""

import math

import numpy as np
import pytest
import torch

from fastdpo.explanation.rows import Rows
from fastdpo.records import Pair, PreferenceGroup
from tests import tiny

RANKED = [Pair(0, 1), Pair(0, 2), Pair(1, 2)]


@pytest.fixture
def rows():
    """Three rows, the last with the prompt of the first; of more than 3 tokens two are not scored."""
    first, second = tiny.group(0, 5, [4, 1]), tiny.group(1, 3, [5, 2, 3], pairs=RANKED)
    third = tiny.group(2, 5, [1, 6])
    return Rows([first, second, PreferenceGroup(2, first.prompt, third.responses, third.pairs)])


def test_columns(rows):
    assert rows.pairs.tolist() == [[0, 1], [2, 3], [2, 4], [3, 4], [5, 6]]
    assert rows.prompt.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert rows.lengths.tolist() == [2, 1, 3, 2, 3, 1, 4]
    assert rows.cu_resp.tolist() == [0, 2, 3, 6, 8, 11, 12, 16]
    assert rows.response.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 4, 4, 4, 5, 6, 6, 6, 6]
    assert rows.position.tolist() == [0, 1, 0, 0, 1, 2, 0, 1, 0, 1, 2, 0, 0, 1, 2, 3]
    assert rows.chosen.tolist() == [0, 2, 3, 5]
    first, last = rows.groups[0].responses[0], rows.groups[2].responses[1]
    assert rows.target[:2].tolist() == [first.ids[1], first.ids[3]]
    assert rows.target[-4:].tolist() == [last.ids[1], *last.ids[3:]] and len(rows.target) == 16


def test_sums_and_differences(rows):
    values = torch.arange(16.0)
    assert rows.sums(values).tolist() == [1, 2, 12, 13, 27, 11, 54]
    assert rows.sums(values).dtype == torch.float64
    assert rows.of_pairs(rows.sums(values)).tolist() == [-1, -1, -15, -14, -43]


def test_means_are_over_pairs_and_their_errors_over_prompts(rows):
    """Prompt 0 has the pairs 0 and 4, prompt 1 the three others: v_p = r + P (S_p - r n_p) / N."""
    found = rows.mean_of_pairs(torch.tensor([1.0, 2, 3, 4, 10]))
    v = [4 + 2 * (11 - 4 * 2) / 5, 4 + 2 * (9 - 4 * 3) / 5]
    assert found.value == pytest.approx(4) and found.by_prompt == pytest.approx(v)
    assert found.error == pytest.approx(np.std(v, ddof=1) / math.sqrt(2))


def test_means_of_tokens_count_each_token_once(rows):
    at = torch.tensor([0, 1, 4, 15])
    found = rows.mean_of_tokens(torch.tensor([1.0, 2, 3, 6]), at)
    v = [3 + 2 * (9 - 3 * 3) / 4, 3 + 2 * (3 - 3 * 1) / 4]
    assert found.value == pytest.approx(3) and found.by_prompt == pytest.approx(v)
    alone = rows.mean_of_tokens(torch.tensor([1.0, 2]), at[:2])
    assert alone.value == pytest.approx(1.5) and alone.prompts.tolist() == [0] and alone.error is None


def test_means_in_units(rows):
    """Sums of responses, over tokens: as if each token were there."""
    of = torch.tensor([0, 4])
    found = rows.mean(torch.tensor([6.0, 9.0]), of, rows.lengths[of])
    assert found.value == pytest.approx(15 / 5)


def test_some_tokens_are_drawn_by_the_seed(rows):
    state = torch.get_rng_state()
    drawn = [rows.some_tokens(6, seed).tolist() for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 6 and drawn[0] == sorted(drawn[0])
    assert rows.some_tokens(100, 0).tolist() == list(range(16))
