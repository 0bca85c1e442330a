"""The config as people write it: a YAML file, command-line flags, `--help`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from fastdpo.config.keys import FIELDS, TYPES, Config, coerce
from fastdpo.errors import ConfigError


def load_config(argv: Sequence[str]) -> Config:
    """`[FILE.yaml] [--key value | --key=value]...` -> Config; flags win over the file.

    Keys of TRL, Axolotl and LLaMA-Factory are translated, and said. Raises ConfigError for an unreadable
    file, an unknown key (naming the nearest) or a wrong type.
    """
    argv = list(argv)
    values = read_yaml(Path(argv.pop(0))) if argv and not argv[0].startswith("-") else {}
    values = _in_our_words(values) | _in_our_words(_parse_flags(argv), whole=False)
    return Config(**{name: coerce(name, value) for name, value in values.items()})


def _in_our_words(values: dict, whole: bool = True) -> dict:
    """The same, with the keys of other trainers (see habits.py) as ours; says what it made of them."""
    if all(name in FIELDS for name in values):
        return values
    from fastdpo.convert.convert import translate

    values, notes = translate(values, whole=whole)
    for note in notes:
        print(note, file=sys.stderr)
    return values


class _UniqueKeys(yaml.SafeLoader):
    """yaml.safe_load that refuses a key given twice, where YAML would silently keep the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.YAMLError(f"the key {twice[0]!r} is given twice (line {node.start_mark.line + 1} on)")
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """A file of `key: value` lines. Raises ConfigError."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected lines of `key: value`, got a {type(values).__name__}")
    return values


def _parse_flags(argv: list[str]) -> dict:
    values = {}
    while argv:
        flag = argv.pop(0)
        if not flag.startswith("--"):
            raise ConfigError(f"unexpected argument {flag!r}: keys are given as --key value")
        name, equals, value = flag[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            bare = not argv or argv[0].startswith("--")
            if bare and TYPES.get(name) is not bool and name in FIELDS:
                raise ConfigError(f"--{name}: no value given")
            value = "true" if bare else argv.pop(0)
        values[name] = value
    return values


def help_text(command: str) -> str:
    """`fastdpo COMMAND --help`: every key with its default, from the fields above."""
    lines = [f"usage: fastdpo {command} [CONFIG.yaml] [--key value ...]", "", "keys:"]
    for name, f in FIELDS.items():
        default = "" if f.default in (None, "") else f" [{to_word(f.default)}]"
        lines.append(f"  {name}{default}")
        lines.append(f"      {f.metadata['doc']}")
    return "\n".join(lines)


def keys_table() -> str:
    """The README's table of keys, as Markdown."""
    lines = ["| key | default | |", "|---|---|---|"]
    for name, f in FIELDS.items():
        default = "" if f.default in (None, "") else f"`{to_word(f.default)}`"
        lines.append(f"| `{name}` | {default} | {f.metadata['doc'].replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def to_word(value) -> str:
    """A default as one would write it in YAML or after a flag."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, readable by `load_config`; how it was started is no part of it."""
    values = dataclasses.asdict(config)
    kept = {name: value for name, value in values.items() if name not in ("resume", "overwrite")}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
