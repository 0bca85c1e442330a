"""Rows of text with the lengths of a mix, written block by block; the model folder they are read with."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.lengths import PairLengths, draw

BLOCK = 2000  # rows that are drawn at once
WORDS = 4096  # at most
WORD = re.compile(r"Ġ[a-z]{2,}")  # of a byte-level vocabulary, with the space before it: one token
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def words_of(tokenizer) -> list[str]:
    """Words that are one token behind a space, the most frequent first, as ids go."""
    ids = sorted((number, token) for token, number in tokenizer.get_vocab().items() if WORD.fullmatch(token))
    return [token[1:] for _, token in ids[:WORDS]]


def write_rows(path: Path, mix: str, n: int, words: list[str]) -> int:
    """n rows {"prompt", "chosen", "rejected"}, each a list of messages, as JSON lines; returns their words.
    Those of fewer rows are the beginning of those of more."""
    total = 0
    with path.open("w", encoding="utf-8") as file:
        for block in range(-(-n // BLOCK)):
            lengths = draw(mix, BLOCK, seed=block)[: n - BLOCK * block]
            total += sum(map(sum, lengths))
            file.writelines(_lines(lengths, words, block))
    return total


def _lines(lengths: list[PairLengths], words: list[str], seed: int) -> Iterator[str]:
    """Words drawn as in a language: the n-th is n times rarer than the first."""
    share = np.cumsum(1 / np.arange(1, len(words) + 1))
    random = np.random.Generator(np.random.PCG64(seed))
    drawn = np.searchsorted(share, random.random(int(np.sum(lengths))) * share[-1])
    text, at = np.array(words, object)[drawn].tolist(), 0
    for row in lengths:
        parts = []
        for role, size in zip(("user", "assistant", "assistant"), row):
            parts.append([{"role": role, "content": " ".join(text[at : at + size])}])
            at += size
        yield json.dumps(dict(zip(("prompt", "chosen", "rejected"), parts))) + "\n"


def make_model(folder: Path, tokenizer: Path | None) -> str:
    """A folder with the tokenizer and a model of a few weights, as a run takes it; returns whose tokenizer it
    is. Without one: trained on words that are made up."""
    made = AutoTokenizer.from_pretrained(tokenizer) if tokenizer else _trained()
    made.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    sizes |= dict(num_key_value_heads=1, max_position_embeddings=8192, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=len(made), eos_token_id=made.eos_token_id, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)  # all tokens are alike to it: see contenders.fill
    model.save_pretrained(folder)
    return tokenizer.name if tokenizer else "a byte-level BPE of made-up words"


def _trained() -> PreTrainedTokenizerFast:
    random = np.random.Generator(np.random.PCG64(0))
    parts = ["ba", "de", "fi", "go", "lu", "ka", "me", "ni", "ro", "sa", "ti", "vo"]
    made = [" " + "".join(random.choice(parts, 1 + i % 3)) for i in range(500)]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(made, trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    out.chat_template = CHATML
    return out
