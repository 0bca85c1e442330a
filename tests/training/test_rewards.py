"""A reward model's numbers: TRL's first loss, the saved classifier's own rewards, plain torch's gradients."""

import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fastdpo.api import train_reward
from fastdpo.data.packing import split_step
from fastdpo.data.reading_end import at_end, read_at_end
from fastdpo.data.store.facts import Facts
from fastdpo.data.store.stored import facts_of
from fastdpo.errors import DataError, ModelError
from fastdpo.model.loading import load_policy
from fastdpo.model.spec import ModelSpec
from fastdpo.model.support import prepare
from fastdpo.objectives.rewards import BRADLEY_TERRY
from fastdpo.records import Pair, PreferenceGroup, Response, ResponseLogps
from tests import tiny

PAD = 0  # tiny.model_config's and tiny.tokenizer's
QUIET = Console(quiet=True)


def conversations(plain):
    turn = lambda role, text: [{"role": role, "content": text.strip()}]
    return [
        row | {name: turn("assistant", row[name]) for name in ("chosen", "rejected")}
        | {"prompt": turn("user", row["prompt"])}
        for row in plain
    ]  # fmt: skip


def reward_run(folder, model, data, **keys):
    given = dict(
        model=model,
        data=tiny.write_jsonl(folder / "rows.jsonl", data),
        output_dir=str(folder / "run"),
        batch_size=8,
        max_steps=1,
        logging_steps=1,
        max_length=128,
        dtype="fp32",
        learning_rate=1e-3,
        data_cache="off",
    )
    return train_reward(given | keys, QUIET)


def lines(run, name="metrics.jsonl"):
    return list(map(json.loads, (Path(run) / name).read_text().splitlines()))


def losses(run):
    return [line["loss"] for line in lines(run) if "loss" in line]


@pytest.mark.peer
@pytest.mark.parametrize(
    ("family", "chat", "pad", "margins"),
    [
        ("llama", True, True, False),
        ("llama", False, True, True),
        ("llama", False, False, False),  # a classifier then reads before the end token, as padding is that
        ("gpt2", True, True, True),
        ("gpt_neox", False, True, False),
    ],
)
def test_the_first_loss_is_trls(tmp_path, family, chat, pad, margins):
    """The same head to begin with, too: of one seed. Of a chat template all that it prints is read."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    model = tiny.save_model(tmp_path / "model", family, chat)
    tokenizer = AutoTokenizer.from_pretrained(model)
    if not pad:
        tokenizer.pad_token = None
        tokenizer.save_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
        assert tokenizer.pad_token is None
    data = tiny.rows(8)
    if margins:
        data = [row | {"margin": number / 4} for number, row in enumerate(data)]
    data = conversations(data) if chat else data
    ours = losses(reward_run(tmp_path, model, data))[0]
    args = trl.RewardConfig(
        output_dir=str(tmp_path / "trl"), seed=0, per_device_train_batch_size=8, max_steps=1, bf16=False,
        logging_steps=1, report_to=[], use_cpu=True, max_length=128, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False,
    )  # fmt: skip
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        trainer = trl.RewardTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer
        )
        trainer.train()
    theirs = trainer.state.log_history[0]
    assert ours == pytest.approx(theirs["loss"], abs=1e-5) and abs(ours - np.log(2)) > 1e-3
    told = lines(tmp_path / "run")[0]
    names = ["accuracy", "margin", "mean_reward", "min_reward", "max_reward"]
    assert [told[name] for name in names] == pytest.approx([theirs[name] for name in names], abs=1e-5)


def classifier(folder, family="llama", **overrides):
    """A random reward model in a folder."""
    tok = tiny.tokenizer()
    config = tiny.model_config(family, vocab_size=len(tok), num_labels=1, **overrides)
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return str(folder)


def uneven():
    """Ranked rows, responses of one token and such as end in padding."""
    groups = [tiny.group(row, n, lengths) for row, (n, lengths) in enumerate([(13, [7, 1]), (1, [1, 1]),
              (9, [4, 12, 1, 6]), (20, [5, 3]), (3, [2, 9, 8])])]  # fmt: skip
    padded = [Response(np.array(ids), np.ones(len(ids), bool)) for ids in ([5, 7, PAD], [PAD], [6, PAD, 9])]
    return [*groups, PreferenceGroup(9, np.array([4, 8, 6]), tuple(padded), (Pair(0, 1), Pair(2, 0, 0.5)))]


def read(groups):
    return [at_end(group, PAD) for group in groups]


def rewards_by_hand(model, groups):
    """Each response on a row of its own, through the classifier as transformers has it; f[R]."""
    rows = [[*group.prompt, *response.ids] for group in groups for response in group.responses]
    return torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "opt"])
def test_packed_rewards_are_the_classifiers_own(tmp_path, family, shared):
    folder = classifier(tmp_path / "model", family)
    policy = load_policy(ModelSpec(folder, max_length=64, dtype="fp32", rewards=True), QUIET)
    groups = uneven()
    prepare(policy, read(groups), QUIET)
    assert policy.share
    policy.set_sharing(shared)
    truth = rewards_by_hand(AutoModelForSequenceClassification.from_pretrained(folder).eval(), groups)
    batch = policy.pack(read(groups))
    with torch.no_grad():
        logps = ResponseLogps.of(batch, policy.token_logp(batch))
    assert len(batch.target) == len(truth) and truth.std() > 0.1
    torch.testing.assert_close(logps.logp, truth.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_plain_torchs(tmp_path, family):
    """Of a step in several microbatches, the pairs of ranked rows and their margins."""
    folder = classifier(tmp_path / "model", family)
    policy = load_policy(ModelSpec(folder, max_length=64, dtype="fp32", rewards=True), QUIET)
    groups = uneven()
    prepare(policy, read(groups), QUIET)
    counts = BRADLEY_TERRY.counts(groups)
    parts = split_step(read(groups), 50)
    assert len(parts) > 2
    for part in parts:
        batch = policy.pack(part)
        BRADLEY_TERRY.part(ResponseLogps.of(batch, policy.token_logp(batch)), counts).backward()
    plain = AutoModelForSequenceClassification.from_pretrained(folder).double()
    rewards, first, loss = rewards_by_hand(plain, groups), 0, 0.0
    for group in groups:
        for pair in group.pairs:
            apart = rewards[first + pair.winner] - rewards[first + pair.loser] - pair.offset
            loss -= torch.nn.functional.logsigmoid(apart) / counts[0]
        first += len(group.responses)
    loss.backward()
    names = dict(policy.model.named_parameters())
    for name, parameter in plain.named_parameters():
        truth = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        ours = names[name].grad
        ours = torch.zeros_like(truth) if ours is None else ours.double()
        assert float((ours - truth).norm()) <= 1e-5 * float(truth.norm()) + 1e-8, name


def test_what_is_known_of_rows_without_their_tokens():
    groups = [tiny.group(row, 5, [4, 1, 7]) for row in range(3)]
    found, truth = facts_of(read_at_end(groups, PAD)), Facts.of(read(groups))
    for name in ("length", "scored", "first", "relevant", "largest", "input_tokens", "prompt"):
        assert np.array_equal(getattr(found, name), getattr(truth, name)), name


def test_rows_that_end_in_nothing_but_padding_are_named():
    empty = Response(np.array([PAD]), np.ones(1, bool))
    with pytest.raises(DataError, match=r"row 3: a response and the prompt's end are padding .token 0."):
        at_end(PreferenceGroup(3, np.array([5, PAD]), (empty, empty), ()), PAD)


def test_the_start_check_finds_a_head_that_is_read_elsewhere(tmp_path, monkeypatch):
    folder = classifier(tmp_path / "model")
    policy = load_policy(ModelSpec(folder, max_length=64, dtype="fp32", rewards=True), QUIET)
    groups = read(uneven())
    moved = [replace(group, prompt=group.prompt) for group in groups]
    pack = policy.pack
    off = lambda some, tree=None: replace(b := pack(some, tree), score_row=(b.score_row - 1).clamp(min=0))
    monkeypatch.setattr(policy, "pack", off)
    with pytest.raises(ModelError, match="our rewards differ from the model's own by"):
        prepare(policy, moved, QUIET)
