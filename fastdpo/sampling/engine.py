"""What a round's prompts are answered by: transformers' own `generate`, or vLLM in a process of its own."""

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console

from fastdpo.config.rounds import SampleSpec
from fastdpo.console.progress import make_progress
from fastdpo.distributed.turns import Turns
from fastdpo.errors import ModelError
from fastdpo.model.generation_cache import cache_bytes
from fastdpo.model.policy import Policy
from fastdpo.model.spec import ModelSpec
from fastdpo.records import Groups
from fastdpo.sampling import engine_vllm
from fastdpo.sampling.calls import answers, bare, drawing, pieces_of, seed_of
from fastdpo.sampling.generate import positions_of

ON_CPU, MOST = 64, 256  # sequences at once: on a CPU; on a GPU however much memory it has
SHARE = 4  # one part in so many of a GPU's free memory is for keys and values

Call = tuple[int, list[list[list[int]]]]


def check_engine(spec: SampleSpec, model: ModelSpec, sharded: bool = False) -> None:
    """Raises ConfigError where the engine is not installed, or cannot sample from such a model; nothing is
    loaded. sharded: whether ranks hold parts of the weights."""
    if spec.engine == "vllm":
        engine_vllm.check(model, sharded)


def sample(
    policy: Policy,
    tokenizer,
    prompts: Groups,
    *,
    spec: SampleSpec,
    seed: int,
    ends: list[int],
    model: ModelSpec,
    work: Path,
    console: Console,
    first: int = 0,
    at_once: int | None = None,
) -> Iterator[Call]:
    """spec.responses samples of each prompt from `first` on, in order, call by call: (the place of the call's
    first prompt, for each of its prompts the ids of each answer, up to and with the one of `ends` that ended
    it).

    Of the groups only prompt, images and row are read. A call is seeded by `seed` and the row of its first
    prompt, so whoever goes on behind a whole call, with the same prompts and `at_once`, gets what would have
    come; on one machine, by transformers. vLLM answers all in one call, each prompt by a seed of its own,
    and does not promise the same samples twice. at_once: sequences of a call; None: as `room_for` has it.

    All ranks have to take part, and all get all answers: calls are dealt to them, or the first one runs vLLM.
    work: a folder for what goes to vLLM and back, and its log. The policy and the random state stay as they
    were. Raises ModelError, and what `check_engine` does.
    """
    check_engine(spec, model, policy.world.sharded)
    check_room(policy, prompts, spec.max_new_tokens)
    left = [bare(prompts[place]) for place in range(first, len(prompts))]
    if not left:
        return
    if spec.engine == "vllm":
        ask = lambda: engine_vllm.sample(policy, tokenizer, left, spec, seed, ends, model, work, console)
        yield first, policy.world.told(ask)
        return
    at_once = at_once or room_for(policy, left, spec.max_new_tokens)
    size = prompts_at_once(policy, spec, at_once)
    calls = [left[start : start + size] for start in range(0, len(left), size)]
    cut = lambda call: pieces_of(policy, call, spec.responses, spec.max_new_tokens, at_once)
    turns = Turns(calls, policy.world)
    with make_progress(console) as bar:
        total = sum(room for _, call in turns for _, room in cut(call))
        task = bar.add_task("sampling", total=total, unit="tokens", info="")
        for number, call in turns:
            made = None
            if number is not None or policy.world.sharded:
                chance = seed_of(seed, call[0].row)
                how = dict(temperature=spec.temperature, top_p=spec.top_p)
                with torch.no_grad(), drawing(policy, tokenizer, ends, chance, **how):
                    found = answers(policy, cut(call), ends, bar, task)
                made = None if number is None else (number, [found[id(prompt)] for prompt in call])
            for one in policy.world.gather(made):
                if one is not None:
                    yield first + one[0] * size, one[1]


def prompts_at_once(policy: Policy, spec: SampleSpec, at_once: int) -> int:
    """Of a call of so many sequences. Images are not padded here: such prompts are answered one by one, and
    on ranks with shards in step."""
    return max(1, at_once // spec.responses) if policy.processor is None else 1


def room_for(policy: Policy, prompts: Groups, max_new_tokens: int, budget: int | None = None) -> int:
    """Sequences of one call: 64 on a CPU; on a GPU as many as their keys and values take a quarter of what is
    free, at most 256, and on several the least of them. budget: bytes that the run may take (`memory`). A run
    that goes on has to be told the same."""
    free, fits = policy.free_memory(), ON_CPU
    if free is not None:
        if budget is not None:
            free = max(0, min(free, budget - torch.cuda.memory_allocated(policy.device)))
        longest = max(len(prompt.prompt) for prompt in prompts) + max_new_tokens
        one = cache_bytes(policy.core.config, longest, policy.dtype.itemsize)
        fits = min(MOST, max(1, free // SHARE // max(one, 1)))
    return int(policy.world.min(fits))


def check_room(policy: Policy, prompts: Groups, max_new_tokens: int) -> None:
    """Raises ModelError for the first prompt behind which the model has too few positions."""
    limit = positions_of(policy)
    for prompt in prompts:
        if limit is not None and len(prompt.prompt) + max_new_tokens > limit:
            raise ModelError(
                f"sample: no room for max_new_tokens: {max_new_tokens} behind the prompt of row {prompt.row} "
                f"({len(prompt.prompt)} tokens): the model has {limit} positions; lower max_new_tokens"
            )
