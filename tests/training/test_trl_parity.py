"""Step by step the numbers of TRL 1.16's DPOTrainer: same model, rows, order and optimizer, fp32, CPU."""

import copy
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.data.packing import epoch_order
from tests import images
from tests.tiny import rows, save_model, write_jsonl

STEPS, BATCH, BETA, RATE = 20, 4, 0.1, 2e-3

pytestmark = pytest.mark.peer


def conversations(plain):
    """The same rows as messages, after a turn already answered."""
    turn = lambda role, text: {"role": role, "content": text.strip()}
    before = [turn("user", "the old house"), turn("assistant", "one red bird")]
    return [
        {
            "prompt": [*before, turn("user", row["prompt"])],
            "chosen": [turn("assistant", row["chosen"])],
            "rejected": [turn("assistant", row["rejected"])],
        }
        for row in plain
    ]


def flat(parameters):
    return torch.cat([p.detach().double().flatten() for p in parameters])


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("chat", [False, True], ids=["plain text", "conversations"])
def test_same_losses_and_weights(tmp_path, chat, accumulation):
    trl_dpo = pytest.importorskip("benchmarks.peers.trl_dpo", reason="needs trl")
    start = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(start)
    # TRL scores white space after the end-of-turn token and we do not: here there is none.
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.save_pretrained(start)
    data = conversations(rows(16)) if chat else rows(16)
    config = Config(
        model=start,
        data=write_jsonl(tmp_path / "rows.jsonl", data),
        output_dir=str(tmp_path / "run"),
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        batch_size=BATCH,
        max_steps=STEPS,
        logging_steps=1,
        max_length=128,
        dtype="fp32",
    )
    run = train(config, Console(quiet=True))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    ordered = [data[i] for epoch in range(5) for i in epoch_order(16, config.seed, epoch)]
    model = AutoModelForCausalLM.from_pretrained(start)
    before = flat(model.parameters())
    trainer = trl_dpo.make_trainer(
        copy.deepcopy(model),
        tokenizer,
        ordered[: STEPS * BATCH],
        batch_size=BATCH // accumulation,
        accumulation=accumulation,
        max_steps=STEPS,
        learning_rate=RATE,
        beta=BETA,
        max_length=128,
        output_dir=tmp_path / "trl",
    )
    theirs = trl_dpo.run_training(trainer)

    losses = [r["loss"] for r in records]
    assert losses[0] - min(losses) > 0.1  # the loss moves, so that agreeing means something
    assert losses == pytest.approx(theirs.losses, abs=1e-4)
    norms = [r["grad_norm"] for r in records]
    assert norms == pytest.approx(theirs.grad_norms, rel=1e-3)
    trained = AutoModelForCausalLM.from_pretrained(run / "model").state_dict()
    ours = flat(trained[name] for name in theirs.weights)
    weights = flat(theirs.weights.values())
    assert (ours - weights).norm() <= 1e-2 * (ours - before).norm()


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
def test_same_losses_on_rows_with_images(tmp_path, family):
    """TRL trains the tower, too."""
    trl_dpo = pytest.importorskip("benchmarks.peers.trl_dpo", reason="needs trl")
    start, steps = images.save(tmp_path / "model", family), 6
    processor = copy.copy(images.processor(family))
    processor.chat_template = processor.chat_template.replace("<|im_end|>\n", "<|im_end|>")  # as above
    Path(start, "chat_template.jinja").write_text(processor.chat_template)
    data = []
    for number, row in enumerate(conversations(rows(8))):
        path = tmp_path / f"{number}.png"
        images.picture(number, [(32, 48), (48, 32)][number % 2]).save(path)
        data.append(row | {"images": [str(path)]})
    config = Config(
        model=start, data=write_jsonl(tmp_path / "rows.jsonl", data), output_dir=str(tmp_path / "run"),
        beta=BETA, learning_rate=RATE, lr_scheduler_type="constant", batch_size=2, max_steps=steps,
        logging_steps=1, max_length=256, dtype="fp32", freeze_vision=False, samples=0,
    )  # fmt: skip
    run = train(config, Console(quiet=True))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    order = [i for epoch in range(2) for i in epoch_order(8, config.seed, epoch)][: 2 * steps]
    seen = [data[i] | {"images": [images.PIL.open(path) for path in data[i]["images"]]} for i in order]
    trainer = trl_dpo.make_trainer(
        images.model(family), processor, seen, batch_size=2, accumulation=1, max_steps=steps,
        learning_rate=RATE, beta=BETA, max_length=256, output_dir=tmp_path / "trl",
        precompute_ref=False, ref_model=images.model(family),
    )  # fmt: skip
    theirs = trl_dpo.run_training(trainer)
    losses = [record["loss"] for record in records]
    assert losses[0] == pytest.approx(theirs.losses[0], abs=1e-5) and losses[0] - min(losses) > 0.05
    assert losses == pytest.approx(theirs.losses, abs=1e-4)
    norms = [record["grad_norm"] for record in records]
    assert norms == pytest.approx(theirs.grad_norms, rel=1e-3)
