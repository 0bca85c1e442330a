"""Where a model is read from, a folder or the hub: what is wrong with it is found at once, and told in a
sentence; and no weight starts at random."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fastdpo.console.quiet import no_bars
from fastdpo.errors import ModelError
from fastdpo.files.installed import versions
from fastdpo.files.names import is_hub_name, look_up, similar

_CONFIG, _SETTINGS = "config.json", "adapter_config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or an index of parts, named after it
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
_REMOTE = "needs code of its own (trust_remote_code), and fastdpo never runs a model's code"
_WHOLE = "give a folder that save_pretrained wrote, or a hub name"
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Source:
    """A model that is there, by its config.json at least."""

    name: str  # a folder, or a name on the hub
    label: str  # how errors about it begin
    folder: Path | None  # what is on this machine: None where it is to be downloaded
    revision: str | None = None
    offline: str = ""  # why a hub's name is read from the cache alone

    @property
    def where(self) -> str:
        """What from_pretrained reads. Offline the cache's folder: by its name it would still be asked for."""
        return str(self.folder or self.name)

    @property
    def options(self) -> dict[str, Any]:
        """from_pretrained's arguments."""
        return {"trust_remote_code": False, "revision": self.revision or "main"}


def find_source(name: str, label: str, revision: str | None = None, way_out: str = _WHOLE) -> Source:
    """Raises ModelError, which begins with the label, where there is no model of this name. The hub is asked
    once a process, and where it is out of reach its cache will do."""
    path = Path(os.path.expanduser(name))  # a user who is not known is a folder's name, and no error
    if path.exists():
        if not (path / _CONFIG).is_file():
            raise ModelError(f"{label} {_no_model(path)}")
        return Source(str(path), label, path)
    if not is_hub_name(name):
        raise ModelError(f"{label} does not exist here{similar(path) or f'; {way_out}'}")
    return _of_hub(name, label, revision)


@cache  # what is raised is not kept
def _of_hub(name: str, label: str, revision: str | None) -> Source:
    answer = look_up(name, "model", revision)
    if answer.found:
        return Source(name, label, None, revision)
    if answer.found is not None:
        raise ModelError(f"{label} {answer.why}{similar(name)}")
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, _CONFIG, revision=revision)
    if not isinstance(cached, str):
        where = "is neither a folder here nor in the hub's cache"
        way_out = similar(name) or f"; give a folder, or download it first (`hf download {name}`)"
        raise ModelError(f"{label} {where}, and {answer.why}{way_out}")
    return Source(name, label, Path(cached).parent, revision, answer.why)


def _no_model(path: Path) -> str:
    """What a path holds instead of a config.json."""
    if path.suffix.lower() == ".gguf":
        return "is a GGUF file, quantised to be run; give the model that it was made of"
    if path.is_file():
        beside = f"give its folder, {path.parent}" if (path.parent / _CONFIG).exists() else _WHOLE
        return f"is a file, not a folder; {beside}"
    inside = [found.parent for name in (_CONFIG, _SETTINGS) for found in path.glob(f"*/{name}")]
    inside += [found.parent for found in path.glob(f"snapshots/*/{_CONFIG}")]  # of the hub's cache
    if inside:
        return f"holds no {_CONFIG}; the model is in {' or '.join(map(str, sorted(inside)[:3]))}"
    if not any(path.iterdir()):
        return f"is an empty folder; {_WHOLE}"
    if any((path / name).exists() for name in ("events.jsonl", "checkpoints")):
        return "is the folder of a run that has no model yet; go on with it by --resume"
    kind = "a tokenizer and no model" if any((path / name).exists() for name in TOKENIZERS) else "no model"
    return f"holds {kind}: there is no {_CONFIG}; {_WHOLE}"


@no_bars()
def load_config(source: Source) -> PreTrainedConfig:
    """The transformers config of a causal LM. Raises ModelError."""
    try:
        kept = _stored_config(source)
        model_type = kept.get("model_type")
        if model_type is None or model_type not in CONFIG_MAPPING:
            raise ModelError(f"{source.label} {_unknown(kept)}")
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.where, **source.options)
    except ModelError:
        raise
    except Exception as error:  # whatever a broken folder makes transformers raise
        raise ModelError(f"{source.label} has a {_CONFIG} that cannot be read: {_one_line(error)}") from None
    if getattr(config, "is_encoder_decoder", False) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(f"{source.label} is of model_type {model_type}, which is no causal LM")
    reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    if reads_both_ways:
        raise ModelError(f"{source.label} is an encoder ({model_type}): it sees what follows a token")
    return config


def _stored_config(source: Source) -> dict:
    from transformers.utils import cached_file

    options = {name: value for name, value in source.options.items() if name != "trust_remote_code"}
    kept = json.loads(Path(str(cached_file(source.where, _CONFIG, **options))).read_text(encoding="utf-8"))
    if not isinstance(kept, dict):
        raise ValueError("it is no JSON object")
    return kept


def _unknown(kept: dict) -> str:
    """Why no class of transformers is for a config.json."""
    if "auto_map" in kept:
        return _REMOTE
    if "model_type" not in kept:
        return f"has a {_CONFIG} without model_type, so it is no model of transformers; {_WHOLE}"
    known = f"the installed transformers ({versions('transformers')['transformers']}) does not know"
    return f"is of model_type {kept['model_type']}, which {known}; update it"


def check_weights(source: Source) -> None:
    """Raises ModelError where the weights on this machine are not whole: said before the data is read."""
    folder = source.folder
    if folder is None:
        return
    own = _stored_config(source).get("transformers_weights")  # a file that is called otherwise
    names = [own.removesuffix(".index.json")] if isinstance(own, str) else _WEIGHTS
    name = next((n for n in names if (folder / n).exists() or (folder / f"{n}.index.json").exists()), None)
    if name is None:
        raise ModelError(f"{source.label} has no weights: no {names[0]}, nor an index of its parts")
    files = [name]
    if not (folder / name).exists():
        try:
            index = json.loads((folder / f"{name}.index.json").read_text(encoding="utf-8"))
            files = sorted(set(index["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{source.label} has a {name}.index.json that cannot be read: {error}") from None
    if missing := [file for file in files if not (folder / file).exists()]:
        count = f"{len(missing)} of the {len(files)} files of its weights"
        raise ModelError(f"{source.label} lacks {count}: {missing[0]}; copy or download it again")
    for file in files:
        if problem := damage(folder / file):
            raise ModelError(f"{source.label} has weights in {file} that {problem}")


def damage(path: Path) -> str | None:
    """What is wrong with a file of safetensors, as far as its head and its size tell."""
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            return "are a pointer of Git LFS, not the weights: run `git lfs pull` in the folder"
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"are cut short or damaged ({_one_line(error)}); copy or download them again"
    return None


@no_bars()
def load_weights(source: Source, config: PreTrainedConfig, console: Console, **options) -> Any:
    """The causal LM, every weight of which was stored. Raises ModelError."""
    if source.offline:
        text = f"{source.name}: {source.offline}; it is read from the hub's cache"
        console.print(f"[yellow]{escape(text)}", highlight=False, soft_wrap=True)
    options |= source.options | dict(output_loading_info=True, ignore_mismatched_sizes=True)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(source.where, config=config, **options)
        model, told = loaded
    except Exception as error:
        raise ModelError(f"{source.label} cannot be loaded: {_one_line(error)}") from None
    for key, stored, wanted in sorted(told["mismatched_keys"]):
        sizes = f"{key} is {list(stored)}, and by {_CONFIG} {list(wanted)}"
        raise ModelError(f"{source.label} has weights of other shapes than its {_CONFIG} says: {sizes}")
    # Who trains on it names it, as an adapter its base: not by the cache's folder on this machine.
    model.name_or_path = model.config.name_or_path = source.name
    name = type(model).__name__
    if missing := sorted(told["missing_keys"]):
        why = f"it lacks {_some(missing)}, which would start at random"
        raise ModelError(f"{source.label} is not a whole {name}: {why}")
    if unused := sorted(told["unexpected_keys"]):
        text = f"{source.name}: not a part of {name}, and left out: {_some(unused)}"
        console.print(f"[yellow]{escape(text)}", highlight=False, soft_wrap=True)
    return model


@no_bars()
def load_tokenizer(name: str, key: str, options: dict) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, or of a hub name that was looked up. Raises ModelError."""
    label, folder = f"{key}: no tokenizer in {name!r}", Path(name)
    empty = f"{label}: there is no vocabulary (tokenizer.json); copy the files of the model's tokenizer there"
    try:
        options = {"trust_remote_code": False} | options  # without a word on it transformers asks the user
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:
        if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
            raise ModelError(empty) from None
        why = f"it {_REMOTE}" if "trust_remote_code" in str(error) else _one_line(error)
        raise ModelError(f"{label}: {why}") from None
    vocabulary = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    if not vocabulary - {*tokenizer.all_special_tokens}:  # what some classes make of no file at all
        raise ModelError(empty)
    return tokenizer


def _some(names: Iterable[str]) -> str:
    """`a, b and 3 more`"""
    names = list(names)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more


def _one_line(error: Exception) -> str:
    """A library's error: its first sentence will do, for what follows are lists and ways out of its own."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:2])[:300]}"
