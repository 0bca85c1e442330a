"""What is taken of one model: directions, states of texts, nearest tokens, own answers; by definition."""

import pytest
import torch

from fastdpo.explanation.look import look, nearest_tokens, state_of_texts, unit, written
from fastdpo.explanation.own import TOKENS, own_answers
from fastdpo.explanation.places import value_vectors
from fastdpo.model.policy import Policy
from fastdpo.records import PreferenceGroup
from fastdpo.sampling.generate import end_tokens
from tests import tiny
from tests.explanation.families import far, policy_of
from tests.training.test_samples import greedy, silent

QUIET = dict(max_tokens=60, console=silent())


def test_a_unit_direction_plain_and_folded():
    _, places = policy_of("llama")
    p = torch.randn(64)
    assert far(unit(places, p, plain=True), p / p.norm()) <= 1e-6
    wanted = places.norm.weight.detach() * p
    found = unit(places, p, plain=False)
    assert found.dtype == torch.float64 and far(found, wanted / wanted.norm()) <= 1e-6
    assert float(found.norm()) == pytest.approx(1, abs=1e-12)
    assert far(found, p / p.norm()) > 1e-3


def test_what_neurons_write():
    _, places = policy_of("llama")
    u = unit(places, torch.randn(64), plain=True)
    for layer, one in zip(places.layers, written(places, u), strict=True):
        vectors = layer.last.weight.detach().T
        assert far(one.q, vectors @ u) <= 1e-12 and far(one.norm, vectors.norm(dim=1)) <= 1e-12


@pytest.mark.parametrize("share", [True, False])
def test_states_of_texts(share):
    """Means over all tokens but the last, which predicts nothing; cut where they are too long."""
    tokenizer = tiny.tokenizer()
    policy, places = policy_of("llama", share, vocab_size=len(tokenizer))
    texts = ["the cat sees a dog", "a", "the old house near the tree " * 5]
    state, lengths = state_of_texts(policy, places, texts, tokenizer, 20, **QUIET, label="texts")
    assert state.shape == (3, 64)
    for text, mean, length in zip(texts, state, lengths.tolist()):
        ids = tokenizer(text)["input_ids"][:20]
        rows = max(len(ids) - 1, 1)
        with torch.no_grad(), policy.stock() as model:
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, :rows]
        assert length == rows and far(mean, hidden.mean(0)) <= 1e-5
    assert lengths.tolist()[1:] == [1, 19]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_nearest_tokens_of_neurons(family):
    tokenizer = tiny.tokenizer()
    policy, places = policy_of(family, vocab_size=len(tokenizer))
    neurons = [(1, 7), (0, 3), (1, 2), (0, 3)]
    found = nearest_tokens(policy, places, neurons, tokenizer)
    head, norm = policy.core.get_output_embeddings().weight.detach(), places.norm
    for (layer, neuron), tokens in zip(neurons, found, strict=True):
        v = value_vectors(places.layers[layer])[neuron]
        gain = 1 + norm.weight if family == "gemma2" else norm.weight
        v = gain.detach() * v
        logits = head @ (v - v.mean() if family == "gpt2" else v)
        order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[:5]
        assert tokens == [tokenizer.decode([i]) for i in order]


# ---- own answers


def model_of(tokenizer):
    torch.manual_seed(3)
    policy = tiny.policy("llama", vocab_size=len(tokenizer))
    return Policy(policy.model.eval().requires_grad_(False), torch.float32)


def prompts(tokenizer, texts):
    of = lambda text: torch.tensor(tokenizer(text)["input_ids"]).numpy()
    made = [tiny.group(row, 3, [2, 4]) for row in range(len(texts))]
    return [PreferenceGroup(g.row, of(text), g.responses, g.pairs) for g, text in zip(made, texts)]


def test_own_answers_are_greedy_and_end():
    """One of each different prompt, in the rows' order, all tokens scored."""
    tokenizer = tiny.tokenizer()
    policy = model_of(tokenizer)
    texts = ["the old red house near the tree", "a", "the cat sees a dog", "a", "no bird"]
    groups = prompts(tokenizer, texts)
    ends = end_tokens(policy, tokenizer, groups)
    found = own_answers(policy, tokenizer, groups, silent(), "before")
    assert [group.row for group in found] == [0, 1, 2, 4]
    for group in found:
        (response,) = group.responses
        assert response.target_mask.all() and not group.pairs
        wanted = greedy(policy, group.prompt, TOKENS, ends)
        assert response.ids.tolist() == list(wanted) and 1 <= len(wanted) <= TOKENS


def test_an_answer_stops_after_its_end_token():
    tokenizer = tiny.tokenizer()
    policy = model_of(tokenizer)
    groups = prompts(tokenizer, ["the cat"])
    first = own_answers(policy, tokenizer, groups, silent(), "before")[0].responses[0].ids
    assert len(first) == TOKENS
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(int(first[4]))
    cut = own_answers(policy, tokenizer, groups, silent(), "before")[0].responses[0].ids
    stop = first.tolist().index(first[4]) + 1
    assert cut.tolist() == first[:stop].tolist()


def test_a_look_at_own_answers_is_at_the_same_rows_else():
    tokenizer = tiny.tokenizer()
    policy, places = policy_of("llama", dtype=torch.float32, vocab_size=len(tokenizer))
    groups = prompts(tokenizer, ["the cat", "a dog sees"])
    given, own = (look(policy, places, groups, own=tok, label="before", **QUIET) for tok in (None, tokenizer))
    assert torch.equal(given.seen.token_logp, own.seen.token_logp)
    assert given.captured.rows == len(given.seen.token_logp)
    answers = own_answers(policy, tokenizer, groups, silent(), "before")
    assert own.captured.rows == sum(len(group.responses[0].ids) for group in answers)
    assert far(own.captured.final, given.captured.final) > 1e-3
