"""Samples by vLLM, in a process of its own that has the weights as they stand and ends once it has answered:
no weight is synchronised, no CUDA context shared, and vLLM is never imported here."""

import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.version import Version
from rich.console import Console
from rich.markup import escape

from fastdpo.config.rounds import SampleSpec
from fastdpo.errors import ConfigError, ModelError
from fastdpo.model.adapters import find_start
from fastdpo.model.policy import Policy
from fastdpo.model.saving import save_copy
from fastdpo.model.source import load_config, sees_images
from fastdpo.model.spec import ModelSpec
from fastdpo.records import PreferenceGroup
from fastdpo.sampling.calls import seed_of, until_end

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's values of max_lora_rank
SHARE = 0.9  # of the GPU memory that is free beside the trainer; the rest is CUDA's, and what is not foreseen
TAIL = 20  # lines of vLLM's log that an error shows
# Of torchrun: with them vLLM would take itself for a rank.
_OF_RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK"}
_OF_RANKS |= {"MASTER_ADDR", "MASTER_PORT"}


def check(model: ModelSpec, sharded: bool) -> None:
    """Raises ConfigError where vLLM is not here, needs another torch, or cannot sample such a model."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("sample: engine: vllm is not installed: pip install 'fastdpo[vllm]'")
    _check_torch()
    if sharded:
        raise ConfigError(
            "sample: engine: vllm takes whole weights, no shards: shard: false, or transformers"
        )
    start = find_start(model)
    found = start.source()
    config = load_config(found)
    if model.load_in_4bit or getattr(config, "quantization_config", None):
        raise ConfigError(
            "sample: engine: vllm knows no such 4-bit weights as these train; take transformers"
        )
    if sees_images(config):
        raise ConfigError("sample: engine: vllm is given token ids and no images; take transformers")
    if start.adapter is None and model.lora_rank is None:
        return
    if found.gguf:
        raise ConfigError(
            f"sample: engine: vllm takes no LoRA on a GGUF file, and {model.model} is one; give the "
            "model that it was made of, or take transformers"
        )
    settings = start.settings
    rank = model.lora_rank or settings.get("r", 0)
    refused = {
        "use_dora": model.use_dora or settings.get("use_dora"),
        "modules_to_save": settings.get("modules_to_save"),
        "rank_pattern": settings.get("rank_pattern"),  # it takes one rank and one factor for all modules
        "alpha_pattern": settings.get("alpha_pattern"),
        "lora_bias": settings.get("lora_bias"),
        f"a rank above {RANKS[-1]}": rank > RANKS[-1],
    }
    for name in filter(refused.get, refused):
        raise ConfigError(f"sample: engine: vllm does not know {name} of a LoRA; take transformers")


def _check_torch() -> None:
    try:
        ours, needed = version("vllm"), requires("vllm") or []
    except PackageNotFoundError:  # a folder of sources: it may fit
        return
    for need in map(Requirement, needed):
        applies = need.marker is None or need.marker.evaluate({"extra": ""})
        installed = Version(torch.__version__).public
        if need.name == "torch" and applies and not need.specifier.contains(installed, prereleases=True):
            raise ConfigError(
                f"sample: engine: vllm {ours} needs torch{need.specifier}, and torch {torch.__version__} is "
                "installed; in an environment of its own, pip install 'fastdpo[vllm]' brings those that fit"
            )


def sample(
    policy: Policy,
    tokenizer,
    prompts: Sequence[PreferenceGroup],
    spec: SampleSpec,
    seed: int,
    ends: list[int],
    model: ModelSpec,
    work: Path,
    console: Console,
) -> list[list[list[int]]]:
    """The ids of each answer to each prompt; see `engine.sample`. On one rank. Raises ModelError with the end
    of vLLM's log, which stays in `work`; the weights and what was asked do not."""
    weights, request, found = work / "weights", work / "request.json", work / "answers.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    leftovers = weights, request, found
    _remove(*leftovers)  # of a run that was killed
    try:
        save_copy(policy, tokenizer, weights)
        asked = _request(policy, prompts, spec, seed, ends, model, weights) | {"answers": str(found)}
        request.write_text(json.dumps(asked), encoding="utf-8")
        log = work / "vllm.log"
        said = f"sampling {len(prompts):,} x {spec.responses} answers by vLLM; it writes {log}"
        console.print(escape(said), highlight=False, soft_wrap=True)
        _run(policy, request, log)
        lines = found.read_text(encoding="utf-8").splitlines() if found.exists() else []
    finally:
        _remove(*leftovers)
    made = [[until_end(ids, ends) for ids in json.loads(line)] for line in lines]
    for prompt, some in zip(prompts, made):
        if len(some) != spec.responses or not all(some):
            raise ModelError(
                f"sampling: vLLM gave {sum(map(bool, some))} answers to the prompt of row {prompt.row}, and "
                f"{spec.responses} were asked for; its log is {log}"
            )
    if len(made) != len(prompts):
        raise ModelError(
            f"sampling: vLLM answered {len(made)} prompts, and {len(prompts)} were asked; its log is {log}"
        )
    return made


def _request(
    policy: Policy,
    prompts: Sequence[PreferenceGroup],
    spec: SampleSpec,
    seed: int,
    ends: list[int],
    model: ModelSpec,
    weights: Path,
) -> dict[str, Any]:
    """What vllm_worker reads, but for the file that it answers in."""
    folder = str(weights.resolve())
    longest = max(len(prompt.prompt) for prompt in prompts) + spec.max_new_tokens
    llm: dict[str, Any] = dict(model=folder, tokenizer=folder, max_model_len=longest)
    llm |= dict(dtype=str(policy.dtype).removeprefix("torch."), generation_config="vllm")
    if policy.device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(policy.device)
        llm["gpu_memory_utilization"] = round(SHARE * free / total, 3)
    has_lora = policy.core is not policy.model
    if has_lora:
        (lora,) = policy.model.peft_config.values()
        rank = max(lora.r, *(lora.rank_pattern or {}).values(), 0)
        base = find_start(model).source().where
        llm |= dict(model=base, enable_lora=True, max_lora_rank=next(r for r in RANKS if r >= rank))
    sampling: dict[str, Any] = dict(n=spec.responses, temperature=spec.temperature, top_p=spec.top_p)
    sampling |= dict(max_tokens=spec.max_new_tokens, stop_token_ids=ends, detokenize=False)
    asked = [{"ids": p.prompt.tolist(), "seed": seed_of(seed, p.row)} for p in prompts]
    lora_folder = folder if has_lora else None
    return dict(parent=os.getpid(), llm=llm, sampling=sampling, lora=lora_folder, prompts=asked)


def _run(policy: Policy, request: Path, log: Path) -> None:
    """Waits for the worker, which ends in any case: with an exception here, and when this process ends."""
    command = [sys.executable, "-P", "-m", "fastdpo.sampling.vllm_worker", str(request)]
    with log.open("wb") as said:
        worker = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            env=_environment(policy),
            start_new_session=True,
        )
        try:
            code = worker.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)  # and what it may have started
            worker.wait()
    if code:
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:])
        raise ModelError(f"sampling: vLLM ended {ended}; the end of {log}:\n{tail}")


def _environment(policy: Policy) -> dict[str, str]:
    """This one's without torchrun's, with all that can be imported here, and the policy's GPU alone."""
    out = {
        name: value
        for name, value in os.environ.items()
        if name not in _OF_RANKS and not name.startswith("TORCHELASTIC_")
    }
    out["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
    if policy.device.type == "cuda":
        visible = [name for name in out.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        index = policy.device.index or 0
        out["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return out


def _remove(*paths: Path) -> None:
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
