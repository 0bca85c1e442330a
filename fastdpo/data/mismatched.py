"""Each prompt with another row's response: what KTO takes its reference point from."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastdpo.records import PreferenceGroup, Response


def mismatched(groups: Sequence[PreferenceGroup], max_length: int) -> dict[int, PreferenceGroup]:
    """{row: its prompt with the first response of the next row of another prompt}, around the end (KTO;
    Ethayarajh et al. 2024, arXiv 2402.01306, section 4.2).

    TRL takes the row before, in a batch, whatever its prompt: where rows judge one prompt's responses one
    after the other, that is the prompt's own response. A function of the rows alone, so that the reference's
    log-probs can be cached. Responses are cut at max_length. A row has none where nothing scored is left, or
    where all rows have one prompt.
    """
    found = {}
    for group, other in zip(groups, _of_another_prompt(groups)):
        response = groups[other].responses[0]
        if np.array_equal(groups[other].prompt, group.prompt):
            continue
        scored = np.flatnonzero(response.target_mask[: max(0, max_length - len(group.prompt))])
        if len(scored):
            end = int(scored[-1]) + 1
            response = Response(response.ids[:end], response.target_mask[:end], label=response.label)
            found[group.row] = replace(group, responses=(response,), pairs=())
    return found


def _of_another_prompt(groups: Sequence[PreferenceGroup]) -> list[int]:
    """Per group, the place of the next one with another prompt (of its own, where all prompts are one)."""
    n, prompts = len(groups), [group.prompt.tobytes() for group in groups]
    after = [(i + 1) % n for i in range(n)]
    for i in [*reversed(range(n))] * 2:  # twice: a prompt's rows may go on around the end
        if prompts[after[i]] == prompts[i]:
            after[i] = after[after[i]]
    return after
