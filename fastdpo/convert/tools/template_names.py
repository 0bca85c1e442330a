"""Other tools' names of chat templates: which are ours, what others write, which are a tokenizer's own."""

import re
from typing import NamedTuple

from fastdpo.convert.draft import Draft
from fastdpo.convert.tools.shared import own_template


class Markup(NamedTuple):
    """A way to write turns, with {} for what is said, and {bos} and {eos}."""

    user: str  # up to where the answer begins
    answer: str
    system: str = "{}"
    first: str = ""  # before all turns
    default: str = ""  # the system prompt of a row that has none
    within: bool = False  # the system prompt stands in the first user's turn, before its words


_CHATML = Markup(
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "{}<|im_end|>\n",
    "<|im_start|>system\n{}<|im_end|>\n",
)
_LLAMA_3 = Markup(
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "{}<|eot_id|>",
    "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    "{bos}",
)
_GEMMA = Markup(
    "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n",
    "{}<end_of_turn>\n",
    "{}\n\n",
    "{bos}",
    within=True,
)
_PHI = Markup("<|user|>\n{}<|end|>\n<|assistant|>\n", "{}<|end|>\n", "<|system|>\n{}<|end|>\n")
_TASK = "Below is an instruction that describes a task. "
_TASKS = "Below are some instructions that describe some tasks. "
_ASSISTANT = "A chat between a curious user and an artificial intelligence assistant. "
_OF_OURS = {"chatml": _CHATML, "llama3": _LLAMA_3, "gemma": _GEMMA, "phi3": _PHI}

_NAMED: dict[str, dict[str, str]] = {  # each tool's name: ours
    "Axolotl": {
        "alpaca": "alpaca",
        "chatml": "chatml",
        "gemma": "gemma",
        "llama3": "llama3",
        "mistral_v1": "mistral",
        "phi_35": "phi3",
        "zephyr": "zephyr",  # of its types alone
    },
    "LLaMA-Factory": {
        **dict.fromkeys(["chatml", "qwen3_nothink", "qwen3_5_nothink", "smollm", "yi"], "chatml"),
        **dict.fromkeys(["gemma", "gemma2", "gemma3"], "gemma"),
        "llama3": "llama3",
        "phi": "phi3",
    },
    "ms-swift": {"chatml": "chatml", "llama3": "llama3"},
    "Unsloth": {
        "chatml": "chatml",
        "llama": "llama2",
        **dict.fromkeys(["llama-3", "llama3"], "llama3"),
        **dict.fromkeys(["phi-3", "phi-35", "phi-3.5"], "phi3"),
        "vicuna": "vicuna",
        "zephyr": "zephyr",
    },
}
_WRITTEN: dict[str, dict[str, Markup]] = {  # each tool's name: what it writes, where that is none of ours
    "Axolotl": {"phi_3": _PHI._replace(first="{bos}")},
    "LLaMA-Factory": {
        "alpaca": Markup(
            "### Instruction:\n{}\n\n### Response:\n",
            "{}{eos}\n\n",
            default=_TASK + "Write a response that appropriately completes the request.\n\n",
        ),
        "default": Markup("Human: {}{eos}\nAssistant:", "{}{eos}\n", "System: {}{eos}\n"),
        "empty": Markup("{}", "{}"),
        "llama2": Markup("{bos}[INST] {} [/INST]", "{}{eos}", "<<SYS>>\n{}\n<</SYS>>\n\n", within=True),
        "mistral": Markup("[INST] {}[/INST]", " {}{eos}", "{}\n\n", "{bos}", within=True),
        "vanilla": Markup("{}", "{}{eos}"),
        "vicuna": Markup(
            "USER: {} ASSISTANT:",
            "{}{eos}",
            default=_ASSISTANT
            + "The assistant gives helpful, detailed, and polite answers to the user's questions.",
        ),
        "zephyr": Markup(
            "<|user|>\n{}{eos}<|assistant|>\n",
            "{}{eos}",
            "<|system|>\n{}{eos}",
            default="You are Zephyr, a helpful assistant.",
        ),
    },
    "Unsloth": {
        "alpaca": Markup(
            "### Instruction:\n{}\n\n### Response:\n",
            "{}{eos}\n\n",
            "{}\n\n",
            "{bos}",
            default=_TASKS + "Write responses that appropriately complete each request.",
        ),
        "mistral": Markup("[INST] {} [/INST]", "{}{eos}", "{} ", "{bos}", within=True),
    },
}
_OWN: dict[str, frozenset[str]] = {  # those that a family of models has in its own tokenizers
    "Axolotl": frozenset(
        "mistral_v2v3 mistral_v3_tekken mistral_v7_tekken cohere llama3_2_vision llama4 phi_4 deepseek_v2 "
        "deepseek_v3 jamba qwen_25 qwen3 qwen3_5 falcon_h1 nemotron_h exaone exaone4 pixtral llava qwen2_vl "
        "gemma3 gemma3n gemma4 gemma4_unified command_a command_a_tool_use command_a_rag aya".split()
    ),
    "LLaMA-Factory": frozenset(
        "aquila atom baichuan baichuan2 bailing bailing_v2 belle bluelm breeze chatglm2 chatglm3 codegeex2 "
        "codegeex4 cohere cpm cpm3 cpm4 dbrx deepseek deepseek3 deepseekcoder deepseekr1 dots_ocr ernie "
        "ernie_nothink ernie_vl exaone falcon falcon_h1 gemma3n gemma4 gemma4n glm4 glm4_5v glm4_7 glm4_moe "
        "glm4v glm_ocr glmz1 gpt_oss granite3 granite3_vision granite4 hunyuan hunyuan_small hy3 "
        "hy_dense_1_8b hy_dense_7b index intern intern2 intern_s1 intern_vl keye_vl kimi_vl lfm2 lfm2_vl "
        "llama4 llava llava_next llava_next_llama3 llava_next_mistral llava_next_qwen llava_next_video "
        "llava_next_video_mistral llava_next_video_yi llava_next_yi marco mimo mimo_v2 mimo_vl minicpm_o "
        "minicpm_v minicpm_v_4_6 minimax1 minimax2 ministral ministral3 mistral_small mllama moonlight "
        "moss_vl olmo openchat openchat-3.6 opencoder orion paligemma paligemma_chat phi4 phi4_mini "
        "phi_small pixtral qwen qwen2_audio qwen2_omni qwen2_vl qwen3 qwen3_5 qwen3_6 qwen3_omni "
        "qwen3_omni_nothink qwen3_vl qwen3_vl_nothink sailor seed_coder seed_oss skywork_o1 smollm2 solar "
        "starchat telechat telechat2 video_llava xuanyuan xverse yayi yi_vl youtu youtu_vl yuan ziya".split()
    ),
    "Unsloth": frozenset(
        "gemma gemma2 llama-3.1 llama-31 llama-3.2 llama-3.3 llama-32 llama-33 qwen-2.5 qwen-25 qwen25 "
        "qwen2.5 phi-4 gemma-3 gemma3 qwen-3 qwen3 gemma-3n gemma3n gemma-4 gemma4 gpt-oss gptoss "
        "qwen3-instruct qwen3-thinking lfm-2 lfm-2.5 starling yi-chat".split()
    ),
}
_TRIMMED = "white space around a turn's words is cut, as the models' own do; {tool} keeps it"
_DIFFER = {  # by their names: what of ours is not the same
    **dict.fromkeys([("LLaMA-Factory", name) for name in ("llama3", "gemma", "gemma3")], _TRIMMED),
    ("LLaMA-Factory", "gemma2"): _TRIMMED + ", and scores an EOS after the end of a conversation",
    ("ms-swift", "llama3"): _TRIMMED,
    ("ms-swift", "chatml"): "no BOS is written; {tool} writes one where the tokenizer adds it",
}
# ms-swift's others are families', of whom there are hundreds
_PLAIN = ("default", "dummy", "modelscope_agent")
# of turns
ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "phi3": "<|end|>"}


def set_template(
    draft: Draft, key: str, name: str, of: str = "", default: str = "", own_first: str = ""
) -> None:
    """Our chat_template for what `key` of theirs names, by the table of the tool `of` (the draft's where it
    says nothing). default: what their key default_system says to rows without a system prompt. own_first:
    "default:" where the tokenizer's own comes before it."""
    of = of or draft.tool.name
    ours, markup = _NAMED[of].get(name), _WRITTEN.get(of, {}).get(name)
    if default:
        markup = _OF_OURS[ours] if ours else markup
    if markup:
        keys = (key, "default_system") if default else (key,)
        written = jinja(markup._replace(default=default or markup.default))
        draft.set("chat_template", own_first + written, *keys)
    elif ours:
        draft.set("chat_template", own_first + ours, key)
        if text := _DIFFER.get((of, name)):
            draft.check(key, text.format(tool=of))
    elif name in _OWN.get(of, ()) or (of == "ms-swift" and name not in _PLAIN):
        own_template(draft, key)
        if default:
            draft.refuse("default_system")
    else:
        draft.refuse(key)


def jinja(markup: Markup) -> str:
    """The markup as a chat template."""
    words = "(own if loop.first else '') ~ turn.content" if markup.within else "turn.content"
    lines = [
        f"{{%- set own, turns = {markup.default!r}, messages -%}}",
        "{%- if messages[0].role == 'system' -%}",
        "  {%- set own, turns = messages[0].content or own, messages[1:] -%}",
        "{%- endif -%}",
        f"{{%- set own = {_printed(markup.system, 'own')} if own else '' -%}}",
        f"{{{{- {_printed(markup.first)} -}}}}" if markup.first else "",
        "" if markup.within else "{{- own -}}",
        "{%- for turn in turns -%}",
        "  {%- if turn.role == 'user' -%}",
        f"    {{{{- {_printed(markup.user, words)} -}}}}",
        "  {%- elif turn.role == 'assistant' -%}",
        f"    {{{{- {_printed(markup.answer, 'turn.content')} -}}}}",
        "  {%- else -%}",
        "    {{- raise_exception('user and assistant are the only roles after the system prompt') -}}",
        "  {%- endif -%}",
        "{%- endfor -%}",
    ]
    return "\n".join(filter(None, lines))


def _printed(text: str, words: str = "") -> str:
    """An expression of Jinja for a part of a markup."""
    values = {"{}": words, "{bos}": "bos_token", "{eos}": "eos_token"}
    pieces = filter(None, re.split(r"(\{\w*\})", text))
    return " ~ ".join(values.get(piece, repr(piece)) for piece in pieces)
