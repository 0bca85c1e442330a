"""Other values in a model's place: a model's own ones change nothing, another's give what that one gives."""

from dataclasses import replace

import pytest
import torch

from fastdpo.data.packing import in_row_order
from fastdpo.errors import ModelError
from fastdpo.explanation.patch import Patch, patched, record, recorded
from fastdpo.explanation.places import last_bias, neurons_of
from tests import tiny
from tests.explanation.families import FAMILIES, MIXTURE, far, hooks_on, policy_of
from tests.explanation.test_places import with_lora


def parts_of(policy, max_tokens=10**6):
    return in_row_order(tiny.groups(), max_tokens, policy.share)


def the_record(policy, places, folder):
    """The record of the one pack of all groups."""
    (path,) = record(policy, places, parts_of(policy), folder)
    return recorded(path)


def everything(places):
    """The places of all neurons, shuffled."""
    torch.manual_seed(3)
    return tuple(torch.randperm(neurons_of(layer)) for layer in places.layers)


@torch.no_grad()
def states(policy, places, patch=None, **keys):
    """(the final residual [T, D], normed [T, D]) of the one pack, under a patch."""
    residual, batch = [], policy.pack(tiny.groups())
    with patched(places, Patch() if patch is None else patch, **keys):
        handle = places.norm.register_forward_pre_hook(
            lambda _, args: residual.append(args[0].flatten(0, -2))
        )
        try:
            return policy.hidden(batch), residual[-1]
        finally:
            handle.remove()


def scored(policy):
    return policy.pack(tiny.groups()).score_row


# ---- nothing, and a model's own values


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_and_own_values_leave_every_bit(family, share, tmp_path):
    policy, places = policy_of(family, share)
    before = hooks_on(policy)
    own = the_record(policy, places, tmp_path)
    batch = policy.pack(tiny.groups())
    with torch.no_grad():
        plain = policy.hidden(batch)
    with patched(places, Patch()):
        assert hooks_on(policy) == before
    whole = Patch(neurons=everything(places), embedding=True, attention=True, mlp=True)
    for patch in (Patch(), Patch(neurons=everything(places)), Patch(mlp=True), whole):
        assert torch.equal(states(policy, places, patch, recorded=own)[0], plain)
    assert hooks_on(policy) == before


# ---- another model's values


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_parts_of_another_model_give_its_residual(family, share, tmp_path):
    (before, places), (after, places_after) = policy_of(family, share), policy_of(family, share, seed=5)
    theirs = the_record(after, places_after, tmp_path)
    _, wanted = states(after, places_after)
    _, ours = states(before, places, Patch(embedding=True, attention=True, mlp=True), recorded=theirs)
    assert far(ours, wanted) <= 1e-10
    for less in (dict(embedding=False), dict(attention=False), dict(mlp=False)):
        patch = Patch(**(dict(embedding=True, attention=True, mlp=True) | less))
        assert far(states(before, places, patch, recorded=theirs)[1], wanted) > 1e-3


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_and_value_vectors_of_another_model_are_its_mlps(family, share, tmp_path):
    """At equal inputs: the embedding and the attentions are the other model's too."""
    (before, places), (after, places_after) = policy_of(family, share), policy_of(family, share, seed=5)
    theirs = the_record(after, places_after, tmp_path / "after")
    patch = Patch(neurons=everything(places), embedding=True, attention=True)
    assert far(states(before, places, patch, recorded=theirs)[1], states(after, places_after)[1]) > 1e-3
    for layer, other in zip(places.layers, places_after.layers):
        layer.last.load_state_dict(other.last.state_dict())
        if layer.post_norm is not None:
            layer.post_norm.load_state_dict(other.post_norm.state_dict())
    with patched(places, patch, recorded=theirs):
        ours = the_record(before, places, tmp_path / "before")
    for number in range(2):
        assert far(ours[f"mlp.{number}"], theirs[f"mlp.{number}"]) <= 1e-10
    assert far(states(before, places, patch, recorded=theirs)[1], states(after, places_after)[1]) <= 1e-10


@pytest.mark.parametrize("share", [True, False])
def test_some_neurons_of_another_model(share, tmp_path):
    (before, places), (after, places_after) = policy_of("llama", share), policy_of("llama", share, seed=5)
    theirs = the_record(after, places_after, tmp_path / "after")
    own = the_record(before, places, tmp_path / "before")
    which = torch.tensor([5, 90, 0])
    patch = Patch(neurons=(torch.empty(0, dtype=torch.int64), which))
    seen = []
    with patched(places, patch, recorded=theirs):
        handle = places.layers[1].last.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].flatten(0, -2))
        )
        before.hidden(before.pack(tiny.groups()))
        handle.remove()
    wanted = own["neurons.1"].clone()
    wanted[:, which] = theirs["neurons.1"][:, which]
    assert torch.equal(seen[0], wanted) and not torch.equal(wanted, own["neurons.1"])


def test_an_adapter_on_is_the_other_model_of_the_same_weights(tmp_path):
    policy, places = with_lora("llama")
    theirs = the_record(policy, places, tmp_path)
    wanted = states(policy, places)[1]
    with policy.model.disable_adapter():
        whole = Patch(embedding=True, attention=True, mlp=True)
        assert far(states(policy, places, whole, recorded=theirs)[1], wanted) <= 1e-10
        assert far(states(policy, places)[1], wanted) > 1e-3


@pytest.mark.parametrize("share", [True, False])
def test_a_mixture_has_parts_to_patch_and_no_neurons(share, tmp_path):
    (before, places), (after, places_after) = (policy_of("mixtral", share, seed=s, **MIXTURE) for s in (0, 5))
    theirs = the_record(after, places_after, tmp_path)
    assert sorted(theirs) == ["attention.0", "attention.1", "embedding", "mlp.0", "mlp.1"]
    patch = Patch(embedding=True, attention=True, mlp=True)
    assert far(states(before, places, patch, recorded=theirs)[1], states(after, places_after)[1]) <= 1e-10
    some = torch.tensor([1])
    with (
        pytest.raises(ModelError, match="mixture of experts"),
        patched(places, Patch((some, some)), recorded=theirs),
    ):
        pass


# ---- constants


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "opt"])
def test_constants_are_set_at_the_scored_rows_alone(family, share, tmp_path):
    policy, places = policy_of(family, share)
    own = the_record(policy, places, tmp_path / "own")
    which = torch.tensor([7, 0, 80])
    values = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float32)
    patch = Patch((which, which[:0]), (values, values[:0]))
    with patched(places, patch, rows=scored(policy)):
        parts = the_record(policy, places, tmp_path / "patched")
    wanted = own["neurons.0"].clone()
    for row in scored(policy).tolist():
        wanted[row, which] = values.double()
    assert torch.equal(parts["neurons.0"], wanted) and not torch.equal(wanted, own["neurons.0"])
    rest = torch.ones(len(wanted), dtype=torch.bool)
    rest[scored(policy)] = False
    assert bool(rest.any()) and torch.equal(parts["mlp.0"][rest], own["mlp.0"][rest])


def test_without_its_neurons_an_mlp_gives_its_bias(tmp_path):
    policy, places = policy_of("gpt2")
    all_of = everything(places)
    patch = Patch(all_of, tuple(torch.zeros(len(some)) for some in all_of))
    with patched(places, patch, rows=scored(policy)):
        parts = the_record(policy, places, tmp_path)
    for number, layer in enumerate(places.layers):
        got = parts[f"mlp.{number}"][scored(policy)]
        assert far(got, last_bias(layer).expand_as(got)) <= 1e-10


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_in_generation_constants_are_set_at_each_last_position(family):
    policy, places = policy_of(family)
    which, values = torch.tensor([2, 9]), torch.tensor([3.0, -3.0])
    seen, prompts = [], torch.tensor([[0, 0, 5, 6], [7, 8, 9, 10], [0, 4, 5, 6]])
    mask = (prompts != 0).long()
    with policy.stock() as model:
        say = lambda: model.generate(
            prompts, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        plain = say()
        with patched(places, Patch((which, which), (values, values))):
            handle = places.layers[1].last.register_forward_pre_hook(
                lambda _, args: seen.append(args[0].reshape(3, -1, args[0].shape[-1])[..., which])
            )
            out = say()
            handle.remove()
        assert torch.equal(say(), plain) and not torch.equal(out, plain)
    assert [part.shape[1] for part in seen] == [4, 1, 1]
    for part in seen:
        assert torch.equal(part[:, -1], values.double().expand(3, 2))
    assert not torch.isclose(seen[0][:, :-1].abs(), torch.tensor(3.0).double()).any()


# ---- hooks and faults


def test_hooks_are_off_after_an_exception(tmp_path):
    policy, places = policy_of("gemma2")
    before = hooks_on(policy)
    own = the_record(policy, places, tmp_path)
    patch = Patch(everything(places), None, True, True, True)
    with pytest.raises(ZeroDivisionError), patched(places, patch, recorded=own):
        assert hooks_on(policy) == before + 1 + 3 * 2
        raise ZeroDivisionError
    assert hooks_on(policy) == before
    with pytest.raises(ZeroDivisionError):  # inside a forward
        places.norm.register_forward_pre_hook(lambda *_: 1 / 0)
        record(policy, places, parts_of(policy), tmp_path)
    assert hooks_on(policy) == before + 1


def test_a_hook_that_does_not_run_is_a_fault(tmp_path):
    (policy, places), (_, others) = policy_of("llama"), policy_of("llama", seed=5)
    own = the_record(policy, places, tmp_path)
    with pytest.raises(ModelError, match="layer 0: the MLP was not computed"):
        with patched(places, Patch(mlp=True), recorded=own):
            pass
    wrong = replace(places, layers=(places.layers[0], others.layers[1]))
    with pytest.raises(ModelError, match="layer 1: the attention was computed 0 times in 1 forwards"):
        states(policy, wrong, Patch(attention=True), recorded=own)
    with pytest.raises(ModelError, match="layer 1: the attention was computed 0 times in 1 forwards"):
        record(policy, wrong, parts_of(policy), tmp_path)


def test_what_does_not_fit_is_named(tmp_path):
    policy, places = policy_of("llama")
    own = dict(the_record(policy, places, tmp_path))
    one, value = torch.tensor([3]), torch.zeros(1)
    rows, cut = scored(policy), {"embedding": own["embedding"][1:]}
    cases = [
        ("neurons of 1 layers, and the model has 2", Patch((one,)), {}),
        ("values of 3 layers", Patch((one, one), (value,) * 3), {}),
        ("layer 1: 1 neurons and 2 values", Patch((one, one), (value, torch.zeros(2))), {}),
        ("no record of them", Patch((one, one)), {}),
        ("no record of them", Patch(mlp=True), {}),
        ("the record has no mlp.1", Patch(mlp=True), dict(recorded={"mlp.0": own["mlp.0"]})),
        ("the record's embedding is", Patch(embedding=True), dict(recorded=cut)),
        ("neurons 3 to 96 .* layer has 96", Patch((torch.tensor([3, 96]),) * 2), dict(recorded=own)),
        ("neurons -1 to -1", Patch((torch.tensor([-1]),) * 2, (value,) * 2), dict(rows=rows)),
    ]  # fmt: skip
    before = hooks_on(policy)
    for text, patch, keys in cases:
        with pytest.raises(ModelError, match=text):
            states(policy, places, patch, **keys)
        assert hooks_on(policy) == before
