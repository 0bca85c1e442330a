"""Samples of a few prompts by transformers' own `generate`, some sequences at once."""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from rich.progress import Progress, TaskID

from fastdpo.errors import ModelError
from fastdpo.model.policy import Policy
from fastdpo.records import PreferenceGroup
from fastdpo.sampling.generate import batches, generate, generating

Piece = tuple[list[PreferenceGroup], int]  # what one `generate` is given: prompts, new tokens


@contextlib.contextmanager
def drawing(
    policy: Policy, tokenizer, ends: list[int], seed: int, *, temperature: float, top_p: float = 1.0
) -> Iterator[None]:
    """Inside, the model samples, without top-k or penalties, from this seed on; then it and the caller's
    random state are as they were."""
    devices = [policy.device] if policy.device.type == "cuda" else []
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=top_p)
    with torch.random.fork_rng(devices), generating(policy, tokenizer, ends, **how):
        torch.manual_seed(seed)
        yield


def seed_of(*parts: int | str) -> int:
    """A seed of all of these: 0 to 2^62."""
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 2


def bare(group: PreferenceGroup) -> PreferenceGroup:
    """Its prompt alone."""
    return replace(group, responses=(), pairs=())


def pieces_of(
    policy: Policy, prompts: Sequence[PreferenceGroup], per_prompt: int, max_new_tokens: int, at_once: int
) -> list[Piece]:
    """Each prompt `per_prompt` times, at most `at_once` sequences a piece; see `generate.batches`."""
    wanted = [prompt for prompt in prompts for _ in range(per_prompt)]
    parts = [wanted[start : start + at_once] for start in range(0, len(wanted), at_once)]
    return [piece for part in parts for piece in batches(policy, part, max_new_tokens)]


def answers(
    policy: Policy, pieces: list[Piece], ends: list[int], bar: Progress, task: TaskID
) -> dict[int, list[list[int]]]:
    """{id(prompt): the ids of each of its answers, up to and with the end token where it came}; `task` counts
    tokens. Raises ModelError. The caller is in `generating`, without gradients, and has seeded torch."""
    found: dict[int, list[list[int]]] = {}
    for batch, room in pieces:
        some = _generated(policy, batch, room, partial(bar.advance, task))
        for prompt, ids in zip(batch, some):
            found.setdefault(id(prompt), []).append(until_end(ids, ends))
        bar.advance(task, room - len(some[0]))  # all may have ended before
    return found


def until_end(ids: list[int], ends: list[int]) -> list[int]:
    """Without what follows the end token: padding."""
    return ids[: next((i for i, token in enumerate(ids, 1) if token in ends), len(ids))]


def _generated(policy: Policy, batch: list[PreferenceGroup], room: int, each) -> list[list[int]]:
    try:
        return policy.inside(partial(generate, policy, batch, room, each))
    except torch.OutOfMemoryError:
        longest = max(len(prompt.prompt) for prompt in batch)
        raise ModelError(
            f"sampling: out of GPU memory on {len(batch)} prompts of up to {longest} tokens; "
            "lower max_length, or max_new_tokens"
        ) from None
    except Exception as error:  # whatever a model's own generation code raises
        why, name = f"{type(error).__name__}: {error}", type(policy.core).__name__
        raise ModelError(f"sampling: {name} cannot generate (row {batch[0].row}): {why}") from error
