"""The plan of models that see images: beside the same steps on real tensors, and processes."""

import contextlib
import io
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from rich.console import Console

from benchmarks.memory.plan_accuracy import LIMIT, cpu_cases, run
from fastdpo.config.keys import Config
from fastdpo.model.activations import set_up_activations
from fastdpo.model.spec import ModelSpec
from fastdpo.planning import command, fake_model, simulate
from fastdpo.planning.allocations import GRADIENTS, STATES, WEIGHTS
from fastdpo.planning.collectives import REPLICATE, SHARD, Ranks
from fastdpo.planning.fake_model import FakePolicy, whole_model
from fastdpo.planning.out_of_memory import explain
from fastdpo.planning.prediction import step_loads
from fastdpo.planning.ranks import rank_plans, refusal, replica_fits, taken
from fastdpo.planning.search import Planner
from fastdpo.planning.simulate import Load
from fastdpo.planning.target import Target
from fastdpo.training.job import part
from tests import images
from tests.planning.test_planning import at, in_blocks
from tests.training.test_images import inputs, made  # noqa: F401
from tests.training.test_images import run as trained

CPU, GPU = Target(is_cpu=True), Target()


def config(**keys):
    return Config(model="random", data="none", **keys)


def loads(family, keys, target=CPU, groups=None):
    groups = groups or images.groups(family)
    return step_loads(keys, images.config(family), groups, target, images.processor(family))


def sizes(family):
    """Bytes of (all weights, those of the language model) in fp32, in blocks."""
    with torch.device("meta"):
        model = whole_model(images.config(family), torch.float32)
    inside = {id(p) for part in (model.get_decoder(), model.lm_head) for p in part.parameters()}
    found = [[4 * p.numel() for p in model.parameters()]]
    return *found, [4 * p.numel() for p in model.parameters() if id(p) in inside]


@pytest.mark.parametrize("freeze", [True, False])
def test_without_images_a_tower_is_weights_and_no_more(freeze):
    """It gets no gradient, and so no states, even where it would train."""
    whole, language = sizes("llava")
    load = Load((images.group(0, "llava", [9, 5], []),), several=True)
    end = at(
        simulate.simulate(config(freeze_vision=freeze), images.config("llava"), load, CPU), "optimizer step"
    )
    assert in_blocks(*whole) <= end[WEIGHTS] < in_blocks(*whole) + 4096  # and buffers
    assert end[GRADIENTS] == in_blocks(*language)
    assert end[STATES] == in_blocks(*(2 * size for size in language))


def test_a_tower_that_trains_has_gradients_and_states():
    whole, _ = sizes("llava")
    keys = config(freeze_vision=False)
    load = replace(loads("llava", keys)[0], several=True)
    end = at(simulate.simulate(keys, images.config("llava"), load, CPU), "optimizer step")
    assert end[STATES] == in_blocks(*(2 * size for size in whole))
    assert end[GRADIENTS] == in_blocks(*whole)


class Real(contextlib.nullcontext):
    """In the place of the mode of tensors without data."""

    def __init__(self, **options):
        super().__init__()

    def from_tensor(self, tensor, static_shapes):
        return tensor


def real_policy(keys, model_config, target, mode, tracker):
    model = fake_model._trained(whole_model(model_config, torch.float32), keys).train()
    set_up_activations(model, part(ModelSpec, keys))
    policy = FakePolicy(model, keys, target)
    policy.set_sharing(True)
    return policy


TRAINED = {"freeze_vision": False, "gradient_checkpointing": True}
STEPS = [(family, {}) for family in images.FAMILIES] + [
    ("qwen2_5_vl", TRAINED),
    ("qwen3_vl", {"gradient_checkpointing": "selective"}),
    ("smolvlm", TRAINED),
    ("gemma3", {"lora_rank": 4, "freeze_vision": False}),
    ("llava", {"lora_rank": 4}),
]
REPEATED = ("qwen3_vl", "gemma3", "idefics3")  # whose features come in different shapes


@pytest.mark.parametrize("family, keys", STEPS, ids=str)
def test_a_step_without_data_allocates_what_a_real_one_does(monkeypatch, family, keys):
    """Place by place, and of layers that are run once what each of them would."""
    check(monkeypatch, family, config(**keys), images.groups(family))


@pytest.mark.parametrize("family", REPEATED)
def test_so_does_one_whose_prompts_share_an_image(monkeypatch, family):
    one = images.image(0, family=family)
    some = [images.group(row, family, [9, 8], images=(one,)) for row in range(2)]
    check(monkeypatch, family, config(), some)


def check(monkeypatch, family, keys, groups):
    (load, *_) = loads(family, keys, groups=groups)
    first, again = (simulate.simulate(keys, images.config(family), load, CPU) for _ in range(2))
    monkeypatch.setattr(simulate, "Frozen", lambda *args: None)
    monkeypatch.setattr(simulate, "FakeTensorMode", Real)
    monkeypatch.setattr(simulate, "fake_policy", real_policy)
    real = simulate.simulate(keys, images.config(family), load, CPU)
    assert first == again and [peak.where for peak in first] == [peak.where for peak in real]
    for one, other in zip(first, real):
        assert one.total == pytest.approx(other.total, rel=1e-4), one.where


@pytest.mark.parametrize("keys", [{}, {"activation_offloading": True, "freeze_vision": False}], ids=str)
def test_a_gpu_is_planned_too(keys):
    (load, *_) = loads("qwen2_5_vl", config(**keys), GPU)
    peaks = simulate.simulate(config(**keys), images.config("qwen2_5_vl"), load, GPU)
    assert peaks and load.frozen.keys() == {(512, torch.bfloat16, False)}


@pytest.mark.parametrize("case", [case for case in cpu_cases() if case["name"] == "tower"][1:2], ids=str)
def test_within_5_percent_of_a_real_process(case):
    done = run(case)
    assert abs(done["error"]) < LIMIT, done


def test_the_microbatch_with_the_most_of_images_is_looked_at():
    text = [images.group(row, "llava", [70, 60], []) for row in range(4)]
    seen = [images.group(4, "llava", [4, 3], [(32, 48)] * 2)]
    found = loads("llava", config(batch_size=1), groups=text + seen)
    assert [len(load.groups[0].images) for load in found] == [0, 2]
    assert all(load.images for load in found)
    assert found[0].batch is None and found[1].batch.images["pixel_values"].shape[0] == 2
    planner = Planner(images.config("llava"), text, CPU, processor=images.processor("llava"))
    assert planner.processor is None and not any(load.images for load in planner.loads(config()))


def test_an_image_that_prompts_share_counts_once():
    """As it is encoded; a microbatch of fewer places for images may have more to encode."""
    one = images.image(0, family="llava")
    same = [images.group(row, "llava", [9, 8], images=(one,)) for row in range(4)]
    other = [images.group(row, "llava", [3, 2]) for row in range(4, 7)]
    keys = config(batch_size=4, max_tokens=10_000)
    steps = [np.arange(4), np.arange(4, 7)]
    with patch("fastdpo.planning.prediction.epoch_steps", lambda *args: iter(steps)):
        found = loads("llava", keys, groups=same + other)
    assert [len(load.batch.images["pixel_values"]) for load in found] == [1, 3]


def test_another_family_is_planned_on_separate_rows(monkeypatch):
    monkeypatch.setattr("fastdpo.model.vision.SHARED", set())
    (load, *_) = loads("llava", config(), groups=images.groups("llava")[:1])
    assert load.batch.layout is None and len(load.batch.images["pixel_values"]) == 3
    assert simulate.simulate(config(), images.config("llava"), load, CPU)
    long, small = images.group(0, "llava", [80, 90], []), images.group(1, "llava", [2, 3])
    some = loads("llava", config(batch_size=1), groups=[long, small])
    assert any(not group.images for load in some for group in load.groups)  # words, which are as separate
    assert all(load.batch.layout is None for load in some)


def test_rows_with_images_are_not_sharded(monkeypatch):
    family, some = "llava", images.groups("llava")
    planner = Planner(images.config(family), some, GPU, processor=images.processor(family))
    assert [plan.mode for plan in rank_plans(planner, config(), Ranks(2), None)] == [REPLICATE]
    assert "images" in refusal(config(), SHARD, Ranks(2), images=True)
    assert taken(config(), Ranks(2), False, images=True)[0] == REPLICATE
    monkeypatch.setattr(Target, "here", lambda: Target(memory=1 << 20))
    assert replica_fits(config(), images.config(family), some, planner.processor).startswith("rows with imag")
    # a tower that no row uses is in shards as any weight
    assert replica_fits(config(), images.config(family), some[2:]) is False


def test_a_run_chooses_by_its_memory_and_the_command_plans_it(inputs, tmp_path):  # noqa: F811
    given = made(inputs, tmp_path / "run", "qwen2_5_vl", memory="24GB", max_steps=1, save_steps=1)
    text = trained(given)
    assert "fits in 24.0 GB" in text, text
    said = Console(file=io.StringIO(), width=100)
    assert command.plan(given, None, "cpu", said)
    text = said.file.getvalue()
    assert "of this data" in text and "microbatch" in text
    said = Console(file=io.StringIO(), width=200)
    assert command.plan(replace(given, data="none.jsonl"), None, "cpu", said)
    assert "rows of max_length without images are assumed" in said.file.getvalue()


def test_out_of_memory_tells_of_images_too():
    keys = config(freeze_vision=False)
    (load, *_) = loads("llava", keys)
    text = explain(keys, images.config("llava"), True, load.batch)
    assert "predicted for this microbatch" in text and "next:" in text
