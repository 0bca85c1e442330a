"""Rows as a reward model reads them: at one place a response, where its sequence ends."""

from dataclasses import replace

import numpy as np

from fastdpo.data.store.stored import facts_of, made
from fastdpo.errors import DataError
from fastdpo.preferences import Groups, PreferenceGroup, Response


def read_at_end(groups: Groups, pad: int) -> Groups:
    """Each response with one token more, which is never an input, and the only scored one: what would be
    predicted from the last token of the sequence that is not `pad`, where transformers' classifiers read."""
    facts = facts_of(groups)
    n, ones = len(facts.length), np.ones_like(facts.scored)
    facts = replace(
        facts,
        length=facts.length + 1,
        first=facts.length,
        scored=ones,
        relevant=-ones,
        ref_logp=np.full(n, np.nan),
    )
    return made(lambda place: at_end(groups[place], pad), facts)


def at_end(group: PreferenceGroup, pad: int) -> PreferenceGroup:
    """The same of one group. Raises DataError where a response ends in nothing but padding."""
    return replace(group, responses=tuple(_read(group, response, pad) for response in group.responses))


def _read(group: PreferenceGroup, response: Response, pad: int) -> Response:
    spoken = np.flatnonzero(response.ids != pad)
    mask = np.zeros(len(response.ids) + 1, bool)
    mask[spoken[-1] + 1 if len(spoken) else 0] = True
    if not len(spoken) and group.prompt[-1] == pad:
        raise DataError(
            f"row {group.row}: a response and the prompt's end are padding (token {pad}), which no reward "
            "model reads; leave the row out, or give the tokenizer a pad_token of its own"
        )
    ids = np.append(response.ids, pad)
    return Response(ids, mask, response.score, label=response.label, key=response.key)
