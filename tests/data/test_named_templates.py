"""chat_template: a file, Jinja text or a name; what each means, and what a tokenizer makes of it. What every
named template scores is in test_templates.py."""

from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console
from transformers.utils.chat_template_utils import render_jinja_template

from fastdpo.api import train
from fastdpo.config.keys import FIELDS, Config
from fastdpo.data.chat.named import _TOKENS, NAMES, file_of, in_pieces, template_of
from fastdpo.data.groups import to_group
from fastdpo.errors import ConfigError
from fastdpo.model.loading import load_tokenizer
from tests.data.shared_data import WIDE
from tests.data.templates.case import CONVERSATIONS, Template
from tests.data.test_templates import TEMPLATES, scored_turns, tokenizer_of
from tests.tiny import rows, save_model, write_jsonl

QUIET = Console(quiet=True)
TEXT = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
TALK = [
    {"role": "system", "content": "be"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "r"},
]
PRINTED = {  # TALK with the generation prompt
    "alpaca": "<s>be\n\n### Instruction:\nq\n\n### Response:\na</s>\n\n"
    "### Instruction:\nr\n\n### Response:\n",
    "chatml": "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
    "<|im_start|>assistant\na<|im_end|>\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<s><start_of_turn>user\nbe\n\nq<end_of_turn>\n<start_of_turn>model\na<end_of_turn>\n"
    "<start_of_turn>user\nr<end_of_turn>\n<start_of_turn>model\n",
    "llama2": "<s>[INST] <<SYS>>\nbe\n<</SYS>>\n\nq [/INST] a </s><s>[INST] r [/INST]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nbe<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\na<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nr<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] be\n\nq [/INST] a</s> [INST] r [/INST]",
    "phi3": "<|system|>\nbe<|end|>\n<|user|>\nq<|end|>\n<|assistant|>\na<|end|>\n"
    "<|user|>\nr<|end|>\n<|assistant|>\n",
    "vicuna": "<s>be USER: q ASSISTANT: a</s>USER: r ASSISTANT:",
    "zephyr": "<|system|>\nbe</s>\n<|user|>\nq</s>\n<|assistant|>\na</s>\n<|user|>\nr</s>\n<|assistant|>\n",
}


def printed(name: str, messages: list, **more) -> str:
    text, _ = render_jinja_template([messages], chat_template=template_of(name, None), **more)
    return text[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_name_prints(name):
    known = {"bos_token": "<s>", "eos_token": "</s>"}
    assert printed(name, TALK, add_generation_prompt=True, **known) == PRINTED[name]
    answered = printed(name, TALK[:3], **known)
    assert PRINTED[name].startswith(answered)
    assert "<s>" not in printed(name, TALK[:2], eos_token="</s>")  # of a tokenizer without BOS
    assert name in TEMPLATES  # whose scored text is known
    assert name in FIELDS["chat_template"].metadata["doc"]


def test_vicuna_has_its_own_system_prompt():
    text = printed("vicuna", TALK[1:2], add_generation_prompt=True)
    assert text.startswith(
        "A chat between a curious user and an artificial intelligence assistant. The assistant"
    )
    assert text.endswith("answers to the user's questions. USER: q ASSISTANT:")


def test_a_file_comes_before_a_name_and_text_before_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert template_of(TEXT, "own") == TEXT and file_of(TEXT) is None
    assert "<|im_start|>" in template_of("chatml", "own") and file_of("chatml") is None
    (tmp_path / "chatml").write_text("of a file")
    assert template_of("chatml", "own") == "of a file" and file_of("chatml") == "chatml"
    assert file_of("default:t.jinja") == "t.jinja" and file_of(None) is None


def test_the_tokenizer_s_own_may_come_first():
    assert template_of("default:chatml", "own") == "own"
    assert template_of("default:chatml", None) == template_of("chatml", None)
    assert template_of(f"default:{TEXT}", None) == TEXT


def test_what_is_neither(tmp_path):
    with pytest.raises(
        ConfigError, match=r"'chatlm' is neither a file.* one of alpaca, .*Did you mean 'chatml'"
    ):
        template_of("chatlm", "own")
    with pytest.raises(ConfigError, match="cannot read the file"):
        template_of(str(tmp_path), "own")


# ---- a tokenizer that does not know the markup's tokens


def without_its_tokens(name: str):
    known = ("<s>", "</s>")
    return tokenizer_of(Template(eos="</s>", bos="<s>", special=known, table={}), name)


@pytest.mark.parametrize("name", _TOKENS)
def test_tokens_that_a_tokenizer_does_not_know_are_counted(name):
    tokenizer = without_its_tokens(name)
    assert in_pieces(name, tokenizer) == {text: len(text) for text in _TOKENS[name]}  # bytes are its tokens
    assert in_pieces(name, tokenizer_of(TEMPLATES[name], name)) == {}
    tokenizer.chat_template = "own"  # which came first
    assert in_pieces(f"default:{name}", tokenizer) == {}
    assert in_pieces(TEXT, tokenizer) == in_pieces("t.jinja", tokenizer) == {}


@pytest.mark.parametrize("name", _TOKENS)
@pytest.mark.parametrize("conversation", ["plain", "two_answers"])
def test_then_the_same_text_is_scored(name, conversation):
    tokenizer = without_its_tokens(name)
    group, notes = to_group(CONVERSATIONS[conversation], 0, tokenizer, WIDE)
    scored = tuple(scored_turns(tokenizer, response) for response in group.responses)
    assert scored == TEMPLATES[name].table[conversation] and not notes


# ---- a run


def test_it_is_said_and_saved(tmp_path):
    said = StringIO()
    config = Config(model=str(save_model(tmp_path / "model")), data="d", chat_template="gemma")
    tokenizer = load_tokenizer(config, Console(file=said, width=200))
    line = said.getvalue()
    assert line.startswith("chat_template: no single tokens of this tokenizer: <start_of_turn> (")
    assert line.count("\n") == 1
    tokenizer.save_pretrained(tmp_path / "saved")
    assert "<start_of_turn>" in (tmp_path / "saved/chat_template.jinja").read_text()


def test_a_run_goes_on_with_its_template_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args: None)
    turn = lambda role, text: [{"role": role, "content": text}]
    talks = [
        {"prompt": turn("user", r["prompt"])}
        | {name: turn("assistant", r[name]) for name in ("chosen", "rejected")}
        for r in rows(4)
    ]
    config = Config(
        model=str(save_model(tmp_path / "model")),
        data=str(write_jsonl(tmp_path / "rows.jsonl", talks)),
        output_dir=str(tmp_path / "run"),
        chat_template=str(tmp_path / "a.jinja"),
        batch_size=2,
        max_length=128,
        max_steps=1,
        save_steps=1,
        samples=0,
        dtype="fp32",
    )
    (tmp_path / "a.jinja").write_text(template_of("zephyr", None))
    train(config, QUIET)
    (tmp_path / "a.jinja").unlink()
    resumed = replace(config, resume=True, max_steps=2)
    with pytest.raises(ConfigError, match=r"chat_template: '.*a.jinja' is neither a file"):
        train(resumed, QUIET)
    with pytest.raises(ConfigError, match=r"data: the rows .or the tokenizer. are no longer those"):
        train(replace(resumed, chat_template="alpaca"), QUIET)
    for given in ("zephyr", template_of("zephyr", None)):
        folder = train(replace(resumed, chat_template=given), QUIET)
        assert (folder / "model/chat_template.jinja").read_text() == template_of("zephyr", None)
        resumed = replace(resumed, max_steps=3)
    assert len((folder / "metrics.jsonl").read_text().splitlines()) >= 3
