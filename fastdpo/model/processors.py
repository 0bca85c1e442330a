"""transformers' processors, which make an image's pixels and tokens: loaded and saved, and where no video is
read."""

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from transformers import (
    PROCESSOR_MAPPING,
    AutoFeatureExtractor,
    AutoImageProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.processing_auto import processor_class_from_name

from fastdpo.errors import ModelError
from fastdpo.model.adapters import find_start
from fastdpo.model.finding import Source
from fastdpo.model.source import load_config, sees_images
from fastdpo.model.spec import ModelSpec

_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_OLD_TEMPLATE = "chat_template.json"  # beside a tokenizer that has none
_KINDS: dict[str, Any] = {"image_processor": AutoImageProcessor, "feature_extractor": AutoFeatureExtractor}
_NEEDS = {"pillow": "PIL", "num2words": "num2words"}
# what a processor was read from: its own save_pretrained would leave out the video processor
_stored: WeakKeyDictionary[ProcessorMixin, dict[str, bytes]] = WeakKeyDictionary()


@cache
def without_video(cls: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """This class of processors, which may be made with `video_processor=None`: its own needs torchvision."""

    def check(self, name, argument):
        if name != "video_processor" or argument is not None:
            return cls.check_argument_for_proper_class(self, name, argument)

    def save(self, save_directory, **kwargs):  # its own would save the one that is not there
        if (
            getattr(self, "video_processor", None) is not None
            or "video_processor" not in self.get_attributes()
        ):
            return cls.save_pretrained(self, save_directory, **kwargs)
        self.tokenizer.save_pretrained(save_directory)
        kept = {name: value for name, value in json.loads(self.to_json_string()).items() if value is not None}
        Path(save_directory, _FILES[0]).write_text(json.dumps(kept, indent=2), encoding="utf-8")

    def reduce(self, protocol):  # by the class that can be imported: other processes tokenise rows
        return _again, (cls, vars(self))

    names: dict[str, Any] = {
        "check_argument_for_proper_class": check,
        "save_pretrained": save,
        "__reduce_ex__": reduce,
    }
    names["__module__"] = cls.__module__
    return type(cls.__name__, (cls,), names)


def _again(cls: type[ProcessorMixin], state: dict[str, Any]) -> ProcessorMixin:
    made = object.__new__(without_video(cast(Any, cls)))
    vars(made).update(state)
    return made


def load_processor(spec: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin | None:
    """The processor of a model that sees images, on this very tokenizer and with its chat template; None for
    a model that does not, and for one without a processor's files. Raises ModelError."""
    start = find_start(spec)
    config = load_config(start.source())
    if not sees_images(config):
        return None
    for found in dict.fromkeys((start.tokenizer, start.source())):  # beside an adapter, or else the model's
        if files := stored_files(found):
            break
    else:
        return None
    try:
        with found.reading() as (where, options):
            cls: Any = _class_of(files, config)
            kept, given = cls.get_processor_dict(where, **options)
            made = [_part(name, tokenizer, where, options) for name in cls.get_attributes()]
            processor: ProcessorMixin = without_video(cls).from_args_and_dict(made, kept, **given)
    except ImportError as error:
        lacks = [name for name, module in _NEEDS.items() if importlib.util.find_spec(module) is None]
        way_out = "pip install 'fastdpo[vision]'" if lacks else str(error).strip().splitlines()[0]
        what = lacks[0] if lacks else "a package that is not here"
        raise ModelError(f"model: the processor in {found.name} needs {what}: {way_out}") from None
    except Exception as error:  # whatever a broken folder makes transformers raise
        why = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        raise ModelError(f"model: the processor in {found.name} cannot be loaded: {why}") from None
    processor.chat_template = tokenizer.chat_template
    _stored[processor] = files
    return processor


def _class_of(files: dict[str, bytes], config) -> Any:
    for name in _FILES:
        named = json.loads(files.get(name, b"{}")).get("processor_class")
        if named and (cls := processor_class_from_name(named)):
            return cls
    return cast(Any, PROCESSOR_MAPPING)[type(config)]


def _part(name: str, tokenizer: PreTrainedTokenizerBase, where: str, options: dict[str, Any]) -> Any:
    """An argument of a processor's class."""
    if name == "tokenizer":
        return tokenizer
    return None if name == "video_processor" else _KINDS[name].from_pretrained(where, **options)


def stored_files(found: Source) -> dict[str, bytes]:
    """The files of a processor, where there is one. Raises ModelError where nobody can tell: the hub fails,
    or is out of reach and its cache, which may hold only a part of the model, has none."""
    if found.gguf:
        return {}
    files = {name: text for name in _FILES if (text := found.content(name)) is not None}
    if found.offline and not files and not all(_is_known_to_lack(found, name) for name in _FILES):
        raise ModelError(
            f"{found.label}: its processor is not in the hub's cache, and {found.offline}; "
            f"give {found.folder} if the model has none, or download it first (`hf download {found.name}`)"
        )
    return files


def _is_known_to_lack(found: Source, name: str) -> bool:
    """Whether the hub once said that a model has no such file."""
    return try_to_load_from_cache(found.name, name, revision=found.revision) is _CACHED_NO_EXIST


def template_beside(found: Source) -> str | None:
    """A processor's chat template of before tokenizers had those."""
    text = None if found.gguf else found.content(_OLD_TEMPLATE)
    return None if text is None else json.loads(text).get("chat_template")


def save_processor(processor: ProcessorMixin, folder: Path | str) -> None:
    """Writes it beside its tokenizer, which has its chat template."""
    if processor in _stored:
        write_files(_stored[processor], folder)
    else:
        processor.save_pretrained(folder)


def write_files(files: dict[str, bytes], folder: Path | str) -> None:
    for name, text in files.items():
        Path(folder, name).write_bytes(text)
