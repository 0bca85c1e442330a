"""Trainings on two ranks beside one process: the same run, and any number of ranks goes on with it."""

import json
import shutil
import sqlite3

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fastdpo.distributed.world import ALONE
from tests.distributed import runs
from tests.distributed.processes import Ranks
from tests.tiny import rows, save_model, write_jsonl

KINDS = {
    "dpo": dict(tie_word_embeddings=False),
    "tied": dict(tie_word_embeddings=True),
}


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Keys that all runs share, of a model by its kind."""
    folder = tmp_path_factory.mktemp("base")
    data = write_jsonl(folder / "train.jsonl", rows(26))
    eval_data = write_jsonl(folder / "eval.jsonl", rows(7, seed=1))
    shared = dict(data=data, eval_data=eval_data, learning_rate=1e-2, optim="sgd", batch_size=5)
    shared |= dict(lr_scheduler_type="constant", max_steps=20, max_length=64, max_tokens=60, logging_steps=5)
    shared |= dict(dtype="fp32", samples=1, save_steps=10, eval_steps=10, overwrite=True)
    shared |= dict(data_cache=str(folder / "tokens"), reference_cache=str(folder / "reference.sqlite"))
    models = {kind: save_model(folder / kind, **keys) for kind, keys in KINDS.items()}
    return lambda kind, **keys: shared | dict(model=models[kind]) | keys


def weights(run):
    (file,) = (run / "model").glob("*model.safetensors")
    return load_file(file)


def apart(a, b) -> float:
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def metrics(run) -> list[dict]:
    """Without what is timed, or is a machine's; and without accuracies, for at first all pairs are ties, but
    for rounding."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    left_out = ("second", "idle", "memory", "accuracies")
    return [{k: v for k, v in line.items() if not any(word in k for word in left_out)} for line in lines]


def assert_same_run(a, b, most=1e-5):
    assert apart(a, b) < most
    assert len(metrics(a)) == len(metrics(b))
    for one, other in zip(metrics(a), metrics(b)):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5), (one, other)


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The run of one process, by its kind and keys."""
    made = {}

    def run(kind, **keys):
        name = json.dumps([kind, keys], sort_keys=True)
        if name not in made:
            folder = made[name] = tmp_path_factory.mktemp("alone")
            runs.train(ALONE, base(kind, output_dir=str(folder), **keys))
        return made[name]

    return run


KTO = {"objective": "kto", "optim": "adamw_torch_fused", "learning_rate": 1e-4}
LORA = {"lora_rank": 2, "gradient_checkpointing": True}
STAGES = {"load_best": True, "stages": [{"objective": "sft", "max_steps": 6}, {"max_steps": 8}]}


@pytest.mark.parametrize(
    "kind, keys, shard",
    [
        ("dpo", {}, False),
        ("tied", {"objective": "drdpo"}, True),
        ("dpo", LORA, False),
        ("dpo", STAGES, True),
        pytest.param("dpo", {}, True, marks=pytest.mark.slow),
        pytest.param("tied", {"objective": "drdpo"}, False, marks=pytest.mark.slow),
        pytest.param("tied", KTO, False, marks=pytest.mark.slow),
        pytest.param("tied", KTO, True, marks=pytest.mark.slow),
        pytest.param("dpo", LORA, True, marks=pytest.mark.slow),
        pytest.param("dpo", STAGES, False, marks=pytest.mark.slow),
    ],
)
def test_two_ranks_end_as_one_process_does(two, base, alone, tmp_path, kind, keys, shard):
    said, silent = two(runs.train, base(kind, output_dir=str(tmp_path), shard=shard, **keys))
    assert "2 processes" in said and "a process idles" in said and not silent
    assert_same_run(tmp_path, alone(kind, **keys))
    one, other = ((run / "samples.jsonl").read_text() for run in (tmp_path, alone(kind, **keys)))
    assert one == other
    assert (tmp_path / "report.html").exists() and not list((tmp_path / "checkpoints").glob(".*"))
    if "lora_rank" not in keys:
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def interrupted(folder, to):
    """The run as it stood after its first checkpoint."""
    shutil.copytree(folder, to)
    shutil.rmtree(to / "model")
    shutil.rmtree(to / "checkpoints/step-20")
    return to


@pytest.mark.parametrize(
    "shard, split",
    [(False, False), pytest.param(True, False, marks=pytest.mark.slow), (True, True)],
)
def test_any_number_of_ranks_goes_on(two, base, alone, tmp_path, shard, split):
    keys = dict(shard=shard, optim="adamw_torch_fused", learning_rate=1e-4, samples=0)
    more = {"split_from": 0.0} if split else {}
    two(runs.train, base("tied", output_dir=str(tmp_path / "whole"), **keys), **more)
    files = {path.name for path in (tmp_path / "whole/checkpoints/step-10").iterdir()}
    assert ("weights-00001-of-00002.safetensors" in files) == split == ("weights.safetensors" not in files)
    keys |= dict(resume=True, overwrite=False)
    same = interrupted(tmp_path / "whole", tmp_path / "two")
    two(runs.train, base("tied", output_dir=str(same), **keys))
    assert apart(same, tmp_path / "whole") == 0
    assert metrics(same) == metrics(tmp_path / "whole")
    one = interrupted(tmp_path / "whole", tmp_path / "one")
    said = runs.train(ALONE, base("tied", output_dir=str(one), **keys))
    assert "the run had 2 processes, now 1" in said
    assert_same_run(one, tmp_path / "whole")
    if not split:
        first = alone("tied", **(keys | dict(shard=False, resume=False, overwrite=True)))
        begun = interrupted(first, tmp_path / "begun")
        two(runs.train, base("tied", output_dir=str(begun), **keys))
        assert_same_run(begun, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_three_ranks_go_on_with_a_run_of_two(two, base, tmp_path, shard):
    keys = dict(shard=shard, optim="adamw_torch_fused", learning_rate=1e-4, samples=0)
    two(runs.train, base("tied", output_dir=str(tmp_path / "whole"), **keys), split_from=0.0)
    begun = interrupted(tmp_path / "whole", tmp_path / "three")
    three = Ranks(3)
    keys |= dict(resume=True, overwrite=False)
    said, *_ = three(runs.train, base("tied", output_dir=str(begun), **keys))
    three.close()
    assert "the run had 2 processes, now 3" in said
    assert_same_run(begun, tmp_path / "whole")


def stored(path) -> set:
    """The packs of a reference cache."""
    with sqlite3.connect(path) as db:
        return set(db.execute("SELECT keys, lengths, logps FROM packs"))


@pytest.mark.parametrize("shard", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_ranks_fill_the_reference_with_the_bits_of_one(two, base, tmp_path, shard):
    ours, theirs = (str(tmp_path / name) for name in ("two.sqlite", "one.sqlite"))
    two(runs.fill, base("dpo", reference_cache=ours, shard=shard))
    runs.fill(ALONE, base("dpo", reference_cache=theirs))
    assert len(stored(ours)) > 3 and stored(ours) == stored(theirs)
    said = runs.train(ALONE, base("dpo", reference_cache=ours, output_dir=str(tmp_path / "run"), max_steps=1))
    assert "nothing to compute" in said
