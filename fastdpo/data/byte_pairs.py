"""Byte-level BPE by tiktoken, which gives the ids of Hugging Face's tokenizers in less time.

Both cut a text into pieces by a pattern and merge the bytes of each piece by rank. That the ids are the same
is known, not hoped for, where
1. the pattern is one whose pieces the tests compare, and reads characters of which every version of Unicode
   says the same (the two libraries know different ones);
2. merges are ranked as the ids of what they make, and each is of tokens with lower ids;
3. tiktoken is given the tokens alone that merging makes of their own bytes. It merges any two tokens that
   together are one, tokenizers only the pairs that it lists. Two tokens of which no merge has crossed the
   outer bounds are what merging the same bytes alone comes to, so that the pair which is not listed never
   stands there.
"""

import functools
import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer
from tokenizers.models import BPE

_ENDS = r"'s|'t|'re|'ve|'m|'ll|'d"
_GPT2 = rf"{_ENDS}| ?\p{{L}}+| ?\p{{N}}+| ?[^\s\p{{L}}\p{{N}}]+|\s+(?!\S)|\s+"
# Digits are cut off before, one by one: white space in front of one is that at the end of a text.
_DIGITS = rf"{_ENDS}| ?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+|\s+(?![^\s\p{{N}}])|\s+"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = rf"(?i:{_ENDS})|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
    rf"|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
PATTERNS = {
    "Qwen 2": rf"{_WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "Qwen 3.5": rf"(?i:{_ENDS})|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "cl100k, Llama 3": rf"{_WORD}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
    "o200k": _CASED.replace("{0}", f"(?i:{_ENDS})?").replace("{1}", "{1,3}"),
    "Tekken": _CASED.replace("{0}", "").replace("{1}", ""),
}
_LONGEST = 100_000  # characters: tiktoken panics on a million of white space


class BytePairs:
    """A tokenizer's ids, without special tokens, of the texts of which they are known."""

    def __init__(self, backend: Tokenizer, core: tiktoken.Encoding, added: Iterable[str]):
        self._normalizer, self._core = backend.normalizer, core
        self._added = re.compile("|".join(map(re.escape, added)) or r"(?!)")

    @classmethod
    def of(cls, backend: Tokenizer) -> "BytePairs | None":
        """None where it is not known to give the same ids."""
        try:
            told = json.loads(backend.to_str())
        except Exception:  # just that, from Rust: a part that is written in Python has no text
            return None
        pattern, model = _pattern(told["pre_tokenizer"]), told["model"]
        if pattern is None or (told["normalizer"] or {"type": "NFC"})["type"] != "NFC":
            return None
        added = [token["content"] for token in told["added_tokens"]]
        del told  # tens of megabytes, as is what else is not needed for long
        if (ranks := _ranks(model)) is None:
            return None
        core = tiktoken.Encoding("", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        ranks.clear()  # it has made its own of them
        return cls(backend, core, added)

    def encode(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """The ids by text, of those texts of which they are known."""
        found = {}
        for text in texts:
            plain = self._plain(text)
            if plain is not None:
                found[text] = self._core.encode_ordinary(plain)
        return found

    def _plain(self, text: str) -> str | None:
        """The text as it is cut into pieces; None for one that tiktoken might read otherwise."""
        if len(text) > _LONGEST or self._added.search(text):
            return None
        if text.isascii():
            return text
        if self._normalizer is not None:
            text = self._normalizer.normalize_str(text)
        if self._added.search(text) or not all(map(_is_settled, set(text))):
            return None
        return text


@functools.cache
def _is_settled(character: str) -> bool:
    """Whether a pattern reads it alike whatever version of Unicode it is read by: a letter, a mark, a number
    or white space has always been one, what is none of them never was; what is not assigned may be any."""
    before, now = unicodedata.ucd_3_2_0.category(character), unicodedata.category(character)
    return now not in ("Cn", "Cs") and (before == now or not {before[0], now[0]} & set("LMNZ"))


def _pattern(told: dict[str, Any] | None) -> str | None:
    """What cuts a text into the pieces that a pre-tokenizer cuts it into."""
    *first, last = (told or {}).get("pretokenizers", [told])
    if last is None or last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        return _GPT2 if not first else _DIGITS if first == [_EACH_DIGIT] else None
    pattern = first[0].pop("pattern", {}).get("Regex") if len(first) == 1 else None
    return pattern if first == [_SPLIT] and pattern in PATTERNS.values() else None


_EACH_DIGIT = {"type": "Digits", "individual_digits": True}
_SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}


def _ranks(model: dict[str, Any]) -> dict[bytes, int] | None:
    """The ids of tokens that merging makes of their own bytes; None where ids do not rank the merges, or no
    token stands for a byte."""
    ids, affixes = model["vocab"], ("continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or model["dropout"] or any(model[affix] for affix in affixes):
        return None
    merges, letters = [tuple(pair) for pair in model.pop("merges")], _letters()
    made = np.fromiter((ids[a + b] for a, b in merges), np.int64)
    parts = np.fromiter((max(ids[a], ids[b]) for a, b in merges), np.int64)
    if (np.diff(made) < 0).any() or (made <= parts).any() or not letters.keys() <= ids.keys():
        return None
    merging = BPE(ids, merges)
    del merges
    whole = [token for token in ids if letters.keys() >= set(token) and len(merging.tokenize(token)) == 1]
    if model["ignore_merges"] and len(whole) < len(ids):
        return None  # a piece that is a token is that token, whatever merging makes of it
    table = str.maketrans(letters)
    return {token.translate(table).encode("latin-1"): ids[token] for token in whole}


def _letters() -> dict[str, str]:
    """GPT-2's letters for the 256 bytes, and the characters with these numbers."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = sorted({*range(256)} - {*shown})
    return {chr(byte): chr(byte) for byte in shown} | {chr(256 + i): chr(b) for i, b in enumerate(hidden)}
