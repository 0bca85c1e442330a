"""What judges an answer: a scorer by its name, and every fault of one told with the row that it had."""

import contextlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForSequenceClassification

from fastdpo.console.progress import make_progress
from fastdpo.console.quiet import no_bars
from fastdpo.errors import ConfigError, FastDPOError, ModelError
from fastdpo.model.finding import find_source
from fastdpo.model.loading import resolve_dtype
from fastdpo.model.source import load_tokenizer

AT_ONCE = 32  # answers that a scorer is given in a call
_NAMES = "vader, length, FILE.py:function, or a reward model's folder or hub name"


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt."""

    row: int
    prompt: str  # as the model read it, without special tokens
    text: str  # all that answers the prompt: after a reset, with the beginning that was given
    tokens: int  # with the end token, where it came
    turns: list[dict] | None = None  # the prompt's, where its special tokens tell them
    raw: str = ""  # prompt and answer as the chat template wrote them


Scorer = Callable[[Sequence[Answer]], Any]  # -> a number each
GivenRows = Callable[[int], dict | None]  # a row as the data has it, by its number; -1: any, for a try


def make_scorer(name: str, key: str = "scorer", rows: GivenRows = lambda number: None) -> Scorer:
    """The scorer of this name, tried on a tiny answer; `key` is what the user named it by, and `rows` is
    asked where a function wants the rows of its answers, as `NumberedRows` is. Raises ConfigError or
    ModelError, and what `rows` raises."""
    if name == "length":
        scorer: Scorer = lambda answers: [answer.tokens for answer in answers]
    elif name == "vader":
        scorer = _vader(key)
    elif ".py:" in name:
        file, _, function = name.rpartition(":")
        scorer = _of_file(file, function, key, rows)
    elif name.endswith(".py"):
        raise ConfigError(f"{key}: {name}: which function of it? Name it, as in {name}:score")
    else:
        scorer = RewardModel(name, key)
    said = [{"role": "user", "content": "Hello."}]
    tiny = Answer(-1, "Hello.", "Hello to you.", 4, said, "Hello. Hello to you.")
    _checked(scorer, [tiny], f"{key}: {name} fails its first try, on an answer to 'Hello.'")
    if isinstance(scorer, RewardModel) and torch.cuda.is_available():
        scorer.device = "cuda"  # from its first answers on, when the models that gave them have gone
    return scorer


def scores(
    scorer: Scorer,
    name: str,
    answers: Sequence[Answer],
    console: Console,
    whose: str,
    key: str = "scorer",
    put_aside: bool = False,
) -> list[float]:
    """One each. `put_aside`: the GPU then holds nothing of a reward model, until it scores again. Raises
    ConfigError, which names the row, where the scorer raises or gives no number."""
    out: list[float] = []
    with make_progress(console) as bar, contextlib.ExitStack() as after:
        if put_aside and isinstance(scorer, RewardModel):
            after.callback(scorer.put_aside)
        task = bar.add_task(f"scores, {whose}", total=len(answers), unit="answers", info="")
        for start in range(0, len(answers), AT_ONCE):
            some = answers[start : start + AT_ONCE]
            out += _checked(scorer, some, f"{key}: {name}")
            bar.update(task, advance=len(some))
    return out


def _checked(scorer: Scorer, answers: Sequence[Answer], what: str) -> list[float]:
    rows = sorted({answer.row for answer in answers})
    of = f" (row {rows[0]})" if len(rows) == 1 else f" (rows {', '.join(map(str, rows))})"
    of = "" if rows == [-1] else of
    try:
        given = scorer(answers)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{what}: out of GPU memory on {len(answers)} answers{of}; take a smaller one"
        ) from None
    except FastDPOError:  # of the rows that it is given
        raise
    except Exception as error:  # whatever somebody's function raises
        for answer in answers if len(answers) > 1 else []:
            _checked(scorer, [answer], what)  # which of them it is
        raise ConfigError(f"{what}: it raised {type(error).__name__}: {error}{of}") from error
    try:
        values = list(given)
    except TypeError:
        raise ConfigError(f"{what}: it returned {_shown(given)}, no list of numbers{of}") from None
    if len(values) != len(answers):
        raise ConfigError(f"{what}: it returned {len(values)} numbers for {len(answers)} answers{of}")
    return [_number(value, answer, what) for value, answer in zip(values, answers)]


def _number(value: Any, answer: Answer, what: str) -> float:
    """Python's, numpy's or torch's, of no dimension."""
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if isinstance(plain, int | float) and math.isfinite(plain):
        return float(plain)
    of = "" if answer.row < 0 else f" for row {answer.row}"
    raise ConfigError(f"{what}: it returned {_shown(value)}{of}, and a finite number is needed")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def _vader(key: str) -> Scorer:
    """The compound score, in [-1, 1]: Hutto and Gilbert 2014, "VADER: a parsimonious rule-based model for
    sentiment analysis of social media text"."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError(f"{key}: vader needs vaderSentiment: pip install 'fastdpo[learn]'") from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda answers: [analyzer.polarity_scores(answer.text)["compound"] for answer in answers]


def _of_file(file: str, function: str, key: str, rows: GivenRows) -> Scorer:
    """The user's own function(prompts, answers), or function(prompts, answers, rows). Its file is run."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {file}; a scorer is {_NAMES}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever somebody's file raises
        raise ConfigError(f"{key}: {file} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise ConfigError(f"{key}: {file} has no function {function!r}; define {function}(prompts, answers)")
    if not _wants_rows(found):
        return lambda answers: found([one.prompt for one in answers], [one.text for one in answers])

    def score(answers: Sequence[Answer]) -> Any:
        of = {number: rows(number) for number in sorted({one.row for one in answers})}
        texts = [one.prompt for one in answers], [one.text for one in answers]
        return found(*texts, rows=[of[one.row] for one in answers])

    return score


def _wants_rows(function: Callable) -> bool:
    try:
        return "rows" in inspect.signature(function).parameters
    except (TypeError, ValueError):  # of one that is not written in Python
        return False


def _of_run(name: str, label: str) -> str:
    """Of a run folder its model. Raises ModelError for an adapter."""
    folder = Path(name).expanduser()
    folder = folder / "model" if (folder / "config.yaml").exists() and (folder / "model").is_dir() else folder
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{label} is an adapter, and a reward model has to be whole: `fastdpo merge {name}`")
    return str(folder) if folder.exists() else name


class RewardModel:
    """A model with one output, of what its own chat template makes of prompt and answer; where it has none,
    or the prompt's turns are not known, of the text as the policy's template wrote it. Its first
    try is on the CPU."""

    def __init__(self, name: str, key: str = "scorer") -> None:
        label = f"{key}: {name!r}"
        source = find_source(_of_run(name, label), label, way_out=f"a scorer is {_NAMES}")
        self.device = "cpu"
        try:
            with source.reading() as (where, options):
                config = AutoConfig.from_pretrained(where, **options)
        except Exception as error:  # whatever a broken folder makes transformers raise
            raise ModelError(f"{label} has a config.json that cannot be read: {error}") from None
        if config.num_labels != 1:
            kind = ", ".join(config.architectures or ["a model of unknown kind"])
            raise ModelError(f"{label} has {config.num_labels} outputs ({kind}); a reward model has one")
        self.tokenizer = load_tokenizer(source, key)
        if config.get_text_config().pad_token_id is None:  # by which it finds a row's last token
            config.get_text_config().pad_token_id = config.pad_token_id = self.tokenizer.pad_token_id
        self.model = self._load(source, config, label)
        self.at_once = 8 if self.tokenizer.pad_token_id is not None else 1
        self.limit = getattr(config.get_text_config(), "max_position_embeddings", None)

    @no_bars()
    def _load(self, source, config, label: str) -> Any:
        load: Any = partial(AutoModelForSequenceClassification.from_pretrained, **source.options)
        dtype = resolve_dtype("auto")
        try:
            model, told = load(source.where, config=config, dtype=dtype, output_loading_info=True)
        except Exception as error:
            raise ModelError(f"{label} cannot be loaded: {type(error).__name__}: {error}") from None
        if missing := sorted(told["missing_keys"]):
            raise ModelError(
                f"{label} is no reward model: it lacks {missing[0]}, which would start at random"
            )
        return model.eval()

    @torch.no_grad()
    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        ids = [self._ids(answer) for answer in answers]
        for answer, some in zip(answers, ids):
            if self.limit is not None and len(some) > self.limit:
                raise ValueError(f"row {answer.row}: {len(some)} tokens, and it has {self.limit} positions")
        out: list[float] = []
        self.model.to(self.device)
        for start in range(0, len(ids), self.at_once):
            out += self._scored(ids[start : start + self.at_once])
        return out

    def put_aside(self) -> None:
        """Into the host's memory, where it is not used."""
        self.model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _scored(self, ids: list[list[int]]) -> list[float]:
        pad, width = self.tokenizer.pad_token_id or 0, max(map(len, ids))
        row = lambda some, fill: torch.tensor([*some, *[fill] * (width - len(some))])
        inputs = torch.stack([row(some, pad) for some in ids]).to(self.device)
        mask = torch.stack([row([1] * len(some), 0) for some in ids]).to(self.device)
        return self.model(input_ids=inputs, attention_mask=mask).logits[:, 0].float().tolist()

    def _ids(self, answer: Answer) -> list[int]:
        if answer.turns is None or not self.tokenizer.chat_template:
            return self.tokenizer(answer.raw)["input_ids"]
        turns = [*answer.turns, {"role": "assistant", "content": answer.text}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
