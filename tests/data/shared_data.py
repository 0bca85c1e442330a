"""Inputs of the data tests: real tokenizers and rows from ../shared, and a tokenizer built here."""

import functools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fastdpo.data.groups import Limits

SHARED = Path(__file__).resolve().parents[3] / "shared"
DATA = SHARED / "data"
needs_shared = pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared")
FOLDERS = {
    "gpt2": "tokenizers/gpt2",
    "qwen2.5": "tokenizers/qwen2.5",
    "stories260K": "models/stories260K",
}

WIDE = Limits(100_000)


@pytest.fixture(params=[None, 3], ids=["at once", "in pieces"])
def pieces(request, monkeypatch):
    """Files are read as they are, and 3 bytes at a time."""
    if request.param:
        monkeypatch.setattr("fastdpo.data.files.stamps.PIECE", request.param)


CHATML = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' and 'refuse' in m['content'] %}{{ raise_exception('no such tool') }}"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def real_tokenizer(name: str):
    """A fresh one a call, so that a test may change its template."""
    return AutoTokenizer.from_pretrained(DATA / FOLDERS[name])


def template(name: str) -> str:
    return (DATA / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def _byte_pairs() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["wor", "world", "wor word world old gold good morning"] * 9, trainer)
    return tokenizer


def small_tokenizer(bos: bool = True, eos: bool = True, chat_template: str | None = CHATML):
    """Byte-level BPE that knows "wor" and "world"; adds <s> in front where `bos`."""
    backend = Tokenizer.from_str(_byte_pairs().to_str())
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    names = {"pad_token": "<pad>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    names |= {"bos_token": "<s>"} if bos else {}
    names |= {"eos_token": "</s>"} if eos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def write_lines(path: Path, rows: list) -> str:
    """JSON lines; a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def text_row(prompt="good", chosen=" morning", rejected=" old world"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat_row(question="good?", chosen="gold", rejected="old"):
    return {
        "prompt": [user(question)],
        "chosen": [assistant(chosen)],
        "rejected": [assistant(rejected)],
    }


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def scored_text(tokenizer, response) -> str:
    return decode(tokenizer, response.ids[response.target_mask])


def sequence(group, index=0) -> list[int]:
    return [*group.prompt.tolist(), *group.responses[index].ids.tolist()]


def check(group) -> None:
    """What every group promises to the rest."""
    assert len(group.prompt) and group.prompt.dtype == np.int64
    for response in group.responses:
        assert response.ids.dtype == np.int64 and response.target_mask.dtype == bool
        assert len(response.ids) == len(response.target_mask) and response.target_mask[-1]
    for pair in group.pairs:
        ids = [group.responses[i].ids.tolist() for i in (pair.winner, pair.loser)]
        assert ids[0] != ids[1]


def ranked_row(*responses):
    return {"prompt": "good", "responses": [{"text": t, "score": s} for t, s in responses]}


def trl_rows(tokenizer, rows: list[dict]):
    """TRL's own preparation of a data set, without a model."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DPOTrainer

    trainer = SimpleNamespace(_tokenizer=tokenizer, _is_vlm=False)
    args = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    return DPOTrainer._prepare_dataset(trainer, Dataset.from_list(rows), tokenizer, args, "train")
