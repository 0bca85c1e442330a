"""The keys of a config as flags of a command, each with its help, and what was given as a Config."""

import functools
import inspect
import re
from pathlib import Path
from typing import Annotated

from cyclopts import UNSET, Group, Parameter

from fastdpo.config.keys import FIELDS, GROUPS, Config
from fastdpo.config.reading import default_word
from fastdpo.errors import ConfigError

UNEXPECTED = "unexpected argument {!r}: keys are given as --key value"


def with_values(argv: list[str]) -> list[str]:
    """`--key -x` as `--key=-x`: a value may start with a dash."""
    out: list[str] = []
    for word in argv:
        if out and re.fullmatch("--[^=]+", out[-1]) and re.match("-[^-]", word) and word != "-h":
            out[-1] += f"={word}"
        else:
            out.append(word)
    return out


def _texts(kind, tokens) -> list[str | None]:
    """What a flag was given, each time; None where it was bare."""
    if isinstance(tokens, dict):
        raise ConfigError(f"a key has no dots in it: .{next(iter(tokens))}")
    for token in tokens:
        if token.index > 0:
            raise ConfigError(UNEXPECTED.format(token.value))
    return [token.value if token.implicit_value is UNSET else None for token in tokens]


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
    about = Parameter(help="a YAML file of keys; flags win over it", show_default=False)
    file = Annotated[Path, about]
    first = inspect.Parameter("config_yaml", inspect.Parameter.POSITIONAL_ONLY, default=None, annotation=file)
    own = list(inspect.signature(command).parameters.values())[1:]

    def run(config_yaml=None, /, **flags):
        options = {param.name: flags.pop(param.name) for param in own if param.name in flags}
        return command(config_of(config_yaml, flags), **options)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature([first, *own, *_key_flags()])  # type: ignore[attr-defined]
    return run


def config_of(file: Path | None, flags: dict[str, list[str | None]]) -> Config:
    """Flags win over the file; keys of other trainers are translated in both, and said. Raises
    ConfigError."""
    from fastdpo.convert import convert

    given = {}
    for name, texts in flags.items():
        name, text = name.replace("-", "_"), texts[-1] if texts else None
        if text is None and name in FIELDS and FIELDS[name].type is not bool:
            raise ConfigError(f"--{name}: no value given")
        given[name] = "true" if text is None else text  # a key of others may be a switch, too
    return convert.config_of(convert.read(file) if file else {}, given)
