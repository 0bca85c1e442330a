"""The keys of a config as flags of a command, each with its help, and what was given as a Config."""

import functools
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import UNSET, Group, Parameter

from fastdpo.config.keys import FIELDS, Config
from fastdpo.config.reading import GROUPS, default_word
from fastdpo.errors import ConfigError

UNEXPECTED = "unexpected argument {!r}: keys are given as --key value"


def with_values(argv: list[str]) -> list[str]:
    """`--key -x` as `--key=-x`: a value may start with a dash. Raises ConfigError for --a beside --a.b."""
    out: list[str] = []
    for word in argv:
        if out and re.fullmatch("--[^=]+", out[-1]) and re.match("-[^-]", word) and word != "-h":
            out[-1] += f"={word}"
        else:
            out.append(word)
    names = {re.split("[.=]", word)[0] for word in out if re.match(r"--[^=]+\.", word)}
    if twice := [word for word in out if word.partition("=")[0] in names]:
        raise ConfigError(f"{twice[0]}: given as a whole and with dots; give one of them")
    return out


def _texts(kind, tokens):
    """What a flag was given, each time: its values, none where it was bare. With dots in it, by its parts."""
    if isinstance(tokens, dict):
        return {name: _texts(kind, inner) for name, inner in tokens.items()}
    times: list[list[str]] = []
    for token in tokens:
        if token.index == 0:
            times.append([])
        if token.implicit_value is UNSET:
            times[-1].append(token.value)
    return times


# a flag may come bare, and again: the last one counts
_VALUE = Parameter(converter=_texts, consume_multiple=True, n_tokens=1, allow_repeating=True, metavar="VALUE")


@functools.cache
def _key_flags() -> list[inspect.Parameter]:
    """Each key as a flag under its heading; what is no key of ours may be another trainer's."""
    out = []
    for place, (heading, names) in enumerate(GROUPS.items()):
        group = Group(heading, sort_key=place)
        for name in names:
            word = default_word(name)
            shown = (lambda value, word=word: word) if word else False
            flag = Parameter(group=group, help=FIELDS[name].metadata["doc"], show_default=shown)
            kind = Annotated[list[str], _VALUE, flag]
            out.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    others = Annotated[list[str], _VALUE, Parameter(show=False)]
    return [*out, inspect.Parameter("others", inspect.Parameter.VAR_KEYWORD, annotation=others)]


def takes_keys(command):
    """command(config, *, its own flags) as `[CONFIG_YAML] [--key value ...]`."""
    about = Parameter(
        help="a YAML file of keys, or another trainer's config; flags win over it", show_default=False
    )
    first = inspect.Parameter(
        "config_yaml", inspect.Parameter.POSITIONAL_ONLY, default=None, annotation=Annotated[Path, about]
    )
    same = Parameter(help="the same as CONFIG_YAML", show_default=False)
    named = inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[Path, same]
    )
    own = list(inspect.signature(command).parameters.values())[1:]

    def run(config_yaml=None, /, *, config=None, **flags):
        if config_yaml and config:
            raise ConfigError(f"--config: a config is given already, {config_yaml}; give one of them")
        options = {param.name: flags.pop(param.name) for param in own if param.name in flags}
        return command(config_of(config_yaml or config, flags), **options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([first, named, *own, *_key_flags()])  # type: ignore[attr-defined]
    return run


def config_of(file: Path | None, flags: dict) -> Config:
    """Flags win over the file; keys of other trainers are translated in both, and said. Raises
    ConfigError."""
    from fastdpo.convert import convert

    given = {name: _value(name, times) for name, times in _by_name(flags)}
    return convert.config_of(convert.read(file) if file else {}, given)


def _by_name(flags: dict, before: str = "") -> Iterator[tuple[str, list[list[str]]]]:
    for name, times in flags.items():
        name = before + name.replace("-", "_")
        if isinstance(times, dict):
            yield from _by_name(times, f"{name}.")
        else:
            yield name, times


def _value(name: str, times: list[list[str]]):
    """What a flag says: of a key of ours as text, of another trainer's the value, which may be several, or
    null. The last time counts, but for `ignore`."""
    from fastdpo.convert.draft import plain

    times = times or [[]]  # a bare key of ours
    texts = [text for some in times for text in some] if name == "ignore" else times[-1]
    kinds = typing.get_args(FIELDS[name].type) if name in FIELDS else ()
    takes_several = name not in FIELDS or any(typing.get_origin(kind) is list for kind in kinds)
    odd = [text for text in texts[1:] if not takes_several or text.endswith((".yaml", ".yml"))]
    if odd:
        raise ConfigError(UNEXPECTED.format(odd[0]))
    if not texts:
        if name in FIELDS and FIELDS[name].type is not bool and name != "push_to_hub":
            raise ConfigError(f"--{name}: no value given")
        return "true"  # a key of others may be a switch, too
    if len(texts) > 1:
        return texts if name in FIELDS else [plain(text) for text in texts]
    return None if name not in FIELDS and texts[0] in ("", "null", "~") else texts[0]
