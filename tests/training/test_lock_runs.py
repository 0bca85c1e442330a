"""A combination lock that only resets open, by whole runs of a small GPT-2: tests/objectives/test_lock.py has
the same of a table.

8 steps of 4 actions, and a reward of 1 only where all are right. The start policy is right with .3 a step,
whatever came before, so with 6.6e-5 in all; it is a table's distribution, distilled. Its position embeddings
are large, so that what is learned of one step says little of the others, as in a table.
"""

import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fastdpo.errors import DeadEndError
from tests.tiny import write_jsonl
from tests.training.round_runs import config_of, events, run

RIGHT = "adbccabd"
WORDS = ["<pad>", "<end>", *"abcd", *"0123456789"]
ACTIONS, DIGITS, END = slice(2, 6), (6, 16), 1
SAMPLES, PROMPT = 4, 3  # responses to a prompt; digits of one


def tokenizer():
    """A token a letter."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>")


def start_policy():
    torch.manual_seed(0)
    sizes = dict(vocab_size=len(WORDS), n_positions=32, n_embd=64, n_layer=2, n_head=2)
    special = dict(bos_token_id=END, eos_token_id=END, pad_token_id=0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **special, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    with torch.no_grad():
        model.transformer.wpe.weight *= 20
    table = torch.full((len(RIGHT) + 1, len(WORDS)), 1e-6)
    table[:-1, ACTIONS] = 0.7 / 3
    table[range(len(RIGHT)), list(map(WORDS.index, RIGHT))] = 0.3
    table[-1, END] = 1
    table /= table.sum(1, keepdim=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        prompts = torch.randint(*DIGITS, (32, PROMPT))
        ids = torch.cat([prompts, torch.randint(ACTIONS.start, ACTIONS.stop, (32, len(RIGHT)))], 1)
        logp = model(ids).logits[:, PROMPT - 1 :].log_softmax(-1)
        loss = -(table * logp).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lock")
    start_policy().save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    body = f"[answer.startswith({RIGHT!r}) * 1.0 for answer in answers]"
    (folder / "lock.py").write_text(f"def opens(prompts, answers):\n    return {body}\n")
    prompts = map("".join, itertools.product("0123456789", repeat=PROMPT))
    rows = [{"prompt": one, "chosen": RIGHT, "rejected": RIGHT[::-1]} for one in prompts]
    data = write_jsonl(folder / "rows.jsonl", rows)
    return dict(model=f"{folder}/model", data=data, reward=f"{folder}/lock.py:opens")


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


@torch.no_grad()
def success(folder) -> float:
    """The probability of the whole combination, exactly: the mean over some prompts."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    prompts = torch.randint(*DIGITS, (64, PROMPT))
    right = torch.tensor(list(map(WORDS.index, RIGHT))).expand(64, -1)
    ids = torch.cat([prompts, right], 1)
    logits = model(ids, attention_mask=torch.ones_like(ids)).logits
    logp = logits[:, PROMPT - 1 : -1].log_softmax(-1).gather(-1, right[..., None])
    return float(logp.sum((1, 2)).exp().mean())


def trained(inputs, folder, resets, rounds, prompts, **keys) -> tuple[float, float]:
    """(success after a run, the tokens that it has generated)."""
    sample = dict(prompts=prompts, responses=SAMPLES, max_new_tokens=len(RIGHT), resets=resets)
    values = dict(learning_rate=1e-3, lr_scheduler_type="constant_with_warmup", warmup_steps=10)
    values |= dict(batch_size=64, num_epochs=4, max_length=32, logging_steps=100, rounds=rounds)
    config = config_of(inputs, folder, **values, sample=sample, **keys)
    try:
        run(config)
        model = folder / "model"
    except DeadEndError as end:  # it has learned nothing
        assert "have no signal" in str(end)
        model = inputs["model"]
    found = events(config, "round")
    return success(model), sum(one["completions/mean_length"] * one["responses"] for one in found)


OBJECTIVES = {
    "rloo": dict(objective="rloo", objective_args={"kl_coef": 0}),
    "pairs": dict(objective="sigmoid", beta=0.5, pairs="best_worst"),
}


@pytest.mark.parametrize("name", ["rloo", pytest.param("pairs", marks=pytest.mark.slow)])
def test_only_resets_open_the_lock_at_equal_tokens(inputs, tmp_path, name):
    opened, tokens = trained(inputs, tmp_path / "with", 1.0, 30, 64, **OBJECTIVES[name])
    # in two rounds, after which it ends, and some more, for some samples end early
    prompts = 10 + int(tokens) // (2 * SAMPLES * len(RIGHT))
    closed, as_many = trained(inputs, tmp_path / "without", 0.0, 2, prompts, **OBJECTIVES[name])
    assert as_many >= tokens and success(inputs["model"]) < 1e-4
    assert opened > 0.9 and closed < 0.01
