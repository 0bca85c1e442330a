"""The flags of `fastdpo explain` and their help, without what it imports when it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """
    :param data: held-out preference rows (default: those that the run evaluated on)
    :param pairs: at most so many pairs of them
    :param probe: the direction: pairs, FILE.jsonl of {"text", "label"}, or FILE.safetensors of a vector
    :param match_length: fit the probe on pairs whose longer response is the chosen one as often as not
    :param direction: where training should move the model along it (default: up for pairs, else down)
    :param plain: project on the probe as it is, as the papers do, and not through the final norm's weight
    :param groups: the paper's, v1 by how activations changed, v3 by how projections did
    :param text: given, the rows' own responses, or own, each model's own 20 greedy tokens, as the papers
    :param causes: prompts, a row of each, on which values are patched and neurons ablated; 0: none
    :param random_sets: how many sets of random neurons each control is the mean of
    :param scorer: what judges answers of the patched model: vader, length, FILE.py:function, a reward model
    :param samples: how many prompts are answered for it
    :param max_new_tokens: the longest answer
    :param force: go on with a direction that is no better than chance
    :param seed: of halves, random sets, answers, and which tokens KLs are on
    :param max_length: longest prompt + response in tokens (default: the run's, else 1024)
    :param data_format: as the key data_format (default: the run's)
    :param chat_template: as the key chat_template (default: the tokenizer's)
    :param output: default: RUN/explain, or runs/explain/NAME
    :param overwrite: replace what another command wrote there
    """

    data: str | None = None
    pairs: int = 500
    probe: str = "pairs"
    match_length: Annotated[bool, Parameter(negative=())] = False
    direction: Literal["up", "down"] | None = None
    plain: Annotated[bool, Parameter(negative=())] = False
    groups: Literal["v1", "v3"] = "v1"
    text: Literal["given", "own"] = "given"
    causes: int = 20
    random_sets: int = 3
    scorer: str | None = None
    samples: int = 16
    max_new_tokens: int = 32
    force: Annotated[bool, Parameter(negative=())] = False
    seed: int = 0
    max_length: int | None = None
    data_format: str | None = None
    chat_template: str | None = None
    output: Path | None = None
    overwrite: Annotated[bool, Parameter(negative=())] = False
