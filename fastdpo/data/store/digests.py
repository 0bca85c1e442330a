"""What two groups have in common, as content hashes: of a response behind its prompt, of a prompt, of what a
group trains, of all that it says."""

from hashlib import blake2b

from fastdpo.preferences import PreferenceGroup

BYTES = 16  # of every hash here


def response_keys(group: PreferenceGroup) -> list[bytes]:
    """One key a response: a hash of the whole sequence (ids as little-endian int32) and of which of its
    tokens are scored, so that it does not matter where the prompt that the group shares ends; and of its
    images."""
    if all(response.key is not None for response in group.responses):
        return [response.key or b"" for response in group.responses]
    prompt = _of_prompt(group)
    unscored = bytes(len(group.prompt))
    keys = []
    for response in group.responses:
        key = prompt.copy()
        key.update(response.ids.astype("<i4").tobytes())
        key.update(unscored + response.target_mask.tobytes())  # 4 + 1 bytes a token: no two splits agree
        keys.append(key.digest())
    return keys


def prompt_key(group: PreferenceGroup) -> bytes:
    return _of_prompt(group).digest()


def _of_prompt(group: PreferenceGroup):
    """The images' keys come first; without any the hash is of the ids alone."""
    digest = blake2b(b"".join(image.key for image in group.images), digest_size=BYTES)
    digest.update(group.prompt.astype("<i4").tobytes())
    return digest


def trained_digest(group: PreferenceGroup, keys: list[bytes]) -> bytes:
    """What the group trains: its tokens (by the keys of its responses), labels and pairs."""
    said = repr((group.pairs, [response.label for response in group.responses])).encode()
    return blake2b(b"".join(keys) + said, digest_size=BYTES).digest()


def group_digest(group: PreferenceGroup, keys: list[bytes]) -> bytes:
    """All that the group says: the keys of its responses, pairs, scores, labels, token weights and the
    reference columns."""
    number = lambda value: None if value is None else float(value)
    known = [(number(r.ref_logp), number(r.score), r.label) for r in group.responses]
    digest = blake2b(b"".join(keys), digest_size=BYTES)
    digest.update(repr([known, [tuple(pair) for pair in group.pairs]]).encode())
    for response in group.responses:
        weight = response.token_weight
        digest.update(b"-" if weight is None else weight.astype("<f4").tobytes())
    return digest.digest()
