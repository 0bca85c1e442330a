"""A config of another trainer in our words, as tests look at it."""

from fastdpo.convert.convert import drafted, recognise
from fastdpo.errors import ConfigError


def translate(values: dict, *, whole: bool = True) -> tuple[dict, list[str]]:
    """(our keys and values, what became of each of theirs); `whole` as Tool.translate has it."""
    draft = drafted(values) if whole else recognise(values).translate(values, whole=False)
    if draft.problems:
        raise ConfigError(*draft.problems)
    return draft.ours, [f"read as a config of {draft.tool.name}", *draft.notes]
