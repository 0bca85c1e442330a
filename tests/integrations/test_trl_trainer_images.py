"""Whole trainings on rows with images: stock TRL, patched, and FastDPOTrainer."""

import pytest
import trl

import fastdpo.integrations.trl as fast
from benchmarks.peers.trl_dpo import ExactTrainer, run_training
from fastdpo.errors import ConfigError
from fastdpo.integrations.trl_trainer import PromptSampler
from tests import images
from tests.integrations.test_trl_images import row
from tests.integrations.trl_runs import Run, compare, make, same

pytestmark = pytest.mark.peer


class ExactFast(ExactTrainer, fast.FastDPOTrainer):
    """Keeps exact losses."""


def rows():
    """Six, two of them about the same image and one about two."""
    says = [("a red bird", "an old cat that sees"), ("the bird", "a house"), ("one cat and a house", "two")]
    shown = [[1], [1], [2], [3, 4], [5], [6]]
    return [row(seeds, "what is it", *says[n % 3]) for n, seeds in enumerate(shown)]


def options(family):
    """What `make` takes: each call another copy of the same model."""
    made = lambda: images.model(family).train()
    given = dict(data=rows, model=made, ref_model=made, processor=lambda: images.processor(family))
    return dict(folder=None, max_length=256) | given


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl", "idefics3"])
def test_stock_numbers(family):
    stock, ours = compare(**options(family), gradient_checkpointing=True)
    assert ours.run.losses[0] == pytest.approx(stock.run.losses[0], abs=1e-5)
    assert len(set(stock.run.losses)) == len(stock.run.losses)


def test_a_lora_that_is_on_the_tower_too():
    """TRL leaves that to its users: all-linear has it in the tower."""
    peft = pytest.importorskip("peft", reason="needs peft")
    settings = peft.LoraConfig(r=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    more = lambda: {"peft_config": settings}
    learns = dict(learning_rate=2e-2, gradient_checkpointing=True)
    stock, _ = compare(**options("llava") | {"ref_model": None}, more=more, **learns)
    assert any("vision_tower" in name and "lora_" in name for name in stock.run.weights)


def fast_run(**settings):
    made = {k: v() if callable(v) else v for k, v in options("llava").items()}
    trainer = make(make_trainer=ExactFast, **made, **settings)
    return Run(run_training(trainer), trainer.state.log_history, trainer)


def test_our_trainer_leaves_the_reference_to_trl():
    """Said, and its numbers are stock's."""
    with pytest.warns(UserWarning, match="TRL takes no stored reference of rows with images") as seen:
        ours = fast_run(train_sampling_strategy="sequential")
    assert len([w for w in seen if "fastdpo" in str(w.message)]) == 1
    made = {k: v() if callable(v) else v for k, v in options("llava").items()}
    trainer = make(**made)
    same(Run(run_training(trainer), trainer.state.log_history, trainer), ours)


@pytest.mark.parametrize("cache", ["off", "cache.sqlite"])
def test_a_cache_that_is_asked_for_is_refused(cache):
    with pytest.raises(ConfigError, match="no stored reference of rows with images"):
        fast.FastDPOTrainer(None, None, None, train_dataset=rows(), reference_cache=cache)


def test_rows_of_a_prompt_and_its_images_follow_each_other():
    """Rows 0 and 1: the same words as the others, about the same image."""
    made = {k: v() if callable(v) else v for k, v in options("llava").items()}
    new = lambda *args, **kwargs: ExactFast(*args, reference_cache=None, **kwargs)
    trainer = make(make_trainer=new, **made, train_sampling_strategy="random")
    order = list(trainer._get_train_sampler())
    assert sorted(order) == list(range(6)) and abs(order.index(0) - order.index(1)) == 1
    assert type(trainer._get_train_sampler(trainer.train_dataset.select([0, 2, 3]))) is not PromptSampler


def test_a_subclass_has_arguments_of_its_own():
    class Counting(trl.DPOTrainer):
        def __init__(self, *args, extra, **kwargs):
            self.extra = extra
            super().__init__(*args, **kwargs)

    class Both(fast.FastDPOTrainer, Counting):
        pass

    made = {k: v() if callable(v) else v for k, v in options("llava").items()}
    new = lambda *args, **kwargs: Both(*args, reference_cache=None, extra=2, **kwargs)
    assert make(make_trainer=new, **made).extra == 2
