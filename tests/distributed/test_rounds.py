"""Rounds on two ranks beside one process: the same samples, and but for rounding the same weights."""

import pytest

from fastdpo.distributed.world import ALONE
from tests.distributed import runs
from tests.distributed.processes import Ranks
from tests.distributed.test_runs import apart, metrics
from tests.training.round_runs import SAMPLE, inputs_in, lines_of


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    inputs = inputs_in(tmp_path_factory.mktemp("inputs"))
    shared = dict(rounds=2, sample=SAMPLE | dict(resets=0.5), learning_rate=1e-2, optim="sgd", batch_size=4)
    shared |= dict(max_length=64, max_tokens=120, logging_steps=1, dtype="fp32", samples=0, eval_data=0.2)
    return inputs | shared


def small_calls(world, function, *args):
    """Two prompts a call of the engine, so that each rank has some."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdpo.sampling.engine.ON_CPU", 6)
        return function(world, *args)


LORA = dict(lora_rank=2, objective="kto", reference="start")


@pytest.mark.parametrize("keys, shard", [(LORA, False), ({}, True)])
def test_two_ranks_sample_the_same_and_end_as_one_process(two, base, tmp_path, keys, shard):
    for name, call, some in (("two", two, dict(shard=shard)), ("one", lambda f, *a: f(ALONE, *a), {})):
        call(small_calls, runs.train, base | keys | some | dict(output_dir=str(tmp_path / name)))
    for number in (1, 2):
        one, other = (lines_of(tmp_path / f"{name}/rounds/round-{number}.jsonl") for name in ("one", "two"))
        assert [line | dict(key="", digest="") for line in one] == [
            line | dict(key="", digest="") for line in other
        ]
    assert apart(tmp_path / "one", tmp_path / "two") < 1e-5
    for one, other in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
