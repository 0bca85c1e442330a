"""Every objective through the whole path (packed, shared, cut anywhere) against one plain row at a time.

The truth is transformers' own forward of each response alone, in fp64 (GPT-2's: Llama's norm rounds to
fp32), and `objective.whole` of all responses of the step at once, through autograd.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.data.mismatched import beside, mismatched
from fastdpo.data.packing import pack, places
from fastdpo.data.store.digests import response_keys
from fastdpo.model import support
from fastdpo.objectives import make
from fastdpo.objectives.batch import kto_z0
from fastdpo.objectives.catalogue import NAMES
from fastdpo.records import Pair, ResponseLogps
from fastdpo.training.accumulate import Accumulator
from fastdpo.training.job import stage_job
from fastdpo.training.stage import Progress, Stage
from tests.tiny import group, policy

CAPS = (1, 70, 10**6)  # a group a microbatch, a few microbatches, one
QUIET = Console(quiet=True)


class Reference:
    """Some log-probs for each response, a function of its tokens; fp64."""

    per_token = True

    def of(self, groups):
        values = []
        for some in groups:
            for key, response in zip(response_keys(some), some.responses):
                draw = np.random.default_rng(int.from_bytes(key[:8], "little"))
                values.append(draw.normal(-5, 1, int(response.target_mask.sum())))
        return torch.from_numpy(np.concatenate(values))


def step_groups(seed=0, unpaired=False):
    """Random groups of 1 to 5 responses and any pair graph over them, scores falling along each pair."""
    draw = np.random.default_rng(seed)
    out = []
    for row in range(7):
        n = 1 if unpaired else int(draw.integers(2, 6))
        some = group(row, int(draw.integers(1, 15)), draw.integers(1, 12, n).tolist(), seed=seed)
        edges = [(i, j) for i in range(n) for j in range(i + 1, n) if draw.random() < 0.5]
        edges = edges or [(0, 1)]
        pairs = [Pair(i, j, float(draw.normal() / 10), float(draw.uniform(0.5, 2))) for i, j in edges]
        scores = np.sort(draw.uniform(1, 5, n))[::-1]
        weights = [draw.uniform(0, 1, len(r.ids)).astype(np.float32) for r in some.responses]
        responses = tuple(
            replace(r, score=float(s), token_weight=w, label=bool(row % 2) if unpaired else None)
            for r, s, w in zip(some.responses, scores, weights)
        )
        out.append(replace(some, responses=responses, pairs=() if unpaired else tuple(pairs)))
    return out


def plain_token_logp(p, groups, stats=()):
    """Token log-probs of every response, one model call each, and the named statistics."""
    logps, found = [], {name: [] for name in stats}
    with p.stock() as model:
        for some in groups:
            for response in some.responses:
                ids = torch.tensor([[*some.prompt, *response.ids]])
                start = len(some.prompt) - 1
                scores = model(ids).logits[0, start:-1].log_softmax(-1)
                mask = torch.from_numpy(response.target_mask)
                logps.append(scores.gather(1, torch.from_numpy(response.ids)[:, None])[:, 0][mask])
                if "log_sum_sq_probs" in found:
                    found["log_sum_sq_probs"].append((2 * scores[mask]).logsumexp(-1).detach())
    return torch.cat(logps), {name: torch.cat(values) for name, values in found.items()}


def truth(objective, p, groups, max_length):
    """(loss, gradients after clipping to 1, memory afterwards) by the definition."""
    reference = Reference()
    token_logp, stats = plain_token_logp(p, groups, objective.stats)
    ref = reference.of(groups) if objective.needs_reference else None
    logps = ResponseLogps.of(pack(groups), token_logp, ref, stats)
    memory = {}
    if objective.mismatched:
        aside = list(mismatched(groups, max_length))
        with torch.no_grad():
            values, _ = plain_token_logp(p, aside)
            z0 = kto_z0(ResponseLogps.of(pack(aside), values, reference.of(aside)))
        logps = replace(logps, context={"z0": z0})
    if getattr(objective, "remember", None):
        memory = objective.remember(logps.detached(), {})
        logps = replace(logps, context=logps.context | memory)
    loss = objective.whole(logps)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(p.trained(), 1.0)
    return loss.detach(), gradients(p), memory


def gradients(p):
    found = [q.grad.clone() for q in p.trained()]
    p.model.zero_grad(set_to_none=True)
    return found


def stage_of(objective, p, groups, **keys):
    config = Config(model="m", data="d", batch_size=len(groups), max_length=64, **keys)
    stage = Stage(stage_job(config), p, groups, [])
    stage.objective = objective
    stage.groups = objective.select(groups)
    if objective.mismatched:
        stage.mismatched = mismatched(stage.groups, config.max_length)
    stage.reference = Reference() if objective.needs_reference else None
    return stage


def assert_exact(objective, groups, caps=CAPS):
    p = policy("gpt2", torch.float64)
    selected = objective.select(groups)
    want_loss, want, want_memory = truth(objective, p, selected, 64)
    support.prepare(p, groups, QUIET)
    assert p.share
    for cap in caps:
        stage, progress = stage_of(objective, p, groups, max_tokens=cap), Progress()
        stage.step(stage.groups, progress, 1)
        got = gradients(p)
        loss = progress.window.sums.means()["loss"]
        assert loss == pytest.approx(float(want_loss), rel=1e-9, abs=1e-12), cap
        for a, b in zip(got, want):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
        assert progress.memory == pytest.approx(want_memory)


# what each name is tried with, besides its defaults
OPTIONS = [
    ("sigmoid", dict(label_smoothing=0.1, gamma=0.3, ld_alpha=0.5)),
    ("sigmoid", dict(use_weighting=True, clamp_weights=True)),
    ("sigmoid", dict(f_divergence_type="js_divergence")),
    ("ipo", dict(use_weighting=True)),
    ("drdpo", dict(beta_prime=0.05)),
    ("drdpo", dict(base_loss="ipo", beta_prime=0.5)),
    ("drdpo", dict(base_loss="robust", gamma=0.0)),
    ("aot", dict(ld_alpha=0.5)),
    ("kto", dict(desirable_weight=2.0)),
    ({"sigmoid": 1.0, "drdpo": 0.5, "aot_unpaired": 0.3}, {}),
    ({"bco": 1.0, "sft": 0.2}, {}),
    ({"kto": 1.0, "orpo": 0.5}, {}),
    ("rloo", dict(clip=0)),
    ({"rloo": 1.0, "sft": 0.1}, {}),
    ({"rloo": 1.0, "aot": 0.3}, {}),
]
CASES = [(name, {"label_smoothing": 0.01} if name == "exo_pair" else {}) for name in NAMES] + OPTIONS


def for_rows(name, options):
    """Random rows; without offsets for objectives that read none."""
    objective, groups = make(name, **options), step_groups()
    if "no offsets" in objective.needs:
        plain = lambda g: tuple(pair._replace(offset=0.0) for pair in g.pairs)
        groups = [replace(g, pairs=plain(g)) for g in groups]
    return objective, groups


@pytest.mark.parametrize("name, options", CASES, ids=str)
def test_every_objective_is_exact_however_the_step_is_cut(name, options):
    assert_exact(*for_rows(name, options))


@pytest.mark.parametrize("objective", ["rloo", {"rloo": 1.0, "sft": 0.1}, {"rloo": 1.0, "aot": 0.3}], ids=str)
def test_what_a_batch_brings_of_the_old_policy_is_scored(objective, monkeypatch):
    """The ratio that rloo clips is to the batch's old_token_logp, in any cut, and not to the reference."""
    made, groups, reference = make(objective), step_groups(), Reference()
    groups = [replace(g, pairs=tuple(p._replace(offset=0.0) for p in g.pairs)) for g in groups]
    old_of = lambda part: reference.of(part) / 2
    plain = Stage.packed
    with_old = lambda self, part: replace(plain(self, part), old_token_logp=old_of(part))
    monkeypatch.setattr(Stage, "packed", with_old)
    p = policy("gpt2", torch.float64)
    token_logp, _ = plain_token_logp(p, groups)
    logps = ResponseLogps.of(pack(groups), token_logp.detach(), reference.of(groups))
    want = float(made.whole(replace(logps, old_token_logp=old_of(groups))))
    assert abs(want - float(made.whole(logps))) > 1e-3
    support.prepare(p, groups, QUIET)
    for cap in CAPS:
        stage, progress = stage_of(made, p, groups, max_tokens=cap), Progress()
        stage.step(stage.groups, progress, 1)
        assert progress.window.sums.means()["loss"] == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("name", ["sigmoid", "drdpo", "kto", "bco", "aot"])
def test_random_pair_graphs(name, seed):
    groups = step_groups(seed)
    if "no offsets" in make(name).needs:
        groups = [replace(g, pairs=tuple(p._replace(offset=0.0) for p in g.pairs)) for g in groups]
    assert_exact(make(name), groups, caps=(70,))


@pytest.mark.parametrize("name", ["kto", "bco", "apo_zero_unpaired"])
def test_unpaired_rows(name):
    assert_exact(make(name), step_groups(unpaired=True))


def test_mismatched_responses_are_of_another_prompt():
    """Rows 0 and 4, and 1 and 2, judge two responses of one prompt each."""
    groups = [group(row, 4, [3]) for row in range(5)]
    groups[2] = replace(groups[2], prompt=groups[1].prompt)
    groups[4] = replace(groups[4], prompt=groups[0].prompt)
    found = mismatched(groups, 64)
    taken = {other.row: other.responses[0].ids.tolist() for other in found}
    assert taken == {row: groups[i].responses[0].ids.tolist() for row, i in enumerate([1, 3, 3, 4, 1])}
    assert all((other.prompt == g.prompt).all() for other, g in zip(found, groups, strict=True))
    assert [g.row for g in beside(found, [3, 1, 7, 9])] == [3, 1]
    same = mismatched([replace(g, prompt=groups[0].prompt) for g in groups], 64)
    assert not len(same)  # there is no other prompt, and a row's own is no reference point


def test_dr_dpo_in_the_authors_form_looks_at_so_many_groups_at_a_time():
    """scope: 3 is the mean over groups 0-2, 3-5 and 6 of their own Dr. DPO, weighted by their pairs, at any
    token cap; it is not the batch's."""
    objective, groups = make("drdpo", scope=3, beta_prime=0.1), step_groups()
    p = policy("gpt2", torch.float64)
    token_logp, _ = plain_token_logp(p, groups)
    reference, start, want = Reference(), 0, 0.0
    pairs = sum(len(g.pairs) for g in groups)
    for some in (groups[:3], groups[3:6], groups[6:]):
        end = start + sum(g.scored_tokens for g in some)
        logps = ResponseLogps.of(pack(some), token_logp[start:end], reference.of(some))
        want = want + objective.whole(logps) * sum(len(g.pairs) for g in some) / pairs
        start = end
    want.backward()
    torch.nn.utils.clip_grad_norm_(p.trained(), 1.0)
    expected = gradients(p)
    support.prepare(p, groups, QUIET)
    for cap in CAPS:
        stage, progress = stage_of(objective, p, groups, max_tokens=cap), Progress()
        stage.step(stage.groups, progress, 1)
        assert progress.window.sums.means()["loss"] == pytest.approx(want.item(), rel=1e-9)
        for a, b in zip(gradients(p), expected):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
    whole = make("drdpo", beta_prime=0.1).whole(
        ResponseLogps.of(pack(groups), token_logp, reference.of(groups))
    )
    assert abs(whole.item() - want.item()) > 1e-3


def test_dr_dpo_is_rebased_when_a_later_microbatch_would_overflow(monkeypatch):
    """The first microbatch (the largest group) loses by 1,000 nats: the others weigh e^10000 beside it."""
    groups = step_groups()
    first = max(groups, key=lambda g: places(g, True))
    worse = tuple(pair._replace(offset=1000.0) for pair in first.pairs)
    groups = [replace(g, pairs=worse) if g is first else g for g in groups]
    scale, factors = Accumulator._scale_gradients, []
    monkeypatch.setattr(
        Accumulator, "_scale_gradients", lambda self, f: (factors.append(float(f)), scale(self, f))
    )
    assert_exact(make("drdpo", beta_prime=0.1), groups, caps=(1,))
    assert len(factors) == 2 and factors[0] == 0.0  # re-based, and divided at the end


@pytest.mark.parametrize("name", ["aot", "bco", "kto", "drdpo"])
def test_what_is_scored_first_is_counted(name):
    """AOT and BCO score a step of several microbatches once without gradient, KTO the mismatched responses;
    Dr. DPO needs no second forward."""
    objective, groups = for_rows(name, {})
    p = policy("gpt2", torch.float64)
    support.prepare(p, groups, QUIET)
    seen = {}
    for cap in (1, 10**6):
        stage, progress = stage_of(objective, p, groups, max_tokens=cap), Progress()
        stage.step(stage.groups, progress, 1)
        seen[cap] = progress.window.first_pass
    step = sum(g.input_tokens for g in groups)
    aside = sum(g.input_tokens for g in mismatched(groups, 64))
    want = {"drdpo": (0, 0), "kto": (aside, aside)}.get(name, (step, 0))
    assert (seen[1], seen[10**6]) == want
