"""From text to token ids, and from stretches of text to the tokens that are scored."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fastdpo.data.byte_pairs import BytePairs
from fastdpo.data.chat.scripts import Script
from fastdpo.data.one_row import panics_are_errors
from fastdpo.data.report import RowProblem
from fastdpo.data.spans import Places, closed, places_by_decoding, weigh
from fastdpo.errors import ModelError

_MERGED = 8  # tokens that a merge across a boundary may concern
_TRIAL = 1000  # texts that tiktoken has to give the same ids for before it is believed
_DIFFER = (
    "tiktoken gives other token ids than the tokenizer, so rows are tokenised by the tokenizer alone, which "
    "is slower: please report it, with the tokenizer's name"
)


class Tokens(NamedTuple):
    """Token ids, which of them are scored, and where the row says so, how relevant each is."""

    ids: np.ndarray  # i64[n]
    scored: np.ndarray  # bool[n]
    weight: np.ndarray | None = None  # f32[n]

    def repeated(self, times: np.ndarray) -> "Tokens":
        """With each token as often as that, i64[n]."""
        weight = None if self.weight is None else self.weight.repeat(times)
        return Tokens(self.ids.repeat(times), self.scored.repeat(times), weight)

    def tail(self, start: int, length: int) -> "Tokens":
        """The tokens from `start` on, of the first `length` ones, and none after the last scored one."""
        scored = np.flatnonzero(self.scored[:length])
        kept = slice(start, scored[-1] + 1 if len(scored) else start)
        # copies, so that a group of a long data set does not keep its prompt once a response
        weight = None if self.weight is None else self.weight[kept].copy()
        return Tokens(self.ids[kept].copy(), self.scored[kept].copy(), weight)


class Encoder:
    """A tokenizer without its special tokens; those it adds in front (BOS) are kept in `lead`."""

    def __init__(self, tokenizer, many: bool = False):
        """`many`: for thousands of rows, so that what makes each quicker pays."""
        self.tokenizer = tokenizer
        self._quick, self._unproven = None, _TRIAL
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        full = tokenizer("a")["input_ids"]
        starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        self.lead = np.array(full[: starts[0]] if starts else [], np.int64)
        self.special = _any_of(tokenizer)
        self.seams = self._find_seams()
        if many and tokenizer.is_fast:
            self._quick = BytePairs.of(tokenizer.backend_tokenizer)

    @panics_are_errors()
    def encode(self, texts: Iterable[str]) -> dict[str, np.ndarray]:
        """Token ids by text, without special tokens other than those that the text spells.

        A row's texts share their turns, so texts are taken apart at special tokens and each part
        is tokenised once: twice as fast on two-response conversations, and the same ids.
        """
        parts = {text: self._parts(text) for text in texts}
        ids = self._encode_parts(list({part for some in parts.values() for part in some}))
        empty = np.zeros(0, np.int64)
        return {text: np.concatenate([empty, *(ids[p] for p in some)]) for text, some in parts.items()}

    @panics_are_errors()
    def places(self, text: str, by_decoding: bool = True) -> Places | None:
        """The characters that each token of `encode` spells; a piece of a character counts as all of it. None
        where the tokenizer does not tell, `by_decoding` neither, which is slow."""
        found, before = [np.zeros((2, 0), np.int64)], 0
        for part in self._parts(text):
            ids, places = self._encode_parts([part])[part], None
            if self.tokenizer.is_fast:
                (told,) = self.tokenizer.backend_tokenizer.encode_batch([part], add_special_tokens=False)
                if np.array_equal(told.ids, ids):
                    starts, ends = np.array(told.offsets, np.int64).reshape(-1, 2).T
                    places = closed(starts, ends, part)
            if places is None and by_decoding:
                places = places_by_decoding(ids, part, self.decode)
            if places is None:
                return None
            found.append(np.stack(places) + before)
            before += len(part)
        return tuple(np.concatenate(found, axis=1))

    @panics_are_errors()
    def decode(self, ids: np.ndarray) -> str:
        return self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)

    def _parts(self, text: str) -> list[str]:
        return [part for part in (self.seams.split(text) if self.seams else [text]) if part]

    def _encode_parts(self, texts: list[str]) -> dict[str, np.ndarray]:
        quick = {} if self._quick is None else self._quick.encode(texts)
        ids = self._by_library(texts if self._unproven > 0 else [text for text in texts if text not in quick])
        if quick and self._unproven > 0:
            self._unproven -= len(quick)
            if any(quick[text] != ids[text] for text in quick):
                warnings.warn(_DIFFER, stacklevel=2)
                self._quick, quick = None, {}
        return {text: np.array(quick[text] if text in quick else ids[text], np.int64) for text in texts}

    def _by_library(self, texts: list[str]) -> dict[str, list[int]]:
        if not texts:
            return {}
        if self.tokenizer.is_fast:
            # The library below transformers' call, which spends a quarter of its time on offsets
            # and masks. The call in __init__ has reset the library's truncation and padding.
            backend = self.tokenizer.backend_tokenizer
            ids = [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return dict(zip(texts, ids))

    def _find_seams(self) -> re.Pattern | None:
        """The special tokens, if the text around each is tokenised as if it stood alone. It is not
        where a token takes white space along, or the first word of a text is spelt another way."""
        special = _special_tokens(self.tokenizer)
        if not special:
            return None
        probes = {token: ["a b ", token, " c\n", token, token, "\nd e", token] for token in special}
        wholes = {token: "".join(parts) for token, parts in probes.items()}
        ids = self._encode_parts([*wholes.values(), *{p for parts in probes.values() for p in parts}])
        for token, parts in probes.items():
            if ids[wholes[token]].tolist() != np.concatenate([ids[p] for p in parts]).tolist():
                return None
        return re.compile(f"({self.special.pattern})")


def _special_tokens(tokenizer) -> set[str]:
    """Also those that the tokenizer has no name for: Llama 3, Phi-3 and gpt-oss only list theirs as added."""
    added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    return {text for text in map(str, (*tokenizer.all_special_tokens, *added)) if text}


def _any_of(tokenizer) -> re.Pattern:
    """Matches each special token; nothing, where there are none."""
    longest_first = sorted(_special_tokens(tokenizer), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def tokenize(
    script: Script, plain: bool, ids: dict[str, np.ndarray], encoder: Encoder, notes: Counter
) -> Tokens:
    """A script's tokens. Plain text gets the tokenizer's own BOS and the
    EOS, each once even where the text spells it; a template spells its own."""
    text = script.text
    full = ids[text]
    if script.ending is not None:
        return _prompt_alone(full, script.ending, plain, ids, encoder)
    scored = np.zeros(len(full), bool)
    merged: set[str] = set()
    for start, end in script.spans:
        first = shared_length(ids[text[:start]], full)
        if first < len(ids[text[:start]]):
            first, note = _first_of_response(script, start, first, full, encoder)
            merged.add(note)
        # an end of turn that merged with what follows says more than the turn: not scored either
        scored[first : shared_length(ids[text[:end]], full)] = True
    notes.update(sorted(merged - {""}))
    if not scored.any():
        message = "a response has no token of its own to score (see the note on merged boundaries)"
        raise RowProblem("nothing_scored", "responses", message)
    lead = 0  # ids in front that the text does not hold
    if plain:
        full, scored, lead = _with_specials(full, scored, encoder)
    if script.marks is None:
        return Tokens(full, scored)
    return Tokens(full, scored, weigh(script.marks, lambda: encoder.places(text), scored, lead, notes))


def _prompt_alone(
    prompt: np.ndarray, ending: str, plain: bool, ids: dict[str, np.ndarray], encoder: Encoder
) -> Tokens:
    """A prompt, and the token that would end a response: the template's, or EOS. Each is tokenised alone."""
    end = ids[ending][-1] if ending else _eos(encoder)
    full = np.concatenate([_lead(prompt, encoder) if plain else prompt[:0], prompt, [end]])
    scored = np.zeros(len(full), bool)
    scored[-1] = True
    return Tokens(full, scored)


def _eos(encoder: Encoder) -> int:
    eos = encoder.tokenizer.eos_token_id
    if eos is None:
        raise ModelError(
            "the tokenizer has no EOS token, so plain text cannot end.\n"
            "Set eos_token in its tokenizer_config.json, or use message rows with a chat_template."
        )
    return eos


def _lead(full: np.ndarray, encoder: Encoder) -> np.ndarray:
    """The ids to add in front: those that the tokenizer adds, unless they are there."""
    return encoder.lead[:0] if np.array_equal(full[: len(encoder.lead)], encoder.lead) else encoder.lead


def _with_specials(full: np.ndarray, scored: np.ndarray, encoder: Encoder):
    """(ids, scored, how many ids were added in front)."""
    eos, lead = _eos(encoder), _lead(full, encoder)
    end = np.array([eos] if full[-1] != eos else [], np.int64)
    ids = np.concatenate([lead, full, end])
    scored = np.concatenate([np.zeros(len(lead), bool), scored, np.ones(len(end), bool)])
    return ids, scored, len(lead)


def _first_of_response(
    script: Script, start: int, first: int, full: np.ndarray, encoder: Encoder
) -> tuple[int, str]:
    """The first scored token of the response that starts at character `start`, where the tokenizer merged
    across that boundary in tokens from `first` on, and a note on it.

    A token that holds white space of the prompt and the response's beginning (" " + "blue") is the
    response's: the prompt's own tokens lack it. One with the prompt's text ("wor" + "ld") is not scored.
    """
    text = script.text
    if (places := encoder.places(text, by_decoding=False)) is None:
        return _first_by_decoding(text[:start], first, full, encoder)
    starts, ends = places
    first = int(np.searchsorted(starts, start))
    if not first or ends[first - 1] <= start:
        return first, ""
    if text[starts[first - 1] : start].isspace():
        return first - 1, "merged_white_space"
    return first, "merged_boundary"


def _first_by_decoding(prompt: str, first: int, full: np.ndarray, encoder: Encoder) -> tuple[int, str]:
    """The same where the tokenizer tells no places: by decoding, a few tokens on."""
    for end in range(first, min(first + _MERGED, len(full)) + 1):
        spelt = encoder.decode(full[:end])
        if spelt.startswith(prompt):
            if spelt == prompt:
                return end, ""
            before = encoder.decode(full[: end - 1])
            white = prompt.startswith(before) and prompt[len(before) :].isspace()
            return (end - 1, "merged_white_space") if white else (end, "merged_boundary")
    raise RowProblem("nothing_scored", "responses", "no token begins where a response begins")


def shared_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading items two id arrays share."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length
