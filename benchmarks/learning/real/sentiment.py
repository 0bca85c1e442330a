"""Controlled sentiment, as in Rafailov et al. 2023, section 6.1, by a real model: what it says of films that
do not exist, and how positive that is by VADER's rules (Hutto and Gilbert 2014)."""

import itertools
import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.learning.real.start import LONGEST, QUIET, policy_of, tokenizer_of
from fastdpo.data.groups import Limits
from fastdpo.data.load import load_groups
from fastdpo.files import durable
from fastdpo.records import PreferenceGroup
from fastdpo.sampling.sampled import sampled

ASPECTS = ("acting", "story", "music", "ending", "pacing", "dialogue", "camera work", "cast")
FIRST = (
    "Blue Last Paper Silent Golden Broken Winter Hidden Crimson Distant Hollow Lonely Electric Quiet".split()
)
SECOND = "Harbor Orchard Wolves River Garden Letter Station Mirror Island Summer Road Kingdom".split()
SYSTEM = "You are a film critic."
QUESTION = 'In one short sentence, was the {} of the film "{}" good or bad?'
HELD_OUT_TITLES = 28  # of 168
SAMPLING = {"max_new_tokens": 32, "temperature": 1.0}
REWARD = (
    "VADER's compound score of the answer, -1 to 1. A row's score, which ODPO's offset reads, is 1 + p above "
    "p = 0.5 and p below, p = (1 + compound) / 2, as its authors' sentiment scores"
)


def prompts(held_out: bool) -> list[list[dict]]:
    """Conversations that an answer is asked for, in one fixed order; no title is in both sets."""
    titles = [f"{a} {b}" for a, b in itertools.product(FIRST, SECOND)]
    random.Random(0).shuffle(titles)
    titles = titles[:HELD_OUT_TITLES] if held_out else titles[HELD_OUT_TITLES:]
    asked = [QUESTION.format(aspect, title) for title in titles for aspect in ASPECTS]
    random.Random(1).shuffle(asked)
    return [[{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}] for text in asked]


def rewards(answers: Sequence[str]) -> np.ndarray:
    """f64[n]: VADER's compound score of each."""
    analyzer = _vader()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in answers])


@cache
def _vader():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def score(reward: float) -> float:
    """What a row says of an answer, see REWARD."""
    p = (1 + reward) / 2
    return 1 + p if p > 0.5 else p


def write_rows(path: Path, model: str, lora_rank: int, asked: list[list[dict]], n: int, seed: int) -> dict:
    """A file of ranked rows: `n` answers of the start model to each of these prompts, with their scores, and
    what there is to say of them. Answers that did not end in time stay, cut, as those that are rewarded
    later."""
    policy = policy_of(model, lora_rank)
    prompts = path.with_suffix(".prompts.jsonl")
    write_prompts(prompts, asked)
    groups = prompt_groups(prompts, model)
    with policy.model.disable_adapter():
        answered = sampled(policy, tokenizer_of(model), groups, per_prompt=n, **SAMPLING, seed=seed)
    texts = [[text_of(model, r.ids) for r in group.responses] for group in answered]
    found = rewards([text for some in texts for text in some]).reshape(len(texts), n)
    lines = [
        {"prompt": turns, "responses": [dict(text=t, score=score(r)) for t, r in zip(some, row)]}
        for turns, some, row in zip(asked, texts, found)
    ]
    _write(path, lines)
    numbers = {"reward": found.mean(), "spread_in_a_row": found.std(1).mean(), "best": found.max(1).mean()}
    return {name: float(value) for name, value in numbers.items()}


def write_prompts(path: Path, asked: list[list[dict]]) -> None:
    """A file of rows with two answers of one word."""
    said = lambda text: [{"role": "assistant", "content": text}]
    _write(path, [{"prompt": turns, "chosen": said("Good."), "rejected": said("Bad.")} for turns in asked])


def prompt_groups(path: Path, model: str) -> list[PreferenceGroup]:
    """The prompts of such a file as a run reads them."""
    options = dict(strict=True, console=QUIET, data_cache="off")
    return list(load_groups(str(path), tokenizer_of(model), Limits(LONGEST), **options)[0])


def _write(path: Path, lines: list[dict]) -> None:
    durable.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def text_of(model: str, ids: np.ndarray) -> str:
    return tokenizer_of(model).decode(ids.tolist(), skip_special_tokens=True).strip()
