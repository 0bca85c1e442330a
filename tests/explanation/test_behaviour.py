"""KLs against their dense definition in fp64; log-ratios, positions and tokens by plain loops."""

import math

import pytest
import torch

from fastdpo.evaluation.estimates import Estimate
from fastdpo.explanation import behaviour as module
from fastdpo.explanation.behaviour import behaviour, kls, perplexity
from fastdpo.explanation.capture import Seen
from fastdpo.explanation.rows import Rows
from fastdpo.records import Pair
from tests import tiny
from tests.evaluation.test_kl import KINDS, pair

D, V = 8, 50


def head(seed, dtype=torch.float64, **parts):
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(V, D, generator=draw, dtype=torch.float64).to(dtype)
    return dict(weight=weight, bias=None, lora=None, scale=1.0, softcap=None) | parts


def by_definition(hidden, head):
    """log p, f64, of full logits."""
    wide = lambda tensor: tensor.double()
    weight = wide(head["weight"])
    if head["lora"] is not None:
        a, b, s = head["lora"]
        weight = weight + s * wide(b) @ wide(a)
    z = wide(hidden) @ weight.T
    z = (z if head["bias"] is None else z + wide(head["bias"])) * head["scale"]
    if head["softcap"] is not None:
        z = head["softcap"] * (z / head["softcap"]).tanh()
    return z.log_softmax(-1)


HEADS = {
    "plain": {},
    "bias": {"bias": torch.linspace(-1, 1, V, dtype=torch.float64)},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 3.0},
    "lora": {"lora": (torch.ones(2, D).double() / 9, torch.linspace(0, 1, 2 * V).view(V, 2).double(), 2.0)},
}


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_kls_equal_their_definition(kind, dtype, near, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 7)  # what nothing divides
    h, h_after = torch.randn(2, 30, D, dtype=torch.float64).to(dtype)
    heads = head(1, dtype), head(2, dtype, **HEADS[kind])
    old, new = (by_definition(*some) for some in zip((h, h_after), heads))
    forward, reverse = kls(h, h_after, heads, "cpu")
    assert forward.dtype == reverse.dtype == torch.float64 and len(forward) == 30
    assert forward.numpy() == pytest.approx((old.exp() * (old - new)).sum(-1).numpy(), rel=near, abs=near)
    assert reverse.numpy() == pytest.approx((new.exp() * (new - old)).sum(-1).numpy(), rel=near, abs=near)
    assert min(forward.min(), reverse.min()) > 0.01 and not torch.allclose(forward, reverse, rtol=0.01)


def test_the_kl_of_a_model_to_itself_is_0():
    h = torch.randn(30, D)
    for found in kls(h, h, (head(1, torch.float32), head(1, torch.float32)), "cpu"):
        assert not found.any()


@pytest.mark.parametrize("model_type", KINDS)
def test_kls_of_models_equal_those_of_the_evaluation(model_type):
    """fastdpo.evaluation's has its own test against full logits."""
    from fastdpo.evaluation.kl import head_of, sequence_kl
    from fastdpo.explanation.capture import capture
    from fastdpo.explanation.places import find_places

    before, after = pair(model_type, **KINDS[model_type])
    seen = [capture(one, find_places(one), tiny.groups())[1] for one in (before, after)]
    heads = head_of(before), head_of(after)
    rows = Rows(tiny.groups())
    forward, reverse = kls(seen[0].hidden, seen[1].hidden, heads, "cpu")
    for found, ends in ((forward, (before, after)), (reverse, (after, before))):
        theirs = sequence_kl(*ends, tiny.groups())
        assert rows.sums(found).numpy() == pytest.approx(theirs, rel=1e-6)


# ---- numbers of rows


RANKED = [Pair(0, 1), Pair(0, 2)]


class Made:
    """Made-up states of four rows, and what is said of them."""

    def __init__(self, apart=1.0):
        groups = [tiny.group(0, 5, [9, 2]), tiny.group(1, 3, [5, 2, 3], pairs=RANKED)]
        groups += [tiny.group(row, row, [3, 7], vocab=8) for row in (2, 3)]  # tokens that come again
        self.rows, self.tokenizer = Rows(groups), tiny.tokenizer()
        M = len(self.rows.response)
        old, new = -torch.rand(2, M, dtype=torch.float64)
        self.old, self.change = old, apart * (new - old)
        self.heads = head(1), head(1)
        self.hidden = torch.randn(2, M, D, dtype=torch.float64)
        self.hidden[1] = self.hidden[0] + apart * (self.hidden[1] - self.hidden[0])
        nothing = torch.zeros(0)
        seen = lambda i, logp: Seen(self.hidden[i], nothing, nothing, logp, self.rows.cu_resp)
        self.seen = seen(0, old), seen(1, old + self.change)

    def found(self, seed=0):
        return behaviour(self.rows, *self.seen, self.heads, self.tokenizer, device="cpu", seed=seed)


def test_numbers_by_plain_loops():
    made = Made()
    found, change, old = made.found()["numbers"], made.change.tolist(), made.old.tolist()
    of = made.rows.response.tolist()
    ratio = [sum(c for c, r in zip(change, of) if r == i) for i in range(of[-1] + 1)]
    alone = [[sum(l for l, r in zip(some, of) if r == i) for i in range(of[-1] + 1)] for some in (
        old, [l + c for l, c in zip(old, change)])]  # fmt: skip
    pairs = [(0, 1), (2, 3), (2, 4), (5, 6), (7, 8)]
    mean = lambda some: sum(some) / len(some)
    expected = {
        "log_ratio/chosen": mean([ratio[w] for w, _ in pairs]),
        "log_ratio/rejected": mean([ratio[l] for _, l in pairs]),
        "margins": mean([ratio[w] - ratio[l] for w, l in pairs]),
        "accuracies": mean([ratio[w] > ratio[l] for w, l in pairs]),
    }
    for name, logp in zip(("before", "after"), alone):
        expected[f"logps/accuracies/{name}"] = mean([logp[w] > logp[l] for w, l in pairs])
        tokens = sum(of.count(w) for w in (0, 2, 5, 7))
        expected[f"perplexity/{name}"] = math.exp(-sum(logp[w] for w in (0, 2, 5, 7)) / tokens)
    dense = [by_definition(h, made.heads[0]) for h in made.hidden]
    expected["kl/forward"] = float((dense[0].exp() * (dense[0] - dense[1])).sum(-1).mean())
    expected["kl/reverse"] = float((dense[1].exp() * (dense[1] - dense[0])).sum(-1).mean())
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(expected, rel=1e-12)
    assert all(one["error"] > 0 for name, one in found.items() if "accuracies" not in name)


def test_positions_by_plain_loops():
    made = Made()
    found, rows = made.found()["by_position"], made.rows
    dense = [by_definition(h, made.heads[0]) for h in made.hidden]
    kl = (dense[1].exp() * (dense[1] - dense[0])).sum(-1).tolist()
    chosen, rejected = {0, 2, 5, 7}, {1, 3, 4, 6, 8}
    assert [(one["first"], one["last"]) for one in found] == [(1, 1), (2, 2), (3, 4), (5, 8)]
    assert sum(one["tokens"] for one in found) == len(kl)
    for one in found:
        inside = [one["first"] <= p + 1 <= one["last"] for p in rows.position.tolist()]
        here = [k for k, yes in zip(kl, inside) if yes]
        assert one["tokens"] == len(here) and one["kl"] == pytest.approx(sum(here) / len(here), rel=1e-12)
        cells = list(zip(made.change.tolist(), rows.response.tolist(), inside))
        w, l = ([c for c, r, yes in cells if yes and r in which] for which in (chosen, rejected))
        part = sum(w) / len(w) - sum(l) / len(l) if w and l else None
        assert one["margin_part"] == (part if part is None else pytest.approx(part, rel=1e-9))


def test_tokens_by_plain_loops():
    made = Made()
    target, change = made.rows.target.tolist(), made.change.tolist()
    of = {t: [c for c, one in zip(change, target) if one == t] for t in set(target)}
    often = {t: some for t, some in of.items() if len(some) >= 3}
    order = sorted(often, key=lambda t: -abs(sum(often[t])))
    found = made.found()["tokens"]
    assert len(order) > 2 and len(found) == len(order) < len(of)
    for token, one in zip(order, found):
        assert one["token"] == made.tokenizer.decode([token]) and one["count"] == len(of[token])
        assert one["total"] == pytest.approx(sum(of[token]), rel=1e-9)
        assert one["change"] == pytest.approx(sum(of[token]) / len(of[token]), rel=1e-9)


def test_kls_are_on_some_tokens_of_many(monkeypatch):
    monkeypatch.setattr(module, "KL_TOKENS", 10)
    made = Made()
    found, at = made.found(seed=4), made.rows.some_tokens(10, 4)
    dense = [by_definition(h[at], made.heads[0]) for h in made.hidden]
    kl = float((dense[1].exp() * (dense[1] - dense[0])).sum(-1).mean())
    assert found["kl_tokens"] == 10 and found["numbers"]["kl/reverse"]["value"] == pytest.approx(kl)
    assert sum(one["tokens"] for one in found["by_position"]) == 10


def test_nothing_changed():
    """No accuracy of margins that all tie, no token that changed."""
    found = Made(apart=0.0).found()
    numbers = found["numbers"]
    assert "accuracies" not in numbers and found["tokens"] == []
    for name in ("log_ratio/chosen", "log_ratio/rejected", "margins", "kl/forward", "kl/reverse"):
        assert numbers[name] == {"value": 0.0, "error": 0.0}
    assert numbers["perplexity/before"] == numbers["perplexity/after"]
    assert all(one["kl"] == one["margin_part"] == 0 for one in found["by_position"][:3])


def test_perplexity_is_exp_of_the_loss_and_its_error_to_first_order():
    found = perplexity(Estimate(2.0, 0.1))
    assert found.value == pytest.approx(math.exp(2), rel=1e-15)
    assert found.error == pytest.approx(0.1 * math.exp(2), rel=1e-15)
    assert perplexity(Estimate(800.0, None))[:2] == (math.inf, None)
