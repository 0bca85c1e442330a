"""What is read of a model that is there: config, weights and tokenizer. What is wrong with them is told in a
sentence, before anything is trained; and no weight starts at random."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.configuration_utils import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fastdpo.console.quiet import no_bars
from fastdpo.errors import ModelError
from fastdpo.files.installed import versions
from fastdpo.model import gguf_file
from fastdpo.model.finding import CONFIG, WHOLE, Source

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or an index of parts, named after it
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
_REMOTE = "needs code of its own (trust_remote_code), and fastdpo never runs a model's code"
_LFS = b"version https://git-lfs"


@no_bars()
def load_config(source: Source) -> PreTrainedConfig:
    """The transformers config of a causal LM; of a GGUF, once the whole file is known to be right. Raises
    ModelError."""
    config = _config_of_gguf(source) if source.gguf else _config_of_folder(source)
    model_type = config.model_type
    known = sees_images(config) or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    parts = [config, config.text_config] if sees_images(config) else [config]
    if not known or any(getattr(part, "is_encoder_decoder", False) for part in parts):
        raise ModelError(f"{source.label} is of model_type {model_type}, which is no causal LM")
    reads_both_ways = type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", True)
    if reads_both_ways:
        raise ModelError(f"{source.label} is an encoder ({model_type}): it sees what follows a token")
    return config


def sees_images(config) -> bool:
    """Whether it is the config of a model with a vision tower, which transformers loads whole."""
    towers = getattr(config, "vision_config", None) is not None and hasattr(config, "text_config")
    return towers and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def auto_class(config) -> Any:
    """What of transformers makes the model of a config."""
    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def as_reward_model(source: Source, config: PreTrainedConfig) -> None:
    """Makes the config of a causal LM that of a reward model on it, where it is not one already. Raises
    ModelError."""
    kind = f"of model_type {config.model_type}, which transformers has no sequence classifier of"
    kind = "a model that sees images" if sees_images(config) else kind
    kind = "a GGUF file" if source.gguf else kind
    if source.gguf or sees_images(config) or type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ModelError(f"{source.label} is {kind}; no reward model can be trained on it")
    if is_classifier(config) and config.num_labels != 1:
        kind = ", ".join(config.architectures or ())
        raise ModelError(f"{source.label} has {config.num_labels} outputs ({kind}); a reward model has one")
    config.num_labels = 1


def is_classifier(config: PreTrainedConfig) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _config_of_folder(source: Source) -> PreTrainedConfig:
    try:
        kept = _stored_config(source)
        if kept.get("model_type") not in CONFIG_MAPPING:
            raise ModelError(f"{source.label} {_unknown(kept)}")
        return AutoConfig.from_pretrained(source.where, **source.options)
    except ModelError:
        raise
    except Exception as error:  # whatever a broken folder makes transformers raise
        raise ModelError(f"{source.label} has a {CONFIG} that cannot be read: {_one_line(error)}") from None


def _config_of_gguf(source: Source) -> PreTrainedConfig:
    architecture = _header(source).architecture
    try:
        with source.reading() as (where, options):
            return AutoConfig.from_pretrained(where, **options)
    except Exception as error:  # whatever transformers raises where it knows no such model, or lacks metadata
        why = f"the installed transformers ({versions('transformers')['transformers']}) cannot read it"
        what = f"is a GGUF of the architecture {architecture}, and {why}: {_one_line(error)}"
        raise ModelError(f"{source.label} {what}") from None


def _header(source: Source) -> gguf_file.Header:
    """Of a source that is a GGUF. Raises ModelError."""
    try:
        path = source.file(str(source.gguf))
    except Exception as error:  # of a download
        raise ModelError(f"{source.label} cannot be had: {_one_line(error)}") from None
    return gguf_file.read_header(path, source.label)


def _stored_config(source: Source) -> dict:
    kept = json.loads(source.file(CONFIG).read_text(encoding="utf-8"))
    if not isinstance(kept, dict):
        raise ValueError("it is no JSON object")
    return kept


def _unknown(kept: dict) -> str:
    """Why no class of transformers is for a config.json."""
    if "auto_map" in kept:
        return _REMOTE
    if "model_type" not in kept:
        return f"has a {CONFIG} without model_type, so it is no model of transformers; {WHOLE}"
    known = f"the installed transformers ({versions('transformers')['transformers']}) does not know"
    return f"is of model_type {kept['model_type']}, which {known}; update it"


def check_weights(source: Source) -> None:
    """Raises ModelError where the weights on this machine are not whole: said before the data is read. Those
    of a GGUF were looked at for its config."""
    folder = source.folder
    if folder is None or source.gguf:
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
def load_weights(
    source: Source, config: PreTrainedConfig, console: Console, rewards: bool = False, **options
) -> Any:
    """The causal LM, every weight of which was stored; or the reward model, whose head may be new. Raises
    ModelError."""
    if source.offline:
        text = f"{source.name}: {source.offline}; it is read from the hub's cache"
        console.print(f"[yellow]{escape(text)}", highlight=False, soft_wrap=True)
    options |= dict(config=config, output_loading_info=True, ignore_mismatched_sizes=True)
    if source.gguf:
        options |= gguf_file.dequantised()
    kind = AutoModelForSequenceClassification if rewards else auto_class(config)
    new = rewards and not is_classifier(config)  # from_pretrained names the class that it makes
    try:
        with source.reading() as (where, found):
            loaded: Any = kind.from_pretrained(where, **found, **options)
        model, told = loaded
    except Exception as error:
        raise ModelError(f"{source.label} cannot be loaded: {_one_line(error)}") from None
    for key, stored, wanted in sorted(told["mismatched_keys"]):
        sizes = f"{key} is {list(stored)}, and by {CONFIG} {list(wanted)}"
        raise ModelError(f"{source.label} has weights of other shapes than its {CONFIG} says: {sizes}")
    # Who trains on it names it, as an adapter its base: not by the cache's folder on this machine.
    model.name_or_path = model.config.name_or_path = source.name
    name = type(model).__name__
    if new:
        console.print(f"{escape(source.name)}: a new head, score, starts at random by seed", soft_wrap=True)
    if missing := sorted(name for name in told["missing_keys"] if not (new and name == "score.weight")):
        why = f"it lacks {_some(missing)}, which would start at random"
        raise ModelError(f"{source.label} is not a whole {name}: {why}")
    if unused := sorted(n for n in told["unexpected_keys"] if not (new and n.startswith("lm_head."))):
        text = f"{source.name}: not a part of {name}, and left out: {_some(unused)}"
        console.print(f"[yellow]{escape(text)}", highlight=False, soft_wrap=True)
    if source.gguf and (lost := gguf_file.lost_scaling(_header(source), model.config)):
        text = f"{source.name}: transformers leaves out how it scales positions ({_some(lost)}): it is not "
        text += "quite the model that the file was made of"
        console.print(f"[yellow]{escape(text)}", highlight=False, soft_wrap=True)
    return model


@no_bars()
def load_tokenizer(found: Source, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that is there, or of a folder. Raises ModelError."""
    label, folder = f"{key}: no tokenizer in {found.name if found.gguf else found.where!r}", found.folder
    if found.gguf and not _header(found).has_vocabulary:
        raise ModelError(f"{label}: this GGUF has no vocabulary; give one that has, with the tokenizer in it")
    empty = f"{label}: there is no vocabulary (tokenizer.json); copy the files of the model's tokenizer there"
    try:
        with found.reading() as (where, options):
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(where, **options)
    except Exception as error:
        if folder and not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
            raise ModelError(empty) from None
        why = f"it {_REMOTE}" if "trust_remote_code" in str(error) else _one_line(error)
        raise ModelError(f"{label}: {why}") from None
    if found.gguf:
        tokenizer.name_or_path = found.name
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
