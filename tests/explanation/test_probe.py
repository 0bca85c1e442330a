"""The probe: scikit-learn's coefficients, planted directions, intervals, lengths, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastdpo.errors import ConfigError, DataError, ModelError
from fastdpo.explanation import probe
from fastdpo.explanation.probe import (
    correlation,
    fit,
    from_labels,
    from_vector,
    read_labels,
    read_vector,
    wilson,
)

# ---- fit


def from_pairs(state, pairs, prompt, lengths, seed, match_length):
    return probe.from_pairs(state, probe.deal(pairs, prompt, lengths, seed, match_length), lengths)


def features(seed, n, D):
    """Of the test's own: one column much larger than the others, one off its centre."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, D))
    x[:, 0] *= 40.0
    x[:, 1] += 3.0
    y = (x @ np.linspace(-1, 1, D) / 5 + draw.standard_normal(n) > 0.3).astype(int)
    return torch.from_numpy(x), torch.from_numpy(y)


# Coefficients by scikit-learn 1.9.1's LogisticRegression(C=C, solver="newton-cholesky", tol=1e-12) of
# features(seed, n, D); its solver="lbfgs", tol=1e-10 gives the same to 5e-7.
TALL = "-0.30873074 -0.59613176 0.38613095 0.79827759 0.43995403 0.68091623 0.34121016 0.82085626"
WIDE = "-0.4093344 0.04728336 -0.06086509 0.00055293 0.01966225 0.04063944 0.0179722 -0.00657168 0.03109567 "
WIDE += "-0.06535776 -0.01727731 -0.05740081 -0.08279434 -0.06771685 0.01550614 0.03557252 -0.0106003 "
WIDE += "0.00622519 0.04241378 -0.01144555"
STORED = [(7, 60, 8, 1.0, 0.39212243, TALL), (8, 12, 20, 0.5, -3.07415516, WIDE)]


@pytest.mark.parametrize(("seed", "n", "D", "C", "intercept", "coefficients"), STORED, ids=["tall", "wide"])
def test_scikit_learn_s_coefficients(seed, n, D, C, intercept, coefficients):
    before = torch.get_rng_state()
    w, b = fit(*features(seed, n, D), C=C)
    assert w.dtype == torch.float64 and torch.equal(torch.get_rng_state(), before)
    np.testing.assert_allclose(w.numpy(), [float(c) for c in coefficients.split()], rtol=0, atol=1e-6)
    assert b == pytest.approx(intercept, abs=1e-6)


@pytest.mark.parametrize(("n", "D"), [(200, 30), (30, 200)])
def test_the_gradient_is_zero_where_it_stops(n, D):
    """With features as different in size as hidden states are."""
    x, y = features(3, n, D)
    x[:, 2] *= 1000
    w, b = fit(x, y, C=2.0)
    w.requires_grad_()
    bias = torch.tensor(b, dtype=torch.float64, requires_grad=True)
    signs = 2.0 * y - 1
    loss = w.square().sum() / 2 + 2.0 * torch.log1p(torch.exp(-signs * (x @ w + bias))).sum()
    grads = torch.autograd.grad(loss, (w, bias))
    assert float(grads[0].abs().max()) < 1e-6 * float(x.abs().max()) and abs(float(grads[1])) < 1e-8


def test_a_planted_direction_is_found():
    draw = torch.Generator().manual_seed(0)
    u = torch.randn(48, generator=draw)
    u /= u.norm()
    labels = torch.arange(4000) % 2
    x = torch.randn(4000, 48, generator=draw) + 3 * (labels[:, None] - 0.5) * u
    w, _ = fit(x, labels)
    assert float(w @ u.double() / w.norm()) > 0.99
    w, _ = fit(x, 1 - labels)
    assert float(w @ u.double() / w.norm()) < -0.99  # it points to label 1


def test_what_cannot_be_fitted():
    x, y = features(0, 20, 4)
    with pytest.raises(DataError, match="20 rows of label 0, 0 of label 1, 0 of others; rows of both"):
        fit(x, torch.zeros(20))
    with pytest.raises(DataError, match="1 of others"):
        fit(x, y.index_fill(0, torch.tensor([3]), 2))
    with pytest.raises(DataError, match=r"features of \(20, 4\), labels of \(19,\); a row of features"):
        fit(x, y[1:])
    x[5, 2] = float("nan")
    with pytest.raises(DataError, match="the features of row 5 are not finite"):
        fit(x, y)
    x[5, 2] = 0
    with pytest.raises(ModelError, match="20 rows of 4 features did not converge in 1 steps; give more rows"):
        fit(x, y, max_iter=1)


# ---- intervals


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [
        # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (10, 10, 10 / (10 + 1.959964**2), 1.0),  # of all: n / (n + z^2), by hand
    ],
)
def test_wilson_s_interval(successes, n, low, high):
    assert wilson(successes, n) == pytest.approx((low, high), abs=5e-5)


def test_an_interval_of_nothing_is_everything():
    assert wilson(0, 0) == (0.0, 1.0)


def test_an_interval_is_mirrored_and_of_shares_that_no_count_has():
    low, high = wilson(3.5, 9)
    assert wilson(5.5, 9) == pytest.approx((1 - high, 1 - low))
    # its ends solve (share - p)^2 = z^2 p (1 - p) / n
    for end in (low, high):
        assert (3.5 / 9 - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / 9, abs=1e-6)


# ---- pairs


def planted(prompts=60, each=2, strength=4.0, seed=0, D=16):
    """(state, pairs, prompt, lengths): `each` pairs a prompt, chosen ahead along the first axis."""
    draw, n = torch.Generator().manual_seed(seed), prompts * each
    state = torch.randn(2 * n, D, generator=draw)
    pairs = torch.arange(2 * n).reshape(n, 2)
    state[pairs[:, 0], 0] += strength
    prompt = torch.arange(prompts).repeat_interleave(2 * each)
    return state, pairs, prompt, torch.randint(5, 40, (2 * n,), generator=draw)


def test_pairs_give_a_direction_that_others_confirm():
    before = torch.get_rng_state()
    found = from_pairs(*planted(), seed=0, match_length=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.kind == "pairs" and found.found and found.p is not None
    assert float(found.p[0] / found.p.norm()) > 0.8 and found.p.dtype == torch.float64
    assert found.tested == 30 and found.used == 120  # prompts; responses of the others
    assert found.interval == pytest.approx(wilson(found.accuracy * 30, 30)) and found.accuracy > 0.9
    assert abs(found.length_correlation) < 0.3


def test_it_is_fitted_on_half_of_the_prompts_and_tested_on_the_other():
    """Of noise in many dimensions all that was fitted on would be told apart, and nothing else."""
    found = from_pairs(*planted(strength=0.0, D=400), seed=0, match_length=False)
    assert not found.found and 0.3 < found.accuracy < 0.7 and found.interval[0] < 0.5 < found.interval[1]


def test_the_seed_deals_the_prompts():
    rows = planted(strength=1.0)
    first, again, other = (from_pairs(*rows, seed=seed, match_length=False) for seed in (1, 1, 2))
    assert torch.equal(first.p, again.p) and first.accuracy == again.accuracy
    assert not torch.equal(first.p, other.p)


def test_more_pairs_of_a_prompt_make_the_interval_no_narrower():
    few, many = (from_pairs(*planted(each=n), seed=0, match_length=False) for n in (1, 8))
    assert few.tested == many.tested == 30


def test_a_response_of_several_pairs_is_fitted_on_once():
    """A ranked row: its best response beats each of the others."""
    state, _, _, lengths = planted(prompts=30, each=2)
    best = torch.arange(0, 120, 4).repeat_interleave(3)
    pairs = torch.stack([best, best + torch.tensor([1, 2, 3] * 30)], 1)
    found = from_pairs(state, pairs, torch.arange(120) // 4, lengths, seed=0, match_length=False)
    assert found.used == 15 * 4


def test_ties_count_half():
    state, pairs, prompt, lengths = planted()
    state[:, 1:] = 0
    state[:, 0] = (pairs.flatten() % 2 == 0).float()
    labels = from_pairs(state, pairs, prompt, lengths, seed=0, match_length=False)
    assert labels.accuracy == 1
    dealt = torch.from_numpy(np.random.default_rng(0).permutation(60))
    for number in dealt[30:]:  # the tested ones
        state[prompt == number] = 0
    tied = from_pairs(state, pairs, prompt, lengths, seed=0, match_length=False)
    assert tied.accuracy == 0.5 and not tied.found and tied.p is not None
    assert tied.length_correlation is None  # nothing varies


def by_length(n=200, seed=0):
    """States say the length and nothing else; nine of ten chosen are the longer ones."""
    draw = np.random.default_rng(seed)
    longer, shorter = draw.integers(20, 40, n), draw.integers(10, 20, n)
    chosen = np.where(np.arange(n) % 10 > 0, longer, shorter)
    lengths = torch.from_numpy(np.stack([chosen, longer + shorter - chosen], 1).reshape(-1))
    noise = torch.from_numpy(draw.standard_normal((2 * n, 6)))
    noise[:, 0] = lengths.log() * 5
    return noise, torch.arange(2 * n).reshape(n, 2), torch.arange(n).repeat_interleave(2), lengths


def test_a_direction_that_is_length_is_told_and_matching_removes_it():
    rows = by_length()
    plain, matched = (from_pairs(*rows, seed=0, match_length=match) for match in (False, True))
    assert plain.found and plain.length_correlation > 0.9
    axis = lambda one: float(one.p[0].abs() / one.p.norm())
    assert axis(matched) < 0.25 * axis(plain) and not matched.found
    assert matched.used < plain.used / 3


def test_matching_needs_pairs_of_both_kinds():
    state, pairs, prompt, lengths = by_length()
    lengths = lengths.reshape(-1, 2).sort(1, descending=True).values.reshape(-1)
    with pytest.raises(ConfigError) as caught:
        from_pairs(state, pairs, prompt, lengths, seed=0, match_length=True)
    expected = "match_length: of 100 pairs to fit on, 100 with the longer chosen, only 0 can be matched"
    assert expected in str(caught.value) and "give more rows, or leave it out" in str(caught.value)


def test_one_prompt_is_not_enough():
    state, pairs, prompt, lengths = planted()
    message = "probe: pairs of 1 prompts; half of them .* give more rows with --data, or --probe"
    with pytest.raises(ConfigError, match=message):
        from_pairs(state, pairs, 0 * prompt, lengths, seed=0, match_length=False)
    with pytest.raises(ConfigError, match="pairs of 0 prompts"):
        from_pairs(state, pairs[:0], prompt, lengths, seed=0, match_length=False)


def test_correlation():
    x = torch.arange(9.0).double()
    assert correlation(x, 3 - 2 * x) == pytest.approx(-1)
    assert correlation(x, torch.ones(9).double()) is None
    expected = float(np.corrcoef(x.numpy(), x.numpy() ** 3)[0, 1])
    assert correlation(x, x**3) == pytest.approx(expected)


# ---- labels


def labelled(n, rare, strength, seed=0):
    draw = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % rare == 0).long()
    state = torch.randn(n, 8, generator=draw)
    state[:, 0] += strength * labels
    return state, labels, torch.randint(5, 40, (n,), generator=draw)


def test_labels_give_a_direction():
    found = from_labels(*labelled(200, 2, 6.0), seed=0)
    assert found.kind == "labels" and found.found and found.accuracy > 0.9
    assert (found.used, found.tested) == (100, 100)
    assert found.interval == pytest.approx(wilson(found.accuracy * 100, 100))


def test_a_rare_label_does_not_make_chance_look_good():
    """Saying 0 to all would be right on 95 %."""
    found = from_labels(*labelled(400, 20, 0.0), seed=0)
    assert not found.found and found.accuracy < 0.7 and found.interval[0] < 0.5
    assert found.tested == 200  # 10 and 190: an interval of 38 trials
    assert found.interval == pytest.approx(wilson(found.accuracy * 38, 38))


def test_a_label_of_one_text():
    with pytest.raises(DataError, match="39 texts of label 0 and 1 of label 1; half of each"):
        from_labels(*labelled(40, 40, 1.0), seed=0)


def lines(n=20):
    return [json.dumps({"text": f"text {i}", "label": i % 2}) for i in range(n)]


def test_a_labelled_file(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join([*lines(), "", '{"text": "é", "label": true, "more": 1}', ""]), "utf-8")
    rows = read_labels(path)
    assert rows[:2] == [("text 0", 0), ("text 1", 1)] and rows[-1] == ("é", 1) and len(rows) == 21


WRONG = {
    "{": r"line 3 is not JSON \(.*a line is \{\"text\": \"\.\.\.\", \"label\": 0 or 1\}",
    "[1]": "line 3 is no object",
    '{"label": 1}': "line 3 has no 'text'",
    '{"text": "a"}': "line 3 has no 'label'",
    '{"text": 3, "label": 1}': "the text of .*line 3 is empty or no text",
    '{"text": " ", "label": 1}': "the text of .*line 3 is empty or no text",
    '{"text": "a", "label": 2}': "the label of .*line 3 is '2'",
    '{"text": "a", "label": "1"}': "the label of .*line 3 is '1'",
    '{"text": "a", "label": null}': "the label of .*line 3 is 'None'",
    '{"text": "a", "label": NaN}': "the label of .*line 3 is 'nan'",
    "\udcff": "line 3 is not UTF-8",
}


@pytest.mark.parametrize("line", WRONG, ids=ascii)
def test_lines_that_are_none(tmp_path, line):
    path = tmp_path / "labels.jsonl"
    text = "\n".join([*lines(2), line, *lines()])
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=WRONG[line]):
        read_labels(path)


def test_too_few_lines_or_labels(tmp_path):
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(lines(19)))
    with pytest.raises(DataError, match="10 lines of label 0 and 9 of label 1; it needs 20 lines at least"):
        read_labels(path)
    path.write_text("\n".join([lines()[0]] * 30 + [lines()[1]]))
    with pytest.raises(DataError, match=r"30 lines of label 0 and 1 of label 1; .* two of each label"):
        read_labels(path)
    with pytest.raises(DataError, match=r"probe: cannot read .*absent.jsonl: No such file"):
        read_labels(tmp_path / "absent.jsonl")


# ---- vectors


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_a_vector_of_a_file(tmp_path, shape):
    save_file({"p": torch.tensor([1.0, -2, 0, 0.5]).reshape(shape).half()}, tmp_path / "v.safetensors")
    vector = read_vector(tmp_path / "v.safetensors", 4)
    assert vector.dtype == torch.float64 and vector.tolist() == [1, -2, 0, 0.5]
    direction = from_vector(tmp_path / "v.safetensors", 4)
    assert (direction.kind, direction.found, direction.accuracy) == ("vector", True, None)
    assert torch.equal(direction.p, vector)


VECTORS = {
    "width": ({"p": torch.ones(5)}, r"p of .* is of shape \[5\], the model's states are \[4\]; give a dir"),
    "matrix": ({"p": torch.ones(4, 4)}, r"is of shape \[4, 4\], the model's states are \[4\]"),
    "two": ({"p": torch.ones(4), "q": torch.ones(4)}, r"has 2 tensors: p, q; it needs one, of \[4\]"),
    "none": ({}, r"has no tensor; it needs one, of \[4\]"),
    "nan": ({"p": torch.tensor([1, 2, float("nan"), 0])}, "p of .* is nan at 2; it needs finite numbers"),
    "zero": ({"p": torch.zeros(4)}, "p of .* is 0 everywhere, which is no direction"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_that_are_refused(tmp_path, name):
    tensors, message = VECTORS[name]
    save_file(tensors, tmp_path / "v.safetensors")
    with pytest.raises(ConfigError, match=message):
        read_vector(tmp_path / "v.safetensors", 4)


def test_a_file_that_is_no_vector(tmp_path):
    (tmp_path / "v.safetensors").write_text("no")
    for name in ("v.safetensors", "absent"):
        with pytest.raises(ConfigError, match=f"probe: cannot read .*{name} as safetensors"):
            read_vector(tmp_path / name, 4)


def test_folds_are_dealt_to_the_pairs_that_are_left():
    _, pairs, prompt, lengths = by_length()
    for seed in range(6):
        cut = probe.deal(pairs, prompt, lengths, seed, match_length=True)
        assert len(cut.fold) == len(cut.fitted)
        assert sorted(cut.fold.unique().tolist()) in ([0], [0, 1, 2, 3])
        by_prompt = {}
        for fold, number in zip(cut.fold.tolist(), prompt[cut.fitted[:, 0]].tolist()):
            assert by_prompt.setdefault(number, fold) == fold
