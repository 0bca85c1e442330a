"""vLLM's engine beside a stand-in that notes what it is given: weights, adapters, seeds, faults."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from rich.console import Console

from benchmarks.process import python_path
from fastdpo.config.rounds import SampleSpec
from fastdpo.distributed.world import World
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.adapters import add_lora
from fastdpo.model.loading import load_policy
from fastdpo.model.policy import Policy
from fastdpo.model.spec import ModelSpec
from fastdpo.sampling import engine_vllm
from fastdpo.sampling.calls import seed_of
from fastdpo.sampling.engine import check_engine, sample
from tests import images, tiny
from tests.ggufs import save_gguf
from tests.sampling.vllm_stand_in import install

QUIET = Console(quiet=True)
spec_of = partial(ModelSpec, max_length=64)
SPEC = SampleSpec(responses=3, max_new_tokens=6, temperature=0.7, top_p=0.9, engine="vllm")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """Installs the stand-in, where this process and others find it."""

    def installed(mode="answers"):
        package = install(tmp_path / "site", mode)
        monkeypatch.syspath_prepend(str(package.parent))
        return package

    return installed


def prompts(n=3):
    return [tiny.group(row, 3 + row, [2, 2]) for row in range(10, 10 + n)]


def answered(policy, model, tmp_path, **more):
    how = dict(spec=SPEC, seed=5, ends=[2, 7], model=model, work=tmp_path / "work", console=QUIET)
    return list(sample(policy, tiny.tokenizer(), prompts(), **(how | more)))


def noted(package):
    return json.loads((package / "noted.json").read_text())


def test_it_samples_from_the_weights_as_they_stand(base, vllm, tmp_path):
    """Changed, rounded to the compute dtype, loaded by transformers; those that train stay as they are."""
    package, model = vllm("loads"), spec_of(model=base, dtype="bf16")
    policy = load_policy(model, QUIET)
    with torch.no_grad():
        for weight in policy.trained():
            weight += 1e-3 * torch.randn_like(weight)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    config = policy.core.config.to_dict()
    assert list(answered(policy, model, tmp_path, first=3)) == []
    ((first, answers),) = answered(policy, model, tmp_path, first=1)
    told = noted(package)
    seeds = [seed_of(5, row) for row in (11, 12)]
    assert first == 1 and answers == [[[3 + seed % 90, 3 + i, 2] for i in range(3)] for seed in seeds]
    assert told["prompts"] == [prompt.prompt.tolist() for prompt in prompts()[1:]] and told["lora"] is None
    asked = dict(n=3, temperature=0.7, top_p=0.9, top_k=0, max_tokens=6, stop_token_ids=[2, 7])
    asked |= dict(detokenize=False, self=None)
    assert told["sampling"] == [asked | {"seed": seed} for seed in seeds]
    weights = str(tmp_path / "work/weights")
    assert told["llm"] == dict(
        *(noted_defaults().items(),), model=weights, tokenizer=weights, dtype="bfloat16", max_model_len=21
    )
    assert told["multiprocessing"] == "0" and told["tokens"] == len(tiny.tokenizer())
    after = policy.model.state_dict()
    assert all(
        torch.equal(after[name], value) and after[name].dtype == value.dtype for name, value in before.items()
    )
    assert policy.core.config.to_dict() == config and policy.model.training
    with torch.no_grad():
        rounded = policy.model.bfloat16().float()
        logits = rounded(input_ids=rounded.dummy_inputs["input_ids"]).logits.flatten()[:9]
    np.testing.assert_allclose(told["logits"], logits, atol=1e-5)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["vllm.log"]


def noted_defaults():
    return dict(generation_config="vllm", gpu_memory_utilization=0.9, enable_lora=False, max_lora_rank=16)


def test_a_lora_is_a_request_on_its_base(base, vllm, tmp_path):
    package, model = vllm(), spec_of(model=base, lora_rank=9)
    policy = load_policy(model, QUIET)
    answered(policy, model, tmp_path)
    told, folder = noted(package), str(tmp_path / "work/weights")
    assert told["lora"] == ["policy", 1, folder] and {
        "adapter_config.json",
        "adapter_model.safetensors",
    } < set(told["files"])
    assert told["llm"] == noted_defaults() | dict(
        model=base, tokenizer=folder, dtype="float32", max_model_len=21, enable_lora=True, max_lora_rank=16
    )


def test_the_worker_imports_nothing_heavy_and_knows_no_ranks(base, vllm, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    package, model = vllm(), spec_of(model=base)
    answered(load_policy(model, QUIET), model, tmp_path)
    told = noted(package)
    ours = {name for name in told["imported"] if name.startswith("fastdpo")}
    light = {"fastdpo", "fastdpo.moved", "fastdpo.console", "fastdpo.console.quiet", "fastdpo.sampling"}
    assert ours <= light
    assert not {"torch", "transformers"} & set(told["imported"]) and "vllm" not in sys.modules
    assert not {"RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(told["environment"])


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        (
            "raises",
            r"vLLM ended with exit code 1; the end of .*vllm.log:\n(.|\n)*No available memory for the cache",
        ),
        ("dies", r"vLLM ended by SIGABRT"),
        ("too few", r"vLLM gave 2 answers to the prompt of row 10, and 3 were asked for"),
        ("misses one", r"vLLM answered 2 prompts, and 3 were asked"),
    ],
)
def test_a_fault_of_it_is_told_and_leaves_its_log(base, vllm, tmp_path, mode, said):
    vllm(mode)
    model = spec_of(model=base)
    with pytest.raises(ModelError, match=said):
        answered(load_policy(model, QUIET), model, tmp_path)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["vllm.log"]


PARENT = """
import sys
from pathlib import Path
from types import SimpleNamespace
import torch
from rich.console import Console
from fastdpo.errors import Stopped
from fastdpo.sampling import engine_vllm
from fastdpo.training.stopping import Stopping
try:
    with Stopping(Console(quiet=True)):
        request = Path(sys.argv[1])
        request.write_text(request.read_text().replace("-1", str(__import__("os").getpid())))
        engine_vllm._run(SimpleNamespace(device=torch.device("cpu")), request, Path(sys.argv[2]))
except Stopped:
    sys.exit(7)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 7), (signal.SIGKILL, -signal.SIGKILL)])
def test_no_orphan(vllm, tmp_path, number, code):
    """The stand-in holds a pipe open as long as it lives: the pipe ends when it does."""
    package = vllm("hangs")
    os.mkfifo(package / "pipe")
    request = dict(parent=-1, llm={"model": "m"}, sampling={}, lora=None, prompts=[], answers="")
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-c", PARENT, str(tmp_path / "request.json"), str(tmp_path / "log")]
    environment = os.environ | python_path(package.parent)
    with subprocess.Popen(command, env=environment) as parent, (package / "pipe").open() as pipe:
        assert pipe.readline() == "ready\n"
        parent.send_signal(number)
        assert pipe.read() == "" and parent.wait() == code


def test_the_worker_of_a_parent_that_has_ended_does_nothing(vllm, tmp_path):
    package = vllm()
    request = dict(parent=1, llm={"model": "m"}, sampling={}, lora=None, prompts=[], answers="")
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, "-m", "fastdpo.sampling.vllm_worker", str(tmp_path / "request.json")]
    environment = os.environ | python_path(package.parent)
    assert subprocess.run(command, env=environment).returncode == 1 and not (package / "noted.json").exists()


def test_its_memory_and_gpu_are_those_beside_the_trainer(base, monkeypatch, tmp_path):
    gpu = torch.device("cuda", 1)
    policy = SimpleNamespace(device=gpu, dtype=torch.bfloat16, core=None, model=None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    asked = engine_vllm._request(policy, prompts(), SPEC, 5, [2], spec_of(model=base), tmp_path)
    assert asked["llm"]["gpu_memory_utilization"] == pytest.approx(0.9 * 30 / 80, abs=1e-3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert engine_vllm._environment(policy)["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-6")
    assert engine_vllm._environment(policy)["CUDA_VISIBLE_DEVICES"] == "GPU-6"


def test_of_several_ranks_the_first_one_runs_it(base, vllm, tmp_path):
    package, model = vllm(), spec_of(model=base)
    policy = load_policy(model, QUIET)
    ((_, want),) = answered(policy, model, tmp_path)
    (package / "noted.json").unlink()

    class Second(World):
        def told(self, make):
            return "the first one's"

    policy.world = Second(rank=1, size=2)
    assert answered(policy, model, tmp_path) == [(0, "the first one's")]
    assert want and not (package / "noted.json").exists()


def with_metadata(package, *needs):
    info = package.parent / "vllm-9.9.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.1",
        "Name: vllm",
        "Version: 9.9",
        *(f"Requires-Dist: {one}" for one in needs),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


def refusal(model, spec=SPEC, **how):
    with pytest.raises(ConfigError) as raised:
        check_engine(spec, model, **how)
    return str(raised.value)


def test_where_it_is_not_installed_the_extra_is_named(base, monkeypatch):
    monkeypatch.setattr(engine_vllm.importlib.util, "find_spec", lambda name: None)
    assert refusal(spec_of(model=base)).endswith("vllm is not installed: pip install 'fastdpo[vllm]'")
    check_engine(replace(SPEC, engine="transformers"), spec_of(model="whatever"))


def test_a_vllm_of_another_torch_is_told_with_both(base, vllm):
    with_metadata(vllm(), "torch==1.0.1", "numpy")
    said = refusal(spec_of(model=base))
    assert f"vllm 9.9 needs torch==1.0.1, and torch {torch.__version__} is installed" in said


def test_a_vllm_of_this_torch_is_taken(base, vllm):
    ours = torch.__version__.partition("+")[0]
    with_metadata(
        vllm(), f"torch=={ours}", 'torch==1.0; extra == "old"', 'torch==1.0; sys_platform == "win32"'
    )
    check_engine(SPEC, spec_of(model=base))
    check_engine(SPEC, spec_of(model=base, lora_rank=512))


def test_models_that_it_cannot_sample_are_refused_by_name(base, vllm, tmp_path):
    vllm()
    of = lambda **keys: refusal(spec_of(**({"model": base} | keys)))
    assert "takes whole weights, no shards" in refusal(spec_of(model=base), sharded=True)
    assert "4-bit" in of(load_in_4bit=True, lora_rank=4)
    assert "no images" in of(model=images.save(tmp_path / "seeing", "qwen2_vl"))
    assert "does not know use_dora of a LoRA" in of(lora_rank=4, use_dora=True)
    assert "does not know a rank above 512 of a LoRA" in of(lora_rank=513)
    gguf = save_gguf(tmp_path / "model.gguf")
    assert f"takes no LoRA on a GGUF file, and {gguf} is one" in of(model=str(gguf), lora_rank=4)
    check_engine(SPEC, spec_of(model=str(gguf)))
    policy = Policy(add_lora(tiny.policy().model, spec_of(model=base, lora_rank=4)), torch.float32)
    (lora,) = policy.model.peft_config.values()
    lora.base_model_name_or_path, lora.modules_to_save = base, ["lm_head"]
    policy.model.save_pretrained(tmp_path / "adapter")
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").modules_to_save
    assert "does not know modules_to_save of a LoRA" in of(adapter=str(tmp_path / "adapter"))
