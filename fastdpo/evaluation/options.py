"""The flags of `fastdpo eval` and their help, without what it imports when it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """
    :param reference: what it is compared with (default: what it was trained from, where that is known)
    :param versus: another model, tested against this one on the same rows and prompts
    :param objective: whose loss and rewards (default: the run's, else sigmoid)
    :param beta: the objective's (default: the run's, else the objective's own)
    :param samples: how many prompts are answered (default: none; with a scorer 100)
    :param per_prompt: answers to each
    :param max_new_tokens: the longest answer
    :param seed: of the answers
    :param scorer: what judges answers: vader, length, FILE.py:function, or a reward model
    :param max_length: longest prompt + response in tokens (default: the run's, else 1024)
    :param data_format: as the key data_format (default: the run's)
    :param chat_template: as the key chat_template (default: the tokenizer's)
    :param output: default: RUN/eval, or runs/eval/NAME
    :param overwrite: replace an evaluation of other settings
    """

    reference: str | None = None
    versus: str | None = None
    objective: str | None = None
    beta: float | None = None
    samples: int | None = None
    per_prompt: int = 1
    max_new_tokens: int = 128
    seed: int = 0
    scorer: str | None = None
    max_length: int | None = None
    data_format: str | None = None
    chat_template: str | None = None
    output: Path | None = None
    overwrite: Annotated[bool, Parameter(negative=())] = False
