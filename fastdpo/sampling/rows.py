"""What a round asks, and what it was answered: a line each of its file, which people and `data` can read."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.config.rounds import SampleSpec
from fastdpo.files import durable
from fastdpo.preferences import Groups, Image, Pair, PreferenceGroup, Response
from fastdpo.sampling.calls import seed_of
from fastdpo.sampling.resets import reset_length


@dataclass(frozen=True)
class Asked:
    """A prompt of the data, and, after a reset, the start of its chosen response."""

    group: PreferenceGroup  # with the reset in its prompt, and without responses
    forced: int  # tokens of the reset, the last ones of the prompt


@dataclass(frozen=True)
class Answered:
    """A line of a round's file. responses: {"text", "score", "ids", "ended"} each, the text with what a reset
    has forced, the ids without; the score None before it is scored. key: of all that the
    samples hang on."""

    row: int
    prompt: str | list[dict]
    responses: list[dict[str, Any]]
    prompt_ids: list[int]  # with the reset
    forced: int
    at_once: int  # sequences that the call of the engine had room for
    key: str

    @property
    def scores(self) -> list[float]:
        return [response["score"] for response in self.responses]

    @property
    def is_scored(self) -> bool:
        return None not in self.scores

    def with_scores(self, scores: Sequence[float]) -> "Answered":
        pairs = zip(self.responses, scores)
        return replace(self, responses=[response | {"score": score} for response, score in pairs])

    def group(self, images: tuple[Image, ...] = ()) -> PreferenceGroup:
        """The sampled ids as a ranked row: a pair of every two responses whose scores differ."""
        whole = lambda ids: Response(np.array(ids, np.int64), np.ones(len(ids), bool))
        responses = tuple(replace(whole(r["ids"]), score=r["score"]) for r in self.responses)
        s, n = self.scores, range(len(self.scores))
        pairs = tuple(Pair(i, j) for i in n for j in n if s[i] > s[j])
        return PreferenceGroup(self.row, np.array(self.prompt_ids, np.int64), responses, pairs, images=images)


def places_of(n_prompts: int, count: int, number: int, seed: int) -> np.ndarray:
    """Which prompts round `number`, from 1, takes, in their order: an epoch's permutation is dealt to rounds,
    and what is left of it takes no part, so that no round has a prompt twice."""
    per_epoch = n_prompts // count
    epoch, part = divmod(number - 1, per_epoch)
    order = np.random.default_rng(seed_of("prompts", seed, epoch)).permutation(n_prompts)
    return np.sort(order[part * count : (part + 1) * count])


def ask(groups: Groups, spec: SampleSpec, number: int, seed: int, limit: int) -> list[Asked]:
    """The prompts of these groups, each with its reset or without, the shortest first. limit: of prompt and
    response in tokens."""
    out = []
    for group in groups:
        rng = np.random.default_rng(seed_of("reset", seed, number, group.row))
        forced = group.prompt[:0]
        if spec.resets and group.chosen:
            chosen = group.responses[group.chosen[0]]
            room = limit - spec.max_new_tokens - len(group.prompt)
            forced = chosen.ids[: reset_length(chosen.target_mask, spec.resets, rng, room)]
        prompt = np.concatenate([group.prompt, forced])
        out.append(Asked(replace(group, prompt=prompt, responses=(), pairs=()), len(forced)))
    return sorted(out, key=lambda asked: (len(asked.group.prompt), asked.group.row))


class RoundFile:
    """The lines of a round, as they come. Lines of another key, and one that a crash has cut, are not
    there."""

    def __init__(self, path: Path, key: str):
        self.path, self.key = path, key

    def read(self) -> list[Answered]:
        """The whole lines, in order, up to the first that is not as it was written."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        lines = map(self._whole, text.splitlines())
        return [one for one in itertools.takewhile(bool, lines) if one]

    def is_own(self) -> bool:
        """Whether the file begins with a line of this key, or holds nothing."""
        with self.path.open(encoding="utf-8", errors="replace") as file:
            line = file.readline()
            return not line or self._whole(line) is not None

    def _whole(self, line: str) -> Answered | None:
        try:
            said = json.loads(line)
            is_whole = said.pop("digest") == durable.json_digest(said) and said["key"] == self.key
            return Answered(**said) if is_whole else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None

    def add(self, some: Sequence[Answered]) -> None:
        durable.add_lines(self.path, *map(_line, some))

    def write(self, all_of_them: Sequence[Answered]) -> None:
        """In place of what was there."""
        lines = (json.dumps(_line(one)) + "\n" for one in all_of_them)
        durable.write_text(self.path, "".join(lines))


def _line(one: Answered) -> dict[str, Any]:
    said = asdict(one)
    return said | {"digest": durable.json_digest(said)}
