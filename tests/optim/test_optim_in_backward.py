"""Updates in the backward are those of the plain path, bit by bit, and no gradient outlives its use."""

import weakref
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fastdpo.errors import ConfigError, TrainingError
from fastdpo.model import support
from fastdpo.objectives import make as make_objective
from fastdpo.optim.optimizers import make_optimizer
from fastdpo.optim.stepping import InBackward
from fastdpo.records import Pair
from fastdpo.training.job import check_stepping, stage_job
from fastdpo.training.stage import Progress
from tests.optim.optimizer_runs import backward, config, make, weights
from tests.tiny import policy
from tests.training.test_step_exactness import Reference, stage_of, step_groups

CAPS = {"one microbatch": 10**6, "some": 70, "one a group": 1}
OBJECTIVES = [
    ("sigmoid", {}),  # decomposable
    ({"sigmoid": 0.8, "sft": 0.2}, {}),
    ("kto", {}),  # decomposable, beside mismatched rows
    ("aot", {}),  # coupled: two passes where there are several microbatches
    ("bco", {}),
    ("drdpo", {"scope": 3}),  # coupled, within every 3 groups
]


class Reference32(Reference):
    def of(self, groups):
        return super().of(groups).float()


def prepared(model_type="llama", groups=None, **overrides):
    p = policy(model_type, **overrides)
    support.prepare(p, groups or step_groups(), Console(quiet=True))
    return p


def run(p, groups, name="sigmoid", options=None, steps=2, cap=10**6, **keys):
    """(the weights, the last gradient norm, the optimizer's states) after steps through Stage."""
    keys = dict(learning_rate=1e-3, max_grad_norm=0, lr_scheduler_type="constant") | keys
    stage = stage_of(make_objective(name, **(options or {})), p, groups, max_tokens=cap, **keys)
    stage.reference = Reference32() if stage.objective.needs_reference else None
    optimizer, schedule = make_optimizer(p, stage.job.optim, steps)
    with closing(optimizer):
        for number in range(1, steps + 1):
            progress = Progress()
            norm = stage.step(stage.groups, progress, number, optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        return [q.detach().clone() for q in p.trained()], float(norm), optimizer.tensors()


def without_offsets(groups):
    plain = lambda g: tuple(Pair(pair.winner, pair.loser, 0.0, pair.weight) for pair in g.pairs)
    return [replace(g, pairs=plain(g)) for g in groups]


def assert_same(one, other):
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(a, b)
    assert one[1] == pytest.approx(other[1], rel=1e-5)
    assert one[2].keys() == other[2].keys()
    assert all(torch.equal(value, other[2][name]) for name, value in one[2].items())


CASES = [(name, options, "sgd") for name, options in OBJECTIVES] + [("sigmoid", {}, "adamw_torch_fused")]


@pytest.mark.parametrize("cap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("name, options, optim", CASES, ids=str)
def test_bitwise_the_plain_path(name, options, optim, cap):
    groups = step_groups()
    if "no offsets" in make_objective(name, **options).needs:
        groups = without_offsets(groups)
    keys = dict(optim=optim, cap=cap)
    plain = run(prepared(), groups, name, options, **keys)
    start = [q.detach() for q in prepared().trained()]
    assert not all(torch.equal(a, b) for a, b in zip(plain[0], start))
    assert_same(run(prepared(), groups, name, options, optimizer_in_backward=True, **keys), plain)


@pytest.mark.parametrize("cap", CAPS.values(), ids=CAPS)
def test_tied_and_frozen_and_unused_weights(cap):
    """The head's weight is the embedding's; a layer is frozen; a parameter has no gradient at all."""

    def odd():
        p = prepared(tie_word_embeddings=True)
        assert p.core.get_output_embeddings().weight is p.core.get_input_embeddings().weight
        p.core.model.layers[0].requires_grad_(False)
        p.model.register_parameter("unused", torch.nn.Parameter(torch.ones(3, 3)))
        return p

    plain = run(odd(), step_groups(), cap=cap, weight_decay=0.1)
    got = run(odd(), step_groups(), cap=cap, weight_decay=0.1, optimizer_in_backward=True)
    assert_same(got, plain)
    assert any(torch.equal(q, torch.ones(3, 3)) for q in got[0])  # not even decayed


@pytest.mark.parametrize("offload", [False, True])
def test_a_weight_that_only_an_earlier_microbatch_reaches_is_updated(offload):
    def two_microbatches(optimizer, some, last=lambda: None):
        backward(some, 0)
        last()
        backward(some[:1], 1)

    want, got = weights(), weights()
    with closing(make(want)) as plain:
        two_microbatches(plain, want)
        norm = torch.nn.utils.get_total_norm([p.grad for p in want])
        plain.step()
    with closing(make(got, optimizer_in_backward=True, offload_optimizer=offload)) as optimizer:
        two_microbatches(optimizer, got, optimizer.last_microbatch)
        torch.testing.assert_close(optimizer.end_backward(), norm)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("cap", CAPS.values(), ids=CAPS)
@pytest.mark.parametrize("keys", [{}, dict(offload_optimizer=True)], ids=str)
def test_no_gradient_outlives_its_use(monkeypatch, cap, keys):
    """When a weight's gradient arrives, every earlier one on the device is gone, its memory too. (On the
    host's side, that is the CPU here, sums and copies on their way may live on.)"""
    arrived, alive, added = [], [], []
    finish, add = InBackward._finish, InBackward._add

    def watched(self, p, gradient):
        assert gradient is not None  # it came from the last backward, not from the host
        alive.append(sum(q.grad is not None for q in self.weights))
        if not keys:
            alive.append(sum(ref() is not None for ref in arrived))
            arrived.append(weakref.ref(gradient))
        return finish(self, p, gradient)

    monkeypatch.setattr(InBackward, "_finish", watched)
    monkeypatch.setattr(InBackward, "_add", lambda self, p, g: (added.append(1), add(self, p, g)))
    p = prepared()
    run(p, step_groups(), steps=2, cap=cap, optimizer_in_backward=True, **keys)
    assert len(alive) >= 2 * len(p.trained()) and not any(alive)
    assert bool(added) == (cap != CAPS["one microbatch"])  # one microbatch a step: nothing is kept at all


def test_on_the_plain_path_all_gradients_live_at_once(monkeypatch):
    """What the test above would see without the updates in the backward."""
    found = []
    p = prepared()
    hooks = [q.register_post_accumulate_grad_hook(lambda q: found.append(q.grad)) for q in p.trained()]
    run(p, step_groups(), steps=1)
    assert len(found) == len(hooks) and all(gradient is not None for gradient in found)


def test_closing_takes_the_hooks_away():
    some = weights()
    make(some, optimizer_in_backward=True).close()
    backward(some, 0)
    assert all(p.grad is not None for p in some)


@pytest.mark.parametrize("name", ["sigmoid", "aot"])
def test_a_loss_that_is_no_number_stops_before_any_update(name):
    """In the second of several microbatches, or of a loss of all rows at once."""
    groups = without_offsets(step_groups())
    bad = groups[3].row

    class Broken(Reference32):
        def of(self, some):
            values = super().of(some)
            return values * float("nan") if any(g.row == bad for g in some) else values

    p = prepared()
    start = [q.detach().clone() for q in p.trained()]
    stage = stage_of(
        make_objective(name), p, groups, max_tokens=1, max_grad_norm=0, optimizer_in_backward=True
    )
    stage.reference = Broken()
    optimizer, _ = make_optimizer(p, stage.job.optim, 1)
    with closing(optimizer), pytest.raises(TrainingError) as error:
        stage.step(groups, Progress(), 5, optimizer)
    assert "step 5: the loss is nan;" in str(error.value)
    assert "The weights of this step were not updated" in str(error.value)
    if name == "sigmoid":
        assert f"in the microbatch of rows {bad}. " in str(error.value)
    assert all(torch.equal(q, was) for q, was in zip(p.trained(), start))


def test_a_gradient_that_is_no_number_does_not_claim_untouched_weights():
    p = prepared()
    stage = stage_of(make_objective("sft"), p, step_groups(), max_grad_norm=0, optimizer_in_backward=True)
    p.core.get_input_embeddings().weight.register_hook(lambda gradient: gradient * float("inf"))
    optimizer, _ = make_optimizer(p, stage.job.optim, 1)
    with closing(optimizer), pytest.raises(TrainingError) as error:
        stage.step(stage.groups, Progress(), 5, optimizer)
    text = str(error.value)
    assert (
        "in the gradient" in text and "has updated weights by it: only the newest checkpoint is good" in text
    )
    assert "not updated" not in text


def test_rescaled_objectives_are_refused():
    keys = dict(objective="drdpo", optimizer_in_backward=True)
    with pytest.raises(
        ConfigError, match="optimizer_in_backward: drdpo rescales the gradient after the last"
    ):
        check_stepping(stage_job(config(**keys)))
    check_stepping(stage_job(config(objective_args={"scope": 3}, **keys)))
    check_stepping(stage_job(config(objective="drdpo")))


def test_an_error_on_the_hosts_thread_is_raised(monkeypatch):
    def broken(*args):
        raise RuntimeError("no room on the host")

    some = weights()
    with closing(make(some, offload_optimizer=True)) as optimizer:
        monkeypatch.setattr(optimizer.library, "step", broken)
        backward(some, 0)
        with pytest.raises(RuntimeError, match="no room on the host"):
            optimizer.step()
