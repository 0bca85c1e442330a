"""Greedy completions of a few prompts, before and after training, for the report."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteriaList

from fastdpo.console.progress import make_progress
from fastdpo.data.images import shown
from fastdpo.data.images.expansion import Expander
from fastdpo.data.images.given import PLACEHOLDER
from fastdpo.errors import TrainingError
from fastdpo.model.policy import Policy
from fastdpo.model.vision import row_inputs
from fastdpo.records import Groups, PreferenceGroup


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


@contextlib.contextmanager
def generating(policy: Policy, tokenizer, ends: list[int], **how: Any) -> Iterator[None]:
    """Inside, the model generates as `how` says (arguments of GenerationConfig), and not by its own config,
    whose sampling and penalties (Qwen's 1.1) would have a say. Then all is as it was."""
    model, was_training, config = policy.core, policy.model.training, policy.core.generation_config
    pad = next(i for i in (tokenizer.pad_token_id, *ends, 0) if i is not None)  # any does: it is masked
    policy.model.eval()
    model.generation_config = GenerationConfig(
        **how, use_cache=True, eos_token_id=ends or None, pad_token_id=pad
    )
    try:
        with policy.stock(), policy.autocast():
            yield
    finally:
        model.generation_config = config
        policy.model.train(was_training)


_ROLES = {"system", "developer", "user", "assistant", "model", "tool", "ipython"}
_BY_TOKEN = {"[INST]": "user", "[/INST]": "assistant", "[SYSTEM_PROMPT]": "system"}


def said(tokenizer, group: PreferenceGroup, expander: Expander | None = None) -> dict[str, Any]:
    """{"prompt", "turns"}: what people read of a prompt, without special tokens, <image> for each image."""
    if not group.images or expander is None:
        ids = group.prompt.tolist()
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        return {"prompt": text, "turns": turns_of(tokenizer, ids)}
    ids, token = shown.one_token_each(group, expander), expander.token
    special = special_ids(tokenizer) - {expander.token_id}
    text = tokenizer.decode([i for i in ids if i not in special]).strip()
    turns = turns_of(tokenizer, ids, special) or []
    for turn in turns:
        turn["content"] = turn["content"].replace(token, PLACEHOLDER)
    return {"prompt": text.replace(token, PLACEHOLDER), "turns": turns or None}


def special_ids(tokenizer) -> set[int]:
    return {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def turns_of(tokenizer, ids: list[int], special: set[int] | None = None) -> list[dict] | None:
    """A prompt's [{"role", "content"}], as its special tokens part it: the role is such a token (<|user|>,
    [INST]), or the line behind one (<|im_start|>user). None where text comes before any role."""
    special = special_ids(tokenizer) if special is None else special
    turns: list[dict] = []
    role = opens = last = None  # role: of the next text; opens: the token that roles follow
    for is_special, run in itertools.groupby(ids, special.__contains__):
        if is_special:
            for last in tokenizer.convert_ids_to_tokens(list(run)):
                name = _BY_TOKEN.get(last, last.strip("<|｜>").lower())
                role = name if name in _ROLES else role
            continue
        text = tokenizer.decode(list(run)).strip()
        first, _, rest = text.partition("\n")
        if first.strip() in _ROLES and (last == opens if opens else not role):
            role, text, opens = first.strip(), rest.strip(), last
        if text and role:
            turns.append({"role": role, "content": text})
            role = None
        elif text and turns:  # behind a special token inside a turn
            turns[-1]["content"] += f"\n{text}"
        elif text:
            return None
    return turns or None


def end_tokens(policy: Policy, tokenizer, groups: Groups) -> list[int]:
    """The ids that end a completion: the tokenizer's and the model's EOS, and whichever special token
    the responses themselves end with (a chat template's end of turn is often neither)."""
    known = [tokenizer.eos_token_id, getattr(policy.core.generation_config, "eos_token_id", None)]
    known.append(policy.core.config.get_text_config().eos_token_id)
    ends = {i for value in known for i in (value if isinstance(value, list) else [value])} - {None}
    last = {int(r.ids[-1]) for group in groups for r in group.responses}
    return sorted(ends | last & set(tokenizer.get_added_vocab().values()))


def batches(policy: Policy, groups: Groups, max_new_tokens: int):
    """(groups, new tokens) of each call: all at once, but alone and shorter where the model's positions
    do not suffice, since a position too many is an error (on a GPU, one that ends the process), and alone
    where the model sees images, whose prompts are not padded here."""
    limit = getattr(policy.core.config.get_text_config(), "max_position_embeddings", None)
    room = [max_new_tokens if limit is None else min(max_new_tokens, limit - len(g.prompt)) for g in groups]
    fits = lambda new: new == max_new_tokens and policy.processor is None
    together = [g for g, new in zip(groups, room) if fits(new)]
    if together:
        yield together, max_new_tokens
    yield from (([g], new) for g, new in zip(groups, room) if not fits(new))


def generate(
    policy: Policy,
    groups: list[PreferenceGroup],
    max_new_tokens: int,
    each: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """The new ids of each prompt, padding and all; `each` is called after each token of all of them. Ranks
    with shards have to generate as many tokens as one another."""
    model = policy.core
    prompts = [torch.tensor(group.prompt) for group in groups]
    padded = partial(pad_sequence, batch_first=True, padding_side="left")
    ids = padded(prompts, padding_value=model.generation_config.pad_token_id)
    mask = padded([torch.ones_like(prompt) for prompt in prompts])
    device = model.get_input_embeddings().weight.device

    def goes_on(ids: Tensor, scores, **_) -> Tensor:
        each()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    inputs = {"input_ids": ids, "attention_mask": mask}
    if policy.processor is not None:
        inputs |= row_inputs(model, policy.processor, groups[0], 0)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    criteria = StoppingCriteriaList([goes_on])
    how = dict(max_new_tokens=max_new_tokens, stopping_criteria=criteria, synced_gpus=policy.world.sharded)
    out = model.generate(**inputs, **how)
    return out[:, ids.shape[1] :].tolist()
