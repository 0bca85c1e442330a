"""Each prompt with another row's response: what KTO takes its reference point from."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np

from fastdpo.data.store.digests import BYTES
from fastdpo.data.store.facts import HASH, Facts
from fastdpo.data.store.stored import facts_of, made, taken
from fastdpo.preferences import Groups, PreferenceGroup, Response

_AT_ONCE = 1 << 16  # rows


def mismatched(groups: Groups, max_length: int) -> Groups:
    """Each prompt with the first response of the next row of another prompt, around the end (KTO; Ethayarajh
    et al. 2024, arXiv 2402.01306, section 4.2), in the order of their rows, made when they are asked for.

    TRL takes the row before, in a batch, whatever its prompt: where rows judge one prompt's responses one
    after the other, that is the prompt's own response. A function of the rows alone, so that the reference's
    log-probs can be cached. Responses are cut at max_length. A row has none where nothing scored is left, or
    where all rows have one prompt.
    """
    facts = facts_of(groups)
    other, room = _of_another_prompt(facts), np.maximum(0, max_length - facts.prompt)
    has_one = facts.prompt_key[other] != facts.prompt_key
    has_one &= facts.first[facts.cu_resp[other]] < room
    places = np.argsort(facts.row, kind="stable")
    places = places[has_one[places]]
    other = other[places]
    first = facts.cu_resp[other]  # the responses taken
    ends, scored = _cut(facts, first, room[places], lambda n: groups[other[n]].responses[0].target_mask)
    keys = _keys(facts.prompt_key[places], facts.prompt_key[other], facts.key[first], ends)

    def make(number: int) -> PreferenceGroup:
        response, end = groups[other[number]].responses[0], ends[number]
        ids, mask, key = response.ids[:end], response.target_mask[:end], keys[number].tobytes()
        response = Response(ids, mask, label=response.label, key=key)
        return replace(groups[places[number]], responses=(response,), pairs=())

    always = lambda value: np.broadcast_to(value, len(places))  # takes no memory
    of_them = Facts(
        row=facts.row[places],
        prompt=facts.prompt[places],
        largest=np.maximum(facts.largest[places], facts.largest[other]),
        whole=facts.whole[places],
        digest=always(np.zeros(1, HASH)),  # nobody asks what else they say
        trained=always(np.zeros(1, HASH)),
        prompt_key=facts.prompt_key[places],
        images=facts.images[places],
        image_tokens=facts.image_tokens[places],
        cu_resp=np.arange(len(places) + 1),
        length=ends,
        scored=scored,
        first=facts.first[first],
        relevant=always(np.int32(-1)),
        key=keys,
        score=always(np.nan),
        ref_logp=always(np.nan),
        label=facts.label[first],
        cu_pairs=np.broadcast_to(0, len(places) + 1),
        pairs=facts.pairs[:0],
        offset=facts.offset[:0],
        weight=facts.weight[:0],
    )
    return made(make, of_them)


def beside(some: Groups, rows: Sequence[int] | np.ndarray) -> Groups:
    """Those of the mismatched groups that are of these rows."""
    known, wanted = facts_of(some).row, np.asarray(rows, np.int64)
    at = np.searchsorted(known, wanted)
    found = at < len(known)
    found[found] = known[at[found]] == wanted[found]
    return taken(some, at[found])


def _cut(
    facts: Facts, responses: np.ndarray, room: np.ndarray, mask_of: Callable[[int], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens up to the last one in the room that is scored, how many of them are scored), i32[n] each. Masks
    are read where a response is cut that has gaps in them."""
    length, scored, first = facts.length[responses], facts.scored[responses], facts.first[responses]
    is_cut = room < length
    ends = np.where(is_cut, room, length).astype(np.int32)
    of_ends = np.where(is_cut, ends - first, scored).astype(np.int32)
    for number in np.flatnonzero(is_cut & (scored < length - first)).tolist():
        seen = np.flatnonzero(mask_of(number)[: ends[number]])
        ends[number], of_ends[number] = seen[-1] + 1, len(seen)
    return ends, of_ends


def _keys(*parts: np.ndarray) -> np.ndarray:
    """V16[n]: what the reference knows them by, made of keys and numbers alone: no tokens are read."""
    keys = np.empty(len(parts[0]), HASH)
    for start in range(0, len(keys), _AT_ONCE):
        some = [np.ascontiguousarray(part[start : start + _AT_ONCE]) for part in parts]
        wide = np.concatenate([part.view("u1").reshape(len(part), part.itemsize) for part in some], 1)
        digests = b"".join(blake2b(row, digest_size=BYTES).digest() for row in wide)
        keys[start : start + _AT_ONCE] = np.frombuffer(digests, HASH)
    return keys


def _of_another_prompt(facts: Facts) -> np.ndarray:
    """Per group, the place of the next one with another prompt (any, where all prompts are one)."""
    key, n = facts.prompt_key, len(facts)
    ends = np.flatnonzero(key != np.roll(key, -1))  # the last group of each run of one prompt
    if not len(ends):
        return np.arange(n)
    run = np.searchsorted(ends, np.arange(n)) % len(ends)  # those behind the last end are of the first run
    return (ends[run] + 1) % n
