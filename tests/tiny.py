"""Small random things that several tests need."""

import json
import random

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastdpo.model.loading import switch_off_dropout
from fastdpo.model.policy import Policy
from fastdpo.records import Pair, PreferenceGroup, Response

VOCAB = 131
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the a one red blue old cat dog bird house tree sees likes finds near under with no".split()


def group(row, n_prompt, lengths, seed=0, pairs=None, vocab=VOCAB):
    """A group of random ids; responses longer than 3 have two tokens that are not scored."""
    draw = np.random.default_rng([seed, row])
    responses = []
    for n in lengths:
        mask = np.ones(n, bool)
        if n > 3:
            mask[[0, 2]] = False
        responses.append(Response(draw.integers(3, vocab, n), mask))
    if pairs is None:
        pairs = [Pair(0, j) for j in range(1, len(lengths))]
    return PreferenceGroup(row, draw.integers(3, vocab, n_prompt), tuple(responses), tuple(pairs))


def groups(vocab=VOCAB):
    """N = 1..4 responses, one-token prompts and responses, prompts longer than the tests' windows."""
    shapes = [(13, [7, 1]), (1, [1, 1]), (9, [4, 12, 1, 6]), (20, [5]), (3, [2, 9, 8])]
    return [group(row, *shape, vocab=vocab) for row, shape in enumerate(shapes)]


def model_config(model_type, **overrides):
    """A two-layer config with weights large enough that a wrong mask shows in the first digits."""
    if model_type == "gpt2":
        sizes = dict(n_embd=64, n_layer=2, n_head=4, n_positions=256)
    elif model_type == "opt":
        sizes = dict(hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(max_position_embeddings=256, word_embed_proj_dim=64)
    else:
        sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
        sizes |= dict(num_attention_heads=4, max_position_embeddings=256)
        if model_type != "gpt_neox":
            sizes["num_key_value_heads"] = 2
    sizes |= dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    sizes["init_std" if model_type == "opt" else "initializer_range"] = 0.1
    config = AutoConfig.for_model(model_type, **(sizes | overrides))
    switch_off_dropout(config)
    return config


def policy(model_type="llama", dtype=torch.float32, **overrides):
    """A random policy whose prompts are not shared yet (`policy.set_sharing`, `support.prepare`)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(model_type, **overrides)).to(dtype)
    return Policy(model.train(), dtype)


def sentence(draw, n):
    return " ".join(draw.choice(WORDS) for _ in range(n))


def rows(n, seed=0):
    """Plain preference rows; the chosen ones end in 'cat', so there is something to learn."""
    draw = random.Random(seed)
    return [
        {
            "prompt": sentence(draw, draw.randint(2, 9)),
            "chosen": f" {sentence(draw, draw.randint(1, 6))} cat",
            "rejected": f" {sentence(draw, draw.randint(1, 6))} dog",
        }
        for _ in range(n)
    ]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def tokenizer(chat=True):
    """A byte-level BPE trained on WORDS, with a ChatML template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    out = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    out.chat_template = CHATML if chat else None
    return out


def save_model(folder, model_type="llama", chat=True, **overrides):
    """A random model and its tokenizer in a folder, as a user would have them."""
    tok = tokenizer(chat)
    torch.manual_seed(0)
    config = model_config(model_type, **(dict(vocab_size=len(tok)) | overrides))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)
