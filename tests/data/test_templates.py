"""Every template of the corpus, with every conversation of its table: the text that is scored, by hand."""

import contextlib
import importlib
import json
from collections.abc import Iterator
from functools import partial
from itertools import product

import jinja2
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdpo.data.chat.named import NAMES, template_of
from fastdpo.data.groups import to_group
from fastdpo.data.report import RowProblem
from tests.data.shared_data import WIDE, check, decode, sequence
from tests.data.templates.case import CONVERSATIONS, FOLDER, Expected, Template

FAMILIES = sorted(p.stem for p in FOLDER.glob("*.py") if p.stem not in ("__init__", "case"))
TEMPLATES: dict[str, Template] = {}
for family in FAMILIES:
    found = importlib.import_module(f"tests.data.templates.{family}").TEMPLATES
    assert not TEMPLATES.keys() & found.keys()
    TEMPLATES |= found


def tokenizer_of(template: Template, name: str = "", text: str | None = None):
    """Bytes are tokens, and the special tokens: a text's ids spell exactly its characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in template.special])
    named = {"eos_token": template.eos, "additional_special_tokens": list(template.special)}
    named |= {"bos_token": template.bos} if template.bos else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **named)
    tokenizer.chat_template = text or _text_of(template.file or name)
    return tokenizer


def _text_of(name: str) -> str:
    return template_of(name if name in NAMES else str(FOLDER / f"{name}.jinja"), None)


def row_of(name: str, conversation: str) -> dict:
    return CONVERSATIONS[conversation] | {"chat_template_kwargs": TEMPLATES[name].kwargs}


def scored_turns(tokenizer, response) -> tuple[str, ...]:
    """The runs of scored tokens, as text."""
    runs, ids, mask = [], response.ids, response.target_mask
    for i in range(len(ids)):
        if mask[i]:
            if i == 0 or not mask[i - 1]:
                runs.append([])
            runs[-1].append(ids[i])
    return tuple(decode(tokenizer, run) for run in runs)


@pytest.mark.parametrize("name, conversation", [(n, c) for n, t in TEMPLATES.items() for c in t.table])
def test_what_is_scored(name, conversation):
    row, tokenizer = row_of(name, conversation), tokenizer_of(TEMPLATES[name], name)
    expected = TEMPLATES[name].table[conversation]
    expected = expected if isinstance(expected, Expected) else Expected(expected)
    if isinstance(expected.scored, str):
        with pytest.raises(RowProblem) as problem:
            to_group(row, 0, tokenizer, WIDE)
        assert problem.value.reason == expected.scored
        return
    group, notes = to_group(row, 0, tokenizer, WIDE)
    check(group)
    assert tuple(scored_turns(tokenizer, response) for response in group.responses) == expected.scored
    assert dict(notes) == expected.notes
    for i, side in enumerate(("chosen", "rejected")):
        if "prompt_as_for_generation" not in notes:
            ids = sequence(group, i)
            assert ids in [whole[: len(ids)] for whole in template_ids(tokenizer, row, side)]


def template_ids(tokenizer, row: dict, side: str) -> Iterator[list[int]]:
    """The template's own ids of the whole conversation, with its tool calls in each form that it takes."""
    messages, tools = row["prompt"] + row[side], row.get("tools")
    for form in product((lambda x: x, partial(json.dumps, ensure_ascii=False)), ("", None)):
        turns = [with_calls(message, *form) for message in messages]
        with contextlib.suppress(TypeError, jinja2.TemplateError):
            yield tokenizer.apply_chat_template(
                turns, tools=tools, return_dict=False, **row["chat_template_kwargs"]
            )


def with_calls(message: dict, form, content: str | None) -> dict:
    if "tool_calls" not in message:
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [
        {**call, "function": {**function, "arguments": form(function["arguments"])}}
        for call, function in zip(message["tool_calls"], functions)
    ]
    return {**message, "content": message["content"] or content, "tool_calls": calls}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_tried_with_every_conversation(name):
    assert TEMPLATES[name].table.keys() == CONVERSATIONS.keys()
