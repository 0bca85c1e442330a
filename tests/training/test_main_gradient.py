"""The trainer in bf16: linear_logp adds the lm_head's gradient to its fp32 .grad; nothing else changes."""

import pytest
import torch
from fastdpo_kernels import linear_logp, reference
from rich.console import Console

from fastdpo.config.keys import Config
from fastdpo.model import policy as policy_module
from fastdpo.model import support
from fastdpo.objectives import make
from fastdpo.planning.allocations import GRADIENTS
from fastdpo.planning.simulate import Load, simulate
from fastdpo.planning.target import Target
from fastdpo.training.stage import Progress
from tests.optim.test_optim_in_backward import Reference32, run
from tests.tiny import group, model_config, policy
from tests.training.test_step_exactness import stage_of, step_groups


def prepared(**overrides):
    p = policy(**overrides)
    p.dtype = torch.bfloat16
    support.prepare(p, step_groups(), Console(quiet=True))
    return p


class Calls:
    """linear_logp, and what it was given and its log-probs' slopes were."""

    def __init__(self):
        self.seen = []

    def __call__(self, hidden, **options):
        logp = linear_logp(hidden, **options)
        call = {"hidden": hidden.detach(), **options}
        if logp.requires_grad:
            logp.register_hook(lambda slope: call.update(slope=slope))
            self.seen.append(call)
        return logp

    def head_gradient(self):
        """f64 [V, D], of the same hidden states, weights and slopes."""
        total = 0
        for call in self.seen:
            weight = call["weight"].detach().double().requires_grad_()
            logp = reference.linear_logp(call["hidden"].double(), weight, call["target"])
            total += torch.autograd.grad(logp, weight, call["slope"].double())[0]
        return total


def one_step(monkeypatch, p, adds=True, name="sigmoid"):
    """({parameter: gradient} of a step of several microbatches, the Calls)."""
    calls = Calls()
    monkeypatch.setattr(policy_module, "linear_logp", calls)
    groups = step_groups()
    stage = stage_of(make(name), p, groups, max_tokens=1, max_grad_norm=0)
    stage.reference, p.adds_to_grad = Reference32(), adds
    stage.step(stage.groups, Progress(), 1)
    assert len(calls.seen) == len(groups)
    return {n: q.grad for n, q in p.model.named_parameters()}, calls


@pytest.mark.parametrize("name", ("sigmoid", "drdpo", "aot"))  # decomposable, rescaled, coupled
def test_it_is_nearer_to_the_truth_and_all_others_have_the_same_bits(name, monkeypatch):
    (new, calls), (old, _) = (one_step(monkeypatch, prepared(), adds, name) for adds in (True, False))
    ours, theirs = new.pop("lm_head.weight"), old.pop("lm_head.weight")
    assert all(call["grad_into"] is ours for call in calls.seen)
    assert new.keys() == old.keys() and all(torch.equal(new[n], old[n]) for n in new)
    if name != "drdpo":  # which scales the sum afterwards
        truth = calls.head_gradient()
        off = lambda g: float((g - truth).abs().max() / truth.abs().max())
        assert off(ours) < off(theirs) / 3 and off(theirs) < 2**-7
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=2**-6, atol=2**-8 * float(theirs.abs().max()))


def test_of_tied_weights_the_embedding_s_part_comes_into_the_same_tensor(monkeypatch):
    tied = lambda adds: one_step(monkeypatch, prepared(tie_word_embeddings=True), adds)
    (new, calls), (old, _) = tied(True), tied(False)
    (name,) = (n for n, gradient in new.items() if gradient is calls.seen[0]["grad_into"])
    assert all(torch.equal(new[n], old[n]) for n in new if n != name)
    of_head = calls.head_gradient()
    by_embedding = old[name] - of_head
    assert by_embedding.abs().max() > 0.1 * of_head.abs().max()
    torch.testing.assert_close(new[name], old[name], rtol=2**-6, atol=2**-8 * float(of_head.abs().max()))


def test_steps_repeat_bit_by_bit():
    one, other = (run(prepared(), step_groups(), cap=70) for _ in range(2))
    assert one[1] == other[1] and all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


def test_without_gradient_none_is_made():
    p = prepared()
    p.adds_to_grad = True
    stage = stage_of(make("sigmoid"), p, step_groups())
    (batch,) = stage.microbatches(stage.groups)
    with torch.no_grad():
        p.token_logp(batch)
    assert all(q.grad is None for q in p.trained())


def test_where_autograd_has_to_bring_it():
    half, weight = torch.bfloat16, lambda p: p.head.module.weight
    p = prepared()
    assert p.head.main_gradient(torch.float32) is None and weight(p).grad is None
    assert p.head.main_gradient(half) is weight(p).grad is p.head.main_gradient(half) is not None
    hook = weight(p).register_post_accumulate_grad_hook(lambda q: None)
    assert p.head.main_gradient(half) is None
    hook.remove()
    hook = weight(p).register_hook(lambda gradient: None)
    assert p.head.main_gradient(half) is None
    hook.remove()
    weight(p).requires_grad_(False)
    assert p.head.main_gradient(half) is None
    pure = policy(dtype=half)
    assert pure.head.main_gradient(half) is None


def test_updates_in_the_backward_see_every_gradient():
    """A step there is the plain one bit by bit, but for the head's gradient, which comes in half."""
    keys = dict(cap=70, steps=1, optim="sgd", learning_rate=1.0)
    plain, got = (run(prepared(), step_groups(), optimizer_in_backward=on, **keys)[0] for on in (False, True))
    start = [q.detach() for q in prepared().trained()]
    *others, head = ((a, b, s) for a, b, s in zip(got, plain, start, strict=True))
    assert all(torch.equal(a, b) and not torch.equal(a, s) for a, b, s in others)
    largest = float((head[1] - head[2]).abs().max())
    assert largest > 0 and not torch.equal(head[0], head[1])
    torch.testing.assert_close(head[0], head[1], rtol=0, atol=2**-7 * largest)


@pytest.mark.parametrize("target", (Target(), Target(is_cpu=True)), ids=("card", "host"))
def test_the_plan_counts_no_gradient_in_half(target, monkeypatch):
    V, D = 20_000, 64
    c = model_config("llama", tie_word_embeddings=False, vocab_size=V)
    config = Config(model="random", data="none", dtype="bf16")

    def peaks():
        for several in (False, True):
            load = Load((group(0, 30, [20, 9]),), several=several)
            found = simulate(config, c, load, target)
            yield next(p for p in found if p.where == "backward of the head")

    new = list(peaks())
    monkeypatch.setattr("fastdpo.model.lm_head.Head.main_gradient", lambda head, dtype: None)
    old = list(peaks())
    assert [a.total - b.total for a, b in zip(new, old)] == [2 * V * D, -2 * V * D]
    assert [a.bytes[GRADIENTS] - b.bytes[GRADIENTS] for a, b in zip(new, old)] == [4 * V * D, 0]
