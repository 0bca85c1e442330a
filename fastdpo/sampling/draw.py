"""A round's samples: drawn, scored, and kept in its file on the way."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from fastdpo.config.rounds import SampleSpec
from fastdpo.data.images.expansion import Expander
from fastdpo.model.policy import Policy
from fastdpo.model.spec import ModelSpec
from fastdpo.preferences import PreferenceGroup
from fastdpo.sampling.engine import prompts_at_once, room_for, sample
from fastdpo.sampling.rows import Answered, Asked, RoundFile
from fastdpo.sampling.said import said, turns_of
from fastdpo.sampling.scorers import Answer, Scorer, scores


@dataclass(frozen=True)
class Drawing:
    """How prompts are answered, and by what that is judged."""

    spec: SampleSpec
    model: ModelSpec
    policy: Policy
    tokenizer: Any
    ends: list[int]  # ids that end a response
    scorer: Scorer | None  # of the first rank; None: nothing is scored
    scorer_name: str | None
    console: Console
    again: bool = False  # what has scores is scored, too
    budget: int | None = None  # bytes of the GPU's memory that may be taken
    check: Callable[[], object] = lambda: None  # called after each call of the engine; may raise

    def draw(self, asked: Sequence[Asked], seed: int, file: RoundFile) -> list[Answered]:
        """The prompts, answered and scored, the same on all ranks: what the file has is read, the rest is
        added to it. Collective."""
        world, groups = self.policy.world, [one.group for one in asked]
        found = world.told(file.read)
        at_once = found[0].at_once if found else self.room(groups)
        if len(found) < len(asked):  # the file may have been cut within a call
            found = found[: len(found) - len(found) % prompts_at_once(self.policy, self.spec, at_once)]
            if world.first and file.path.exists():
                file.write(found)
        calls = sample(
            self.policy,
            self.tokenizer,
            groups,
            spec=self.spec,
            seed=seed,
            ends=self.ends,
            model=self.model,
            work=file.path.with_suffix(".work"),
            console=self.console,
            first=len(found),
            at_once=at_once,
        )
        for place, answers in calls:
            some = asked[place : place + len(answers)]
            new = [self.answered(*both, at_once, file.key) for both in zip(some, answers)]
            if world.first:
                file.add(new)
            found += new
            self.check()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # of the keys and values, for training takes other sizes
        if self.scorer_name is not None and (self.again or not all(one.is_scored for one in found)):
            found = world.told(lambda: self.scored(found, asked))
            if world.first:
                file.write(found)
        return found

    def room(self, groups: list[PreferenceGroup]) -> int:
        return room_for(self.policy, groups, self.spec.max_new_tokens, self.budget)

    def answered(self, asked: Asked, ids: list[list[int]], at_once: int, key: str) -> Answered:
        prompt, forced = asked.group.prompt, asked.group.prompt[len(asked.group.prompt) - asked.forced :]
        plain = replace(asked.group, prompt=prompt[: len(prompt) - asked.forced])
        expander = Expander(self.policy.processor) if plain.images else None
        words = said(self.tokenizer, plain, expander)
        return Answered(
            row=plain.row,
            prompt=words["turns"] or words["prompt"],
            responses=[self._response(forced.tolist(), some) for some in ids],
            prompt_ids=prompt.tolist(),
            forced=asked.forced,
            at_once=at_once,
            key=key,
        )

    def _response(self, forced: list[int], ids: list[int]) -> dict[str, Any]:
        until_end = list(itertools.takewhile(lambda token: token not in self.ends, ids))
        text = self.tokenizer.decode(forced + until_end, skip_special_tokens=True).strip()
        return {"text": text, "score": None, "ids": ids, "ended": ids[-1] in self.ends}

    def scored(self, found: list[Answered], asked: Sequence[Asked]) -> list[Answered]:
        """With scores, from which what did not end in time has lost `missing_eos_penalty`."""
        assert self.scorer is not None and self.scorer_name is not None
        given = [self._answer(one, of.group, r) for one, of in zip(found, asked) for r in one.responses]
        values = iter(scores(self.scorer, self.scorer_name, given, self.console, "samples", "reward", True))
        lost = lambda r: 0.0 if r["ended"] else self.spec.missing_eos_penalty
        return [one.with_scores([next(values) - lost(r) for r in one.responses]) for one in found]

    def _answer(self, one: Answered, group: PreferenceGroup, response: dict[str, Any]) -> Answer:
        prompt = one.prompt_ids[: len(one.prompt_ids) - one.forced]
        return Answer(
            row=one.row,
            prompt=self.tokenizer.decode(prompt, skip_special_tokens=True).strip(),
            text=response["text"],
            tokens=one.forced + len(response["ids"]),
            turns=turns_of(self.tokenizer, prompt),
            raw=self.tokenizer.decode(one.prompt_ids + response["ids"]),
        )
