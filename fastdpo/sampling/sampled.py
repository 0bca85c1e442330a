"""What a model answers: samples of its own distribution, to the prompts of a data set."""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from rich.console import Console

from fastdpo.console.progress import make_progress
from fastdpo.errors import ModelError
from fastdpo.model.policy import Policy
from fastdpo.records import Groups, PreferenceGroup, Response
from fastdpo.sampling.generate import batches, end_tokens, generate, generating


@torch.no_grad()
def sampled(
    policy: Policy,
    tokenizer,
    groups: Groups,
    *,
    per_prompt: int = 1,
    seed: int = 0,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    at_once: int = 64,
    console: Console | None = None,
) -> list[PreferenceGroup]:
    """The same prompts, rows and order, with `per_prompt` responses each that the policy sampled: ids up to
    and with the end token where it came, all of them scored; no pairs.

    Through transformers' own `generate`, without top-k, top-p or penalties, `at_once` sequences a call. The
    same seed gives the same samples on the same machine, and the caller's random state stays as it was, as
    does the policy. What ends a response: `generate.end_tokens` of these groups. Raises ModelError.
    """
    ends, answers = end_tokens(policy, tokenizer, groups), dict[int, list[list[int]]]()
    prompts = [replace(group, responses=(), pairs=()) for group in groups]
    in_order = sorted(prompts, key=lambda prompt: len(prompt.prompt))  # of similar length: little padding
    wanted = [prompt for prompt in in_order for _ in range(per_prompt)]
    parts = (wanted[start : start + at_once] for start in range(0, len(wanted), at_once))
    calls = [call for part in parts for call in batches(policy, part, max_new_tokens)]
    how = dict(do_sample=True, temperature=temperature, top_k=0, top_p=1.0)
    devices = [policy.device] if policy.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices),
        generating(policy, tokenizer, ends, **how),
        make_progress(console or Console(quiet=True)) as bar,
    ):
        torch.manual_seed(seed)
        total, done = sum(room for _, room in calls), 0
        task = bar.add_task("sampling", total=total, unit="tokens", info="")
        for batch, room in calls:
            some = _generated(policy, batch, room, partial(bar.advance, task))
            for prompt, ids in zip(batch, some):
                answers.setdefault(id(prompt), []).append(ids)
            done += room
            bar.update(task, completed=done)  # all may have ended before
    responses = [tuple(_response(ids, ends) for ids in answers[id(prompt)]) for prompt in prompts]
    return [replace(prompt, responses=some) for prompt, some in zip(prompts, responses)]


def _generated(policy: Policy, batch: list[PreferenceGroup], room: int, each) -> list[list[int]]:
    try:
        return generate(policy, batch, room, each)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"sampling: out of GPU memory on {len(batch)} prompts of up to {len(batch[-1].prompt)} tokens; "
            "lower max_length, or max_new_tokens"
        ) from None
    except Exception as error:  # whatever a model's own generation code raises
        why, name = f"{type(error).__name__}: {error}", type(policy.core).__name__
        raise ModelError(f"sampling: {name} cannot generate (row {batch[0].row}): {why}") from error


def _response(ids: list[int], ends: list[int]) -> Response:
    """Without what follows the end token: padding."""
    length = next((i for i, token in enumerate(ids, 1) if token in ends), len(ids))
    return Response(np.array(ids[:length], np.int64), np.ones(length, bool))
