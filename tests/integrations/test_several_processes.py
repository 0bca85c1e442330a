"""The drop-ins under DDP, FSDP2 and ZeRO-2, two processes each: TRL's and LLaMA-Factory's numbers.

DeepSpeed computes on a CPU too, and is no part of this environment; its tests skip without it. They were run
with DeepSpeed 0.19.8 so:

    DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed==0.19.8
    python -m pytest tests/integrations/test_several_processes.py -k zero2

and LLaMA-Factory's in the environment of test_llama_factory.py.
"""

import importlib.util

import pytest

from tests.integrations.wrappers import hold, launch, results
from tests.tiny import save_model

pytestmark = pytest.mark.peer
has = lambda package: importlib.util.find_spec(package) is not None
needs_deepspeed = pytest.mark.skipif(not has("deepspeed"), reason="needs DeepSpeed, which is for GPUs")
needs_llama_factory = pytest.mark.skipif(
    not has("llamafactory"), reason="needs LLaMA-Factory, whose pins exclude this environment's"
)
needs_trl = pytest.mark.skipif(has("llamafactory"), reason="TRL is the one that LLaMA-Factory pins here")
ZERO_2 = pytest.param("zero2", marks=needs_deepspeed)
# `opt`: a final norm where accelerate does not find it; `saved`: LoRA with a trained lm_head. Both leave the
# lm_head in an FSDP2 group of its own, which is sharded when we read it.
CASES = ("tied", "lora", "opt", "silent", "cache")
MORE = ("untied", "saved", "accumulation", "trainer")
LLAMA_FACTORY = ("full", "orpo", "lora", "lora on the lm_head", "lm_head trained")


@pytest.fixture
def models(tmp_path):
    save_model(tmp_path / "tied", tie_word_embeddings=True)
    save_model(tmp_path / "untied", tie_word_embeddings=False)
    save_model(tmp_path / "opt", "opt", tie_word_embeddings=False)
    return tmp_path


def refused(root, wrapper: str) -> None:
    for one in results(root, wrapper, "cache"):
        assert "its fill needs whole weights on each device" in one["refused"]
        assert "reference_cache=None, and TRL computes the reference" in one["refused"]


@needs_trl
def test_trl_under_ddp(models):
    launch("several_processes", models, "ddp", *CASES)
    runs = {case: hold(models, "ddp", case) for case in CASES}
    assert len(runs["tied"]["heads"]) == 2 * len(runs["cache"]["heads"]) == 6  # no reference in the steps


@needs_trl
def test_trl_under_fsdp2(models):
    """`repeats`: processes whose first batches hold unlike numbers of rows, and `silent`: one has nothing to
    score there. Each check of our log-probs runs forwards, in which the processes wait for one another."""
    launch("several_processes", models, "fsdp2", *CASES, "repeats", "bf16")
    for case in (*CASES[:-1], "repeats"):
        assert len(hold(models, "fsdp2", case)["heads"]) == 6
    hold(models, "fsdp2", "bf16", tolerance=2e-2)
    refused(models, "fsdp2")


@needs_trl
@needs_deepspeed
def test_trl_under_zero2(models):
    launch("several_processes", models, "zero2", *CASES, "repeats")
    for case in (*CASES[:-1], "repeats"):
        hold(models, "zero2", case)
    refused(models, "zero2")


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", ZERO_2])
def test_more_of_trl(models, wrapper):
    launch("several_processes", models, wrapper, *MORE)
    for case in MORE:
        hold(models, wrapper, case)


@needs_llama_factory
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", ZERO_2])
def test_llama_factory(tmp_path, wrapper):
    from tests.integrations.test_llama_factory import write_inputs

    write_inputs(tmp_path)
    save_model(tmp_path / "tied", tie_word_embeddings=True)
    launch("llama_factory_processes", tmp_path, wrapper, *LLAMA_FACTORY)
    for case in LLAMA_FACTORY:
        hold(tmp_path, wrapper, case)
