"""Shell scripts as configs: the command in them that trains, its flags and its file, read and never run."""

import math
import re
from pathlib import Path

from fastdpo.config.reading import read_yaml
from fastdpo.convert.draft import Unresolved, plain
from fastdpo.convert.files.words import Script
from fastdpo.errors import ConfigError

_TRAINERS = {  # the words of a command -> what it says by itself
    r"swift rlhf|\S*swift[./]cli[./]rlhf(\.py)?": {"rlhf_type": "dpo"},
    r"openrlhf\.cli\.train_dpo|(\S*/)?train_dpo(_llama)?\.py": {},
    r"openrlhf\.cli\.train_kto|(\S*/)?train_kto(_llama)?\.py": {"label_key": "label"},
    r"(llamafactory|llmtuner)-cli train|(\S*/)?(src/train|train_bash)\.py": {},
    r"trl dpo": {},
    r"trl kto|(\S*/)?(run_)?kto\w*\.py": {"loss_type": "kto"},
    r"(\S*/)?(run_)?orpo\w*\.py": {"loss_type": "orpo"},
    r"(\S*/)?(run_)?(dpo|cpo|simpo)\w*\.py": {},
    r"axolotl train|axolotl\.cli\.train": {},
}
_NO_FLAG = "what it means in the script's command is not known; give keys as flags, and one file"
_COMMANDS = "swift rlhf, openrlhf.cli.train_dpo, llamafactory-cli train, trl dpo, axolotl train, run_dpo.py"


def read_script(path: Path) -> dict:
    """The keys of the one command in a shell script that trains on preferences, with num_processes where its
    launcher says on how many devices. Raises ConfigError."""
    try:
        script = Script(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    found: list[tuple[str | None, dict, dict]] = []
    for words in script.commands:
        if (command := _command(words)) and command not in found:
            found.append(command)
    if len(found) != 1:
        said = "none is there" if not found else f"there are {len(found)}, give each a file of its own"
        raise ConfigError(f"{path}: one command that trains is needed, as {_COMMANDS}; {said}")
    file, own, flags = found[0]
    return own | (_beside(path, file) if file else {}) | flags


def _command(words: list[str]) -> tuple[str | None, dict, dict] | None:
    """(its file, what it says by itself, its flags) of a command that trains."""
    for at, word in enumerate(words if words[0] not in ("echo", "printf") else []):
        for length in (1, 2):
            said = " ".join([Path(word).name if length == 2 else word, *words[at + 1 : at + length]])
            own = next((own for names, own in _TRAINERS.items() if re.fullmatch(names, said)), None)
            if own is not None and said.count(" ") == length - 1:
                file, flags = _flags(words[at + length :])
                return file, own | _devices(words[:at]) | _of_swift(own, words[:at]), flags
    return None


def _devices(words: list[str]) -> dict:
    """How many a launcher starts: NPROC_PER_NODE=4, --num_processes 8, --nproc-per-node=2 --nnodes 2."""
    text = " ".join(words).replace("-", "_")
    say = lambda names: re.findall(rf"(?<!\S)(?:{names})[= ]([\d,]+)(?!\S)", text)[-1:]
    counts = say("__num_processes|__nproc_per_node|__num_gpus|NPROC_PER_NODE") + say("__nnodes|NNODES")
    gpus = [one.count(",") + 1 for one in re.findall(r"__include[= ]localhost:([\d,]+)", text)]
    return {"num_processes": math.prod([*map(int, counts), *gpus])} if counts or gpus else {}


def _of_swift(own: dict, words: list[str]) -> dict:
    """What ms-swift takes from the environment."""
    said = [word for word in words if word.startswith("MAX_PIXELS=")] if "rlhf_type" in own else []
    values = [_like(word, word.partition("=")[2]) for word in said[-1:]]
    return {"MAX_PIXELS": _value(values)} if values else {}


def _flags(words: list[str]) -> tuple[str | None, dict]:
    """(its file, keys and values) of `FILE --key value --key=value --switch --key some values key=value`."""
    given: dict[str, list[str]] = {}
    file, values = None, None
    for word in words:
        key, is_said, value = word.partition("=")
        if re.match("--[A-Za-z]", word):
            values = given[key[2:].replace("-", "_")] = [_like(word, value)] if is_said else []
        elif values is not None and not (values and file is None and re.search(r"\.ya?ml$", word)):
            values.append(word)
        elif re.search(r"\.(ya?ml|json)$", word):
            file = word
        elif is_said and key.isidentifier():  # LLaMA-Factory's way
            given[key] = [_like(word, value)]
        else:
            raise ConfigError(f"{word}: {_NO_FLAG}")
    files = given.pop("config", []) + [file] * bool(file)
    if len(files) > 1:
        raise ConfigError(f"{files[1]}: {_NO_FLAG}")
    return next(iter(files), None), {key: _value(values) for key, values in given.items()}


def _like(word: str, text: str) -> str:
    return Unresolved(text) if isinstance(word, Unresolved) else text


def _value(words: list[str]):
    if any(isinstance(word, Unresolved) for word in words):
        return Unresolved(" ".join(words))
    values = [word if word == "" else plain(word) for word in words]
    return values if len(values) > 1 else values[0] if values else True


def _beside(script: Path, file: str) -> dict:
    """The config file of a script's command, from where the script lies or from here."""
    if isinstance(file, Unresolved):
        raise ConfigError(f"{script}: the config file is {file}, which only running it would tell; give it")
    places = [folder / file for folder in (*script.resolve().parents, Path())]
    there = next((place for place in places if place.is_file()), None)
    if there is None:
        raise ConfigError(f"{script}: its config file {file} is not there, nor from a folder above; give it")
    return read_yaml(there)
