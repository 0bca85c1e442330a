"""Other tools' names of chat templates: what each becomes, and what the written ones print."""

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from fastdpo.convert.draft import Draft
from fastdpo.convert.rules import Tool
from fastdpo.convert.tools import template_names
from fastdpo.convert.tools.template_names import Markup, jinja, set_template
from fastdpo.data.chat.named import NAMES, template_of

ASKED = [{"role": "user", "content": " q\n"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "a "}]
TALK = [{"role": "system", "content": "be"}, *ANSWERED, {"role": "user", "content": "r"}]


def draft_of(name: str, of: str, **more) -> Draft:
    tool = Tool(of, "", {}, (), {}, reasons={"template": "no template", "default_system": "no key"})
    draft = Draft(
        tool, {"template": name} | ({"default_system": more["default"]} if "default" in more else {}), {}
    )
    set_template(draft, "template", name, **more)
    return draft


def printed(template: str, messages: list, **more) -> str:
    text, _ = render_jinja_template([messages], chat_template=template, **more)
    return text[0]


@pytest.mark.parametrize(
    "of, name, ours",
    [
        ("Axolotl", "phi_35", "phi3"),
        ("Axolotl", "mistral_v1", "mistral"),
        ("LLaMA-Factory", "qwen3_nothink", "chatml"),
        ("ms-swift", "chatml", "chatml"),
        ("Unsloth", "llama", "llama2"),
    ],
)
def test_names_that_are_ours(of, name, ours):
    draft = draft_of(name, of)
    assert draft.ours == {"chat_template": ours}
    assert draft.notes[0] == f"template {name} -> chat_template {ours}"


def test_every_name_of_ours_is_one():
    named = {ours for names in template_names._NAMED.values() for ours in names.values()}
    assert named <= {*NAMES} and template_names._OF_OURS.keys() <= {*NAMES}
    for of, own in template_names._OWN.items():
        assert not own & {*template_names._NAMED[of], *template_names._WRITTEN.get(of, {})}


def test_what_keeps_white_space_is_said():
    assert any("white space around" in note for note in draft_of("llama3", "LLaMA-Factory").notes)
    assert not any("white space" in note for note in draft_of("llama3", "Unsloth").notes)


def test_a_family_s_own_is_the_tokenizer_s_and_others_are_problems():
    draft = draft_of("qwen", "LLaMA-Factory")
    assert not draft.ours and draft.notes[0].startswith("check: template qwen: left out, the tokenizer's own")
    assert not draft_of("some", "ms-swift").problems
    assert draft_of("default", "ms-swift").problems
    assert draft_of("quen", "LLaMA-Factory").problems == ["template: quen: no template"]


def test_the_tokenizer_s_own_may_come_first():
    assert draft_of("chatml", "Axolotl", own_first="default:").ours == {"chat_template": "default:chatml"}
    given = draft_of("phi_3", "Axolotl", own_first="default:").ours["chat_template"]
    assert template_of(given, "own") == "own"
    assert (
        printed(template_of(given, None), ASKED, bos_token="<s>")
        == "<s><|user|>\n q\n<|end|>\n<|assistant|>\n"
    )


def test_a_default_system_prompt():
    given = draft_of("yi", "LLaMA-Factory", default="it's so").ours["chat_template"]
    asked = "<|im_start|>user\n q\n<|im_end|>\n<|im_start|>assistant\n"
    assert printed(given, ASKED) == "<|im_start|>system\nit's so<|im_end|>\n" + asked
    assert printed(given, TALK[:2]) == "<|im_start|>system\nbe<|im_end|>\n" + asked
    empty = [{"role": "system", "content": ""}, *ASKED]
    assert printed(given, empty) == printed(given, ASKED)
    assert (
        draft_of("vicuna", "LLaMA-Factory", default="D ")
        .ours["chat_template"]
        .startswith("{%- set own, turns = 'D '")
    )
    assert draft_of("qwen", "LLaMA-Factory", default="D").problems == ["default_system: D: no key"]


def test_what_a_markup_prints():
    known = {"bos_token": "<s>", "eos_token": "</s>"}
    markup = Markup("<{}>:", " {}{eos}", "[{}]\n", "{bos}")
    assert printed(jinja(markup), TALK, **known) == "<s>[be]\n< q\n>: a </s><r>:"
    assert printed(jinja(markup), ANSWERED, **known) == "<s>< q\n>: a </s>"
    assert printed(jinja(markup), ASKED) == "< q\n>:"  # of a tokenizer without BOS
    within = markup._replace(user="{bos}<{}>:", first="", within=True)
    assert printed(jinja(within), TALK, **known) == "<s><[be]\n q\n>: a </s><s><r>:"
    with pytest.raises(Exception, match="user and assistant are the only roles"):
        printed(jinja(markup), [{"role": "tool", "content": "x"}], **known)
