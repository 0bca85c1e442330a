"""Numbers over some of the responses, and paired tests on made numbers with known answers."""

import math

import numpy as np
import pytest
import torch

from fastdpo.evaluation.estimates import Estimate, estimate, paired
from fastdpo.training.held_out import Part


def of(values):
    return Estimate.of(np.array(values, float), np.arange(len(values)))


def test_a_paired_test_with_a_known_answer():
    """25 differences: mean 0.4, standard deviation 1, so an error of 0.2, z = 2 and the p of two sigma."""
    apart = np.linspace(-1, 1, 25)
    apart = 0.4 + apart / apart.std(ddof=1)
    common = np.random.default_rng(0).normal(0, 50, 25)  # what both models share is no noise
    test = paired("samples/score", ("model", "reference"), of(common + apart), of(common))
    assert (test.number, test.one, test.other) == (
        "samples/score",
        "model",
        "reference",
    ) and test.prompts == 25
    assert test.difference == pytest.approx(0.4) and test.error == pytest.approx(0.2)
    assert test.z == pytest.approx(2.0) and test.p == pytest.approx(0.0455002639, rel=1e-6)
    assert test.verdict == "better"


@pytest.mark.parametrize(
    "number, shift, verdict",
    [
        ("samples/score", -1.0, "worse"),
        ("loss", 1.0, "worse"),
        ("loss", -1.0, "better"),
        ("rewards/margins", 1.0, "higher"),
        ("rewards/margins", -1.0, "lower"),
        ("logps/accuracies", 0.01, "no difference beyond chance"),
    ],
)
def test_verdicts(number, shift, verdict):
    one = np.random.default_rng(1).normal(0, 1, 40)
    other = np.random.default_rng(2).normal(0, 1, 40)
    one += shift - (one - other).mean()
    test = paired(number, ("model", "versus"), of(one), of(other))
    assert test.verdict == verdict and test.difference == pytest.approx(shift)


def test_equal_models_few_prompts_and_a_constant_difference():
    same = paired("loss", ("model", "versus"), of(np.arange(30)), of(np.arange(30)))
    assert (same.difference, same.error, same.z, same.p) == (0, None, None, None)
    assert same.verdict == "no difference beyond chance"
    few = paired("loss", ("model", "versus"), of(np.arange(19) ** 2), of(np.zeros(19)))
    assert few.verdict == "19 prompts are too few to tell" and few.z > 3
    constant = paired("loss", ("model", "versus"), of(np.zeros(30)), of(np.ones(30)))
    assert constant.z is None and constant.verdict == "better"


def test_of_equal_models_one_test_in_twenty_says_so_all_the_same():
    draw = np.random.default_rng(0)
    tests = [
        paired("samples/score", ("a", "b"), of(draw.normal(0, 1, 200)), of(draw.normal(0, 1, 200)))
        for _ in range(1000)
    ]
    found = sum(test.verdict != "no difference beyond chance" for test in tests)
    assert abs(found - 50) < 4 * math.sqrt(50)


def test_an_estimate_over_some_responses_is_that_of_these_alone():
    """Six prompts with two responses each; the prompts of the kept ones are what its error is over."""
    values, of_response = torch.tensor([1.0, 2, 3, 4, 5, 7]), torch.tensor([0, 2, 3, 5, 9, 10])
    prompt, kept = torch.arange(6).repeat_interleave(2), torch.zeros(12, dtype=torch.bool)
    kept[[2, 3, 9, 10]] = True
    found = estimate([Part(values, of_response)], prompt, kept)
    # of the prompts 1, 1, 4, 5: a mean over four values with two of one prompt
    assert found.value == pytest.approx((2 + 3 + 5 + 7) / 4) and found.prompts.tolist() == [1, 4, 5]
    sums, counts = np.array([5.0, 5, 7]), np.array([2, 1, 1])
    apart = 3 * (sums - 4.25 * counts) / 4
    assert found.error == pytest.approx(apart.std(ddof=1) / math.sqrt(3))
    assert estimate([Part(values, of_response)], prompt, ~kept & False) is None
    whole = estimate([Part(values, of_response)], prompt)
    assert whole.value == pytest.approx(float(values.mean())) and whole.prompts.tolist() == [0, 1, 2, 4, 5]
