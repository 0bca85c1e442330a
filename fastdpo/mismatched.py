"""Each prompt with another row's response: what KTO takes its reference point from."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fastdpo.records import PreferenceGroup


def mismatched(groups: Sequence[PreferenceGroup], max_length: int) -> dict[int, PreferenceGroup]:
    """{row: its prompt with the first response of the next row} (the last row takes the first's), as TRL
    pairs them within a batch (KTO; Ethayarajh et al. 2024, arXiv 2402.01306, section 4.2).

    A function of the rows alone, so that the reference's log-probs can be cached. Responses are cut at
    max_length; where nothing scored is left, the row has none.
    """
    found = {}
    for i, group in enumerate(groups):
        response = groups[(i + 1) % len(groups)].responses[0]
        scored = np.flatnonzero(response.target_mask[: max(0, max_length - len(group.prompt))])
        if len(scored):
            end = int(scored[-1]) + 1
            other = replace(
                response,
                ids=response.ids[:end],
                target_mask=response.target_mask[:end],
                score=None,
                ref_logp=None,
                token_weight=None,
            )
            found[group.row] = replace(group, responses=(other,), pairs=())
    return found
