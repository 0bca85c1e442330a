"""The two models: how they are loaded and packed, and what of them stays in memory."""

import gc
import weakref

import pytest
import torch

from fastdpo.evaluation import models as of_evaluation
from fastdpo.explanation import explain as module
from fastdpo.explanation import models
from fastdpo.explanation.causes import Causes
from fastdpo.explanation.models import named_models
from fastdpo.explanation.result import Settings
from fastdpo.model.policy import Policy


def test_small_changes_of_fp32_weights_are_not_rounded_away(place, monkeypatch):
    """On a GPU, which computes in bf16, too."""
    monkeypatch.setattr(of_evaluation, "resolve_dtype", lambda name: torch.bfloat16)
    folder = place.folder
    given = Settings(str(folder / "full/model"), before=str(folder / "model"), data="rows", max_length=64)
    before, after = named_models(given)
    assert not before.spec.pure_bf16 and not after.spec.pure_bf16


@pytest.mark.parametrize("number", [0, 1])
def test_both_are_packed_alike_where_only_one_shares(place, monkeypatch, number):
    shared, calls = models.loaded, []

    def loaded(model, groups, console):
        policy = shared(model, groups, console)
        if len(calls) == number or (number == 0 and len(calls) == 2):  # before is loaded twice
            policy.set_sharing(False)
        calls.append(policy.share)
        return policy

    monkeypatch.setattr(models, "loaded", loaded)
    found = place("full", causes=2, random_sets=1)
    rows = {row["name"]: row for row in found["causes"]["rows"]}
    assert len(calls) == 3 and not all(calls)
    apart = rows["everything"]["margins"]["value"] - rows["after training"]["margins"]["value"]
    assert abs(apart) < 1e-4


@pytest.mark.parametrize("run", ["full", "lora"])
def test_no_model_is_there_when_answers_are_judged(place, monkeypatch, run):
    """A reward model may need the room."""
    made, alive, init, judge = [], [], Policy.__init__, Causes.judge

    def seen(policy, *given, **named):
        init(policy, *given, **named)
        made.append(weakref.ref(policy))

    def judging(causes, *given):
        gc.collect()
        alive.extend(one() is not None for one in made)
        return judge(causes, *given)

    monkeypatch.setattr(Policy, "__init__", seen)
    monkeypatch.setattr(Causes, "judge", judging)
    place(run, causes=2, random_sets=1, scorer="length", samples=2, max_new_tokens=2)
    assert len(alive) == (3 if run == "full" else 1) and not any(alive)


def test_states_of_tokens_go_once_they_are_compared(place, monkeypatch):
    kept, run = [], module.Explanation._causes
    look = lambda one: kept.extend((one.before.seen.hidden, one.after.seen.hidden))
    monkeypatch.setattr(module.Explanation, "_causes", lambda one, *given: (look(one), run(one, *given))[1])
    place("lora")
    assert len(kept) == 2 and not any(map(len, kept))


def test_pairs_that_cannot_be_dealt_are_told_before_any_weight_is_loaded(place, monkeypatch):
    monkeypatch.setattr(models, "loaded", None)
    with pytest.raises(Exception, match=r"match_length: of .* pairs to fit on"):
        place("lora", match_length=True, pairs=4)
