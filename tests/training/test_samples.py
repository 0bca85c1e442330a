"""Greedy completions through transformers' own generate, and a policy left as it was."""

import copy
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AddedToken, GenerationConfig

from fastdpo.data.images.expansion import Expander
from fastdpo.model import support
from fastdpo.model.policy import Policy
from fastdpo.sampling.said import said, turns_of
from fastdpo.training.samples import complete
from tests import images, tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tokenizer()


def policy_of(tokenizer, model_type="llama", **overrides):
    return tiny.policy(model_type, vocab_size=len(tokenizer), **overrides)


def groups(tokenizer):
    return tiny.groups(vocab=len(tokenizer))


def silent():
    return Console(file=io.StringIO(), width=200)


@torch.no_grad()
def greedy(policy, prompt, n, ends):
    """The definition: one token at a time, the whole text again each time, no cache and no padding."""
    ids = torch.tensor([prompt.tolist()])
    policy.model.eval()
    with policy.stock() as model:
        for _ in range(n):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            if int(ids[0, -1]) in ends:
                break
    policy.model.train()
    return [i for i in ids[0, len(prompt) :].tolist() if i not in ends]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "gemma2"])
def test_each_prompt_is_completed_as_if_alone(tokenizer, model_type):
    """Prompts of 1 to 20 tokens in one left-padded call, on a policy whose prompts are shared."""
    policy, four = policy_of(tokenizer, model_type), groups(tokenizer)
    support.prepare(policy, four, silent())
    rows = complete(policy, tokenizer, four, max_new_tokens=12)
    ends = {2, tokenizer.eos_token_id}
    for group, row in zip(four, rows):
        expected = tokenizer.decode(greedy(policy, group.prompt, 12, ends), skip_special_tokens=True)
        assert row["completion"] == expected.strip()
        assert row["row"] == group.row
        assert row["prompt"] == tokenizer.decode(group.prompt, skip_special_tokens=True).strip()
        chosen = group.responses[group.chosen[0]].ids
        assert row["chosen"] == tokenizer.decode(chosen, skip_special_tokens=True).strip()


class Spelling:
    """A tokenizer whose tokens are words; some are special."""

    def __init__(self, special):
        self.words: list[str] = []
        self.special = special

    def ids(self, *words):
        self.words += [word for word in words if word not in self.words]
        return [self.words.index(word) for word in words]

    @property
    def added_tokens_decoder(self):
        return {
            i: AddedToken(word, special=True) for i, word in enumerate(self.words) if word in self.special
        }

    def convert_ids_to_tokens(self, ids):
        return [self.words[i] for i in ids]

    def decode(self, ids):
        return "".join(self.convert_ids_to_tokens(ids))


SAID = [("system", "Be kind."), ("user", "Hello\nthere"), ("assistant", "Hi."), ("user", "user")]
TEMPLATES = {  # what stands before a turn's text, and after it
    "ChatML": (lambda role: ["<|im_start|>", f"{role}\n"], ["<|im_end|>", "\n"]),
    "Llama 3": (lambda role: ["<|start_header_id|>", role, "<|end_header_id|>", "\n\n"], ["<|eot_id|>"]),
    "Phi": (lambda role: [f"<|{role}|>", "\n"], ["<|end|>", "\n"]),
    "DeepSeek": (lambda role: [f"<｜{role.title()}｜>"], []),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_turns_have_their_roles(name):
    before, after = TEMPLATES[name]
    words = [word for role, text in SAID for word in (*before(role), text, *after)] + before("assistant")
    spelling = Spelling({word for word in words if word[:1] == "<"})
    turns = turns_of(spelling, spelling.ids(*words))
    assert [(turn["role"], turn["content"]) for turn in turns] == SAID


def test_an_empty_turn_and_a_special_token_inside_one():
    spelling = Spelling({"<|im_start|>", "<|im_end|>", "<|image|>"})
    empty = ["<|im_start|>", "system\n", "<|im_end|>", "\n"]
    ids = spelling.ids(*empty, "<|im_start|>", "user\nSee", "<|image|>", "this", "<|im_end|>", "\n")
    assert turns_of(spelling, ids) == [{"role": "user", "content": "See\nthis"}]


def test_turns_without_a_role_are_not_guessed():
    spelling = Spelling({"<s>", "[INST]", "[/INST]", "</s>"})
    ids = spelling.ids("<s>", "[INST]", " Why?", "[/INST]", " So.", "</s>", "[INST]", " And?", "[/INST]")
    roles = ["user", "assistant", "user"]
    assert [turn["role"] for turn in turns_of(spelling, ids)] == roles
    assert turns_of(spelling, spelling.ids("<s>", "Once upon a time")) is None
    assert turns_of(spelling, spelling.ids("Once", " upon")) is None


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("family", images.FAMILIES)
def test_an_image_is_one_word_of_a_prompt(family, special):
    """Also where a tokenizer does not call an image's tokens special."""
    processor = copy.copy(images.processor(family))
    processor.tokenizer = images.tokenizer(family)
    if not special:
        tokens = [AddedToken(t, special=False) for t in images.TOKENS[family].values()]
        processor.tokenizer.add_tokens(tokens)
    first = processor.tokenizer.convert_tokens_to_ids(next(iter(images.TOKENS[family].values())))
    assert processor.tokenizer.added_tokens_decoder[first].special == special
    group = images.groups(family)[1]
    told = said(processor.tokenizer, group, Expander(processor))
    bare = told["prompt"].replace("<|vision_start|>", "").replace("<|vision_end|>", "")  # the template's
    assert bare.split() == "the old cat <image> sees a red bird <image> sees a red bird".split()
    assert told["turns"] is None
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "dog"}]}
    text = processor.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    ids = processor(images=[[group.images[0].open()]], text=[text])["input_ids"][0]
    one = replace(group, prompt=np.array(ids), images=group.images[:1])
    (turn,) = said(processor.tokenizer, one, Expander(processor))["turns"]
    bare = turn["content"].replace("<|vision_start|>", "").replace("<|vision_end|>", "")
    assert turn["role"] == "user" and bare.replace("\n", "") == "<image>dog"


def test_nothing_of_the_policy_changes(tokenizer):
    policy = policy_of(tokenizer)
    policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    sampling = GenerationConfig(do_sample=True, temperature=0.7, repetition_penalty=1.3, eos_token_id=2)
    policy.model.generation_config = sampling
    support.prepare(policy, groups(tokenizer), silent())
    weights = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    attention, random = policy.core.config._attn_implementation, torch.get_rng_state()
    first = complete(policy, tokenizer, groups(tokenizer), max_new_tokens=8)
    assert torch.equal(torch.get_rng_state(), random)
    assert policy.model.training and policy.model.is_gradient_checkpointing
    assert policy.model.generation_config is sampling and sampling.do_sample
    assert policy.core.config._attn_implementation == attention and policy.share
    assert all(torch.equal(p, weights[name]) for name, p in policy.model.named_parameters())
    assert all(p.grad is None for p in policy.model.parameters())
    assert complete(policy, tokenizer, groups(tokenizer), max_new_tokens=8) == first
    policy.model.generation_config = GenerationConfig(eos_token_id=2)
    assert complete(policy, tokenizer, groups(tokenizer), max_new_tokens=8) == first  # the penalty had no say


def test_a_lora_has_its_say(tokenizer):
    peft = pytest.importorskip("peft")
    policy = policy_of(tokenizer)
    before = complete(policy, tokenizer, groups(tokenizer), max_new_tokens=8)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    lora = Policy(peft.get_peft_model(policy.model, config).train(), torch.float32)
    assert complete(lora, tokenizer, groups(tokenizer), max_new_tokens=8) == before
    for name, parameter in lora.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    assert complete(lora, tokenizer, groups(tokenizer), max_new_tokens=8) != before


def test_bf16_autocast(tokenizer):
    policy = policy_of(tokenizer)
    policy.dtype = torch.bfloat16
    assert len(complete(policy, tokenizer, groups(tokenizer), max_new_tokens=4)) == 5


def test_stops_at_the_end_of_turn(tokenizer):
    """An end of turn that is neither the tokenizer's nor the model's EOS, known from the responses."""
    policy, end = policy_of(tokenizer), tokenizer.convert_tokens_to_ids("<|im_start|>")
    (group,) = groups(tokenizer)[:1]
    response = group.responses[0]
    ended = tiny.group(0, 13, [7, 1], vocab=len(tokenizer))
    response = type(response)(np.append(ended.responses[0].ids, end), np.ones(8, bool))
    ended = type(group)(0, group.prompt, (response, ended.responses[1]), group.pairs)
    bias = torch.zeros(len(tokenizer))
    bias[end] = 1e4
    policy.head.module.register_forward_hook(lambda module, inputs, out: out + bias)
    assert complete(policy, tokenizer, [ended], max_new_tokens=8)[0]["completion"] == ""
    assert complete(policy, tokenizer, [group], max_new_tokens=8)[0]["completion"] == ""  # special: not shown


def test_never_past_the_models_positions(tokenizer):
    """gpt2 has a table of positions: one more is an error, and on a GPU the end of the process."""
    policy = policy_of(tokenizer, "gpt2", n_positions=24)
    lengths = {}
    policy.core.generate, stock = None, policy.core.generate

    def generate(input_ids, max_new_tokens, **arguments):
        lengths[len(input_ids)] = input_ids.shape[1] + max_new_tokens
        return stock(input_ids=input_ids, max_new_tokens=max_new_tokens, **arguments)

    policy.core.generate = generate
    rows = complete(policy, tokenizer, groups(tokenizer), max_new_tokens=8)
    assert len(rows) == 5 and all(total <= 24 for total in lengths.values())
    assert lengths == {4: 13 + 8, 1: 24}  # the prompt of 20 tokens goes alone


def test_a_model_that_cannot_generate_costs_only_its_samples(tokenizer):
    policy, console = policy_of(tokenizer), silent()

    def generate(**_):
        raise TypeError("this model has [no] generate")

    policy.core.generate = generate
    config = policy.core.generation_config
    assert complete(policy, tokenizer, groups(tokenizer), console=console) == []
    assert "no sample completions: TypeError: this model has [no] generate" in console.file.getvalue()
    assert policy.model.training and policy.core.generation_config is config
