"""What models answer to the prompts of the data: sampled, measured, and scored."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console

from fastdpo.evaluation.estimates import Estimate
from fastdpo.evaluation.kl import sequence_kl
from fastdpo.model.policy import Policy
from fastdpo.records import Groups, PreferenceGroup
from fastdpo.sampling.generate import end_tokens
from fastdpo.sampling.said import turns_of
from fastdpo.sampling.sampled import sampled
from fastdpo.sampling.scorers import Answer, Scorer, scores


@dataclass(frozen=True)
class Sampling:
    """How prompts are answered."""

    prompts: Groups
    numbers: np.ndarray  # i64[P]: which prompts of the data they are
    per_prompt: int
    max_new_tokens: int
    seed: int


@dataclass
class Answers:
    """A model's, one list a prompt."""

    given: list[list[Answer]]
    ended: list[list[bool]]  # by an end token of its own
    kl: list[list[float]] | None = None  # nats; None without a reference
    score: list[list[float]] | None = None
    sampling: Sampling | None = field(default=None, repr=False)

    def numbers(self) -> dict[str, Estimate]:
        assert self.sampling is not None
        lengths = [[answer.tokens for answer in some] for some in self.given]
        columns = {"kl": self.kl, "length": lengths, "ended": self.ended, "score": self.score}
        there = {
            name: np.array(some, np.float64).mean(1) for name, some in columns.items() if some is not None
        }
        numbers = self.sampling.numbers
        return {f"samples/{name}": Estimate.of(values, numbers) for name, values in there.items()}

    def judge(self, scorer: Scorer, name: str, console: Console, whose: str) -> None:
        flat = [answer for some in self.given for answer in some]
        self.score = _cut(scores(scorer, name, flat, console, whose), len(self.given))

    def wins_over(self, other: "Answers") -> Estimate:
        """How often an answer scores higher than the other model's to the same prompt, ties half: over all
        pairs of a prompt's answers."""
        assert self.score is not None and other.score is not None and self.sampling is not None
        won = [np.sign(np.subtract.outer(a, b)).mean() for a, b in zip(self.score, other.score)]
        return Estimate.of((np.array(won) + 1) / 2, self.sampling.numbers)


def _cut(values: Sequence, parts: int) -> list[list]:
    size = len(values) // max(parts, 1)
    return [list(values[i * size : (i + 1) * size]) for i in range(parts)]


def answer(
    policy: Policy, tokenizer, sampling: Sampling, console: Console, whose: str
) -> tuple[Answers, list[PreferenceGroup]]:
    """(the model's answers, the same as groups)."""
    console.print(f"{whose} answers {len(sampling.prompts):,} prompts", highlight=False, soft_wrap=True)
    groups = sampled(
        policy,
        tokenizer,
        sampling.prompts,
        per_prompt=sampling.per_prompt,
        seed=sampling.seed,
        max_new_tokens=sampling.max_new_tokens,
        console=console,
    )
    ends = set(end_tokens(policy, tokenizer, sampling.prompts))
    given = [[_answer(tokenizer, group, r.ids.tolist(), ends) for r in group.responses] for group in groups]
    ended = [[int(r.ids[-1]) in ends for r in group.responses] for group in groups]
    return Answers(given, ended, sampling=sampling), groups


def _answer(tokenizer, group: PreferenceGroup, ids: list[int], ends: set[int]) -> Answer:
    prompt = group.prompt.tolist()
    said = list(itertools.takewhile(lambda token: token not in ends, ids))
    text = lambda some: tokenizer.decode(some, skip_special_tokens=True).strip()
    return Answer(
        row=group.row,
        prompt=text(prompt),
        text=text(said),
        tokens=len(ids),
        turns=turns_of(tokenizer, prompt),
        raw=tokenizer.decode(prompt + ids),
    )


def add_kl(
    answers: Answers,
    groups: Groups,
    policy: Policy,
    reference: Policy | None,
    max_tokens: int,
    console: Console,
) -> None:
    """The exact KL of each answer; reference None: the policy's own base."""
    found = sequence_kl(policy, reference, groups, max_tokens=max_tokens, console=console)
    answers.kl = _cut(found.tolist(), len(answers.given))


def as_json(answers: dict[str, Answers], groups: Groups) -> list[dict[str, Any]]:
    """One entry a prompt: what each model answered."""
    out = []
    for place, group in enumerate(groups):
        entry: dict[str, Any] = {"row": group.row, "answers": {}}
        for name, some in answers.items():
            entry |= {"prompt": some.given[place][0].prompt, "turns": some.given[place][0].turns}
            entry["answers"][name] = [
                {"text": one.text, "tokens": one.tokens, "ended": ended}
                | ({"kl": some.kl[place][i]} if some.kl else {})
                | ({"score": some.score[place][i]} if some.score else {})
                for i, (one, ended) in enumerate(zip(some.given[place], some.ended[place]))
            ]
        out.append(entry)
    return out
