"""Completions through transformers' own `generate`: of the policy as it stands, and it is left as it was."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, StoppingCriteriaList

from fastdpo.model.policy import Policy
from fastdpo.model.vision import row_inputs
from fastdpo.records import Groups, PreferenceGroup


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


def end_tokens(policy: Policy, tokenizer, groups: Groups) -> list[int]:
    """The ids that end a completion: the tokenizer's and the model's EOS, and whichever special token
    the responses themselves end with (a chat template's end of turn is often neither)."""
    known = [tokenizer.eos_token_id, getattr(policy.core.generation_config, "eos_token_id", None)]
    known.append(policy.core.config.get_text_config().eos_token_id)
    ends = {i for value in known for i in (value if isinstance(value, list) else [value])} - {None}
    last = {int(r.ids[-1]) for group in groups for r in group.responses}
    return sorted(ends | last & set(tokenizer.get_added_vocab().values()))


def positions_of(policy: Policy) -> int | None:
    """Tokens that the model has positions for; None where it does not say."""
    return getattr(policy.core.config.get_text_config(), "max_position_embeddings", None)


def batches(policy: Policy, groups: Groups, max_new_tokens: int):
    """(groups, new tokens) of each call: all at once, but alone and shorter where the model's positions
    do not suffice, since a position too many is an error (on a GPU, one that ends the process), and alone
    where the model sees images, whose prompts are not padded here."""
    limit = positions_of(policy)
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
