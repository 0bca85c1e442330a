"""A pass over the rows that patches are tried on: against what the policy gives without it."""

import copy
from functools import partial

import pytest
import torch

from fastdpo.data.packing import in_row_order
from fastdpo.evaluation.kl import head_of
from fastdpo.explanation.capture import capture
from fastdpo.explanation.measure import Ends, measure
from fastdpo.explanation.patch import Patch, record
from tests import tiny
from tests.explanation.families import far, hooks_on, moved, policy_of

FAMILIES = ("llama", "gpt2", "gemma2", "granite", "nanochat")


def unit(D=64):
    u = torch.randn(D, dtype=torch.float64)
    return u / u.norm()


def parts_of(policy, max_tokens=40):
    return in_row_order(tiny.groups(), max_tokens, policy.share)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_pass_gives(family, share):
    policy, places = policy_of(family, share)
    u, at = unit(), torch.tensor([0, 3, 4, 20, 42])
    found = measure(policy, places, parts_of(policy), u, at)
    captured, seen = capture(policy, places, tiny.groups(), max_tokens=40)
    assert far(found.token_logp, seen.token_logp) <= 1e-6
    assert torch.equal(found.hidden, seen.hidden[at])
    lengths = seen.cu_resp.diff()
    assert found.projection.dtype == torch.float64 and len(found.projection) == 12
    assert far(found.projection, (seen.residual.double() @ u) * lengths) <= 1e-6  # stored in fp32
    assert float(found.projection.sum() / lengths.sum()) == pytest.approx(float(captured.final @ u), rel=1e-9)


@pytest.mark.parametrize("share", [True, False])
def test_packs_change_nothing(share):
    policy, places = policy_of("llama", share)
    u, at, seen = unit(), torch.arange(0, 43, 2), []
    whole = measure(policy, places, parts_of(policy, 10**6), u, at)
    cut = measure(policy, places, parts_of(policy, 1), u, at, each=lambda: seen.append(1))
    assert len(seen) == len(tiny.groups())
    for name in ("token_logp", "projection", "hidden"):
        assert far(getattr(cut, name), getattr(whole, name)) <= 1e-6


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_another_model_has_is_the_other_model(family, share, tmp_path):
    """With its final norm and its lm_head, which have moved, too."""
    before, places = policy_of(family, share)
    after, theirs = policy_of(family, share)
    moved(after, 7)
    u, at, parts = unit(), torch.arange(43), parts_of(before)
    wanted = measure(after, theirs, parts, u, at)
    ends = Ends(copy.deepcopy(theirs.norm), head_of(after))
    how = dict(direction=u, at=at, records=record(after, theirs, parts, tmp_path))
    patched = partial(measure, before, places, parts, **how)
    everything = Patch(embedding=True, attention=True, mlp=True)
    found = patched(patch=everything, ends=ends)
    for name in ("token_logp", "projection", "hidden"):
        assert far(getattr(found, name), getattr(wanted, name)) <= 1e-6
    without = patched(patch=everything)
    assert far(without.projection, wanted.projection) <= 1e-6
    assert far(without.token_logp, wanted.token_logp) > 1e-2
    assert hooks_on(before) == hooks_on(after) == 0


def test_hooks_are_off_after_a_failure():
    policy, places = policy_of("llama")
    with pytest.raises(ZeroDivisionError):
        measure(policy, places, parts_of(policy), unit(), torch.arange(3), each=lambda: 1 / 0)
    assert hooks_on(policy) == 0
