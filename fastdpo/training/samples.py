"""Greedy completions of a few prompts, before and after training, for the report."""

import itertools
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape

from fastdpo.console.progress import make_progress
from fastdpo.data.images import shown
from fastdpo.data.images.expansion import Expander
from fastdpo.errors import TrainingError
from fastdpo.model.policy import Policy
from fastdpo.records import Groups
from fastdpo.sampling.generate import batches, end_tokens, generate, generating
from fastdpo.sampling.said import said


@torch.no_grad()
def complete(
    policy: Policy,
    tokenizer,
    groups: Groups,
    max_new_tokens: int = 128,
    console: Console | None = None,
) -> list[dict]:
    """One {"row", "prompt", "turns", "completion", "chosen"} a group, and "images" where it has some, through
    transformers' own `generate`; see `said` and `shown.as_json`.

    Greedy, so no random number is drawn; the policy is left as it was. A model that cannot generate costs
    a run its samples and nothing else: a note says why, and the list is empty.
    """
    ends = end_tokens(policy, tokenizer, groups)
    completions: dict[int, list[int]] = {}
    images: dict[int, list[dict]] = {}
    try:
        calls = list(batches(policy, groups, max_new_tokens))
        with generating(policy, tokenizer, ends, do_sample=False), make_progress(console or Console()) as bar:
            total = sum(room for _, room in calls)
            task = bar.add_task("sample completions", total=total, unit="tokens", info="")
            for batch, room in calls:
                each = partial(bar.advance, task)
                made = policy.inside(partial(generate, policy, batch, room, each))
                completions |= zip(map(id, batch), made)
            bar.update(task, completed=total)  # all may have ended before
        images = {id(group): list(map(shown.as_json, group.images)) for group in groups if group.images}
    except Exception as error:  # whatever a model's own generation code raises
        if policy.world.sharded and isinstance(error, torch.OutOfMemoryError):  # the other ranks wait
            raise TrainingError("out of GPU memory while prompts were completed; say samples: 0") from None
        why = escape(f"{type(error).__name__}: {error}")
        (console or Console()).print(f"[yellow]no sample completions: {why}", soft_wrap=True)
        return []
    text = lambda ids: tokenizer.decode(ids, skip_special_tokens=True).strip()
    until_end = lambda ids: list(itertools.takewhile(lambda token: token not in ends, ids))
    expander = Expander(policy.processor) if images else None
    return [
        {
            "row": group.row,
            **said(tokenizer, group, expander),
            "completion": text(until_end(completions[id(group)])),
            "chosen": text(group.responses[group.chosen[0]].ids.tolist()) if group.chosen else None,
        }
        | ({"images": images[id(group)]} if group.images else {})
        for group in groups
    ]
