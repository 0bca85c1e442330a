"""What a model answers: samples of its own distribution, to the prompts of a data set."""

from dataclasses import replace

import numpy as np
import torch
from rich.console import Console

from fastdpo.console.progress import make_progress
from fastdpo.model.policy import Policy
from fastdpo.records import Groups, PreferenceGroup, Response
from fastdpo.sampling.calls import answers, bare, drawing, pieces_of
from fastdpo.sampling.generate import end_tokens


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
    ends, prompts = end_tokens(policy, tokenizer, groups), list(map(bare, groups))
    in_order = sorted(prompts, key=lambda prompt: len(prompt.prompt))  # of similar length: little padding
    pieces = pieces_of(policy, in_order, per_prompt, max_new_tokens, at_once)
    with (
        drawing(policy, tokenizer, ends, seed, temperature=temperature),
        make_progress(console or Console(quiet=True)) as bar,
    ):
        task = bar.add_task("sampling", total=sum(room for _, room in pieces), unit="tokens", info="")
        found = answers(policy, pieces, ends, bar, task)
    responses = [tuple(map(_response, found[id(prompt)])) for prompt in prompts]
    return [replace(prompt, responses=some) for prompt, some in zip(prompts, responses)]


def _response(ids: list[int]) -> Response:
    return Response(np.array(ids, np.int64), np.ones(len(ids), bool))
