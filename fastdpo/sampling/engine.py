"""What samples: the policy's own generate."""

from collections.abc import Iterator

from fastdpo.sampling.sampled import sampled


def sample(
    policy, tokenizer, prompts, *, spec, seed, ends, model, work, console, first=0
) -> Iterator[list[list[list[int]]]]:
    at_once = max(1, 64 // spec.responses)
    for start in range(first, len(prompts), at_once):
        some = prompts[start : start + at_once]
        groups = sampled(
            policy,
            tokenizer,
            some,
            per_prompt=spec.responses,
            seed=(seed + some[0].row) % 2**62,
            max_new_tokens=spec.max_new_tokens,
            temperature=spec.temperature,
            console=console,
        )
        yield [[r.ids.tolist() for r in g.responses] for g in groups]
