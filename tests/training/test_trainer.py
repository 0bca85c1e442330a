"""Runs of the trainer on small models: the same trajectory however a step is cut, and a usable result."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.data.groups import Limits
from fastdpo.data.load import load_data, load_groups
from fastdpo.data.packing import epoch_order
from fastdpo.errors import ConfigError, TrainingError
from fastdpo.model import support
from fastdpo.training.job import data_of
from tests.rounding import is_tie
from tests.tiny import rows, save_model, write_jsonl

QUIET = Console(quiet=True)


@pytest.fixture(autouse=True)
def no_report(request, monkeypatch):
    if "usable_folder" not in request.node.name:  # one test looks at everything, the others save the time
        monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)


class Run:
    """One training of the tiny model, and what came out."""

    def __init__(self, folder, name="run", n_rows=24, model_type="llama", **keys):
        model = folder / "model"
        self.start = str(model) if model.exists() else save_model(model, model_type)
        self.data = write_jsonl(folder / "train.jsonl", rows(n_rows))
        eval_data = write_jsonl(folder / "eval.jsonl", rows(8, seed=1))
        values = dict(
            model=self.start,
            data=self.data,
            eval_data=eval_data,
            output_dir=str(folder / name),
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            batch_size=4,
            max_steps=20,
            max_length=64,
            logging_steps=1,
            dtype="fp32",
            samples=0,
            beta=0.1,
        )
        self.config = Config(**(values | keys))
        self.folder = train(self.config, QUIET)
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        self.steps = [r for r in records if "loss" in r]
        self.evals = [r for r in records if "eval_loss" in r]
        self.losses = torch.tensor([r["loss"] for r in self.steps], dtype=torch.float64)

    def weights(self, folder=None):
        model = AutoModelForCausalLM.from_pretrained(folder or self.folder / "model")
        return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def assert_same_trajectory(run, losses, weights):
    torch.testing.assert_close(run.losses, losses, rtol=0, atol=1e-5)
    moved = (weights - run.weights(run.start)).norm()
    assert moved > 0.1  # it did train
    # AdamW divides by the gradient's own size, so rounding near 0 can flip an entry's whole step.
    assert (run.weights() - weights).norm() < 1e-3 * moved


def one_pair_at_a_time(run):
    """The definition: plain transformers, full logits, one pair a forward, textbook DPO and AdamW."""
    c = run.config
    model = AutoModelForCausalLM.from_pretrained(run.start)
    reference = AutoModelForCausalLM.from_pretrained(run.start)
    tokenizer = AutoTokenizer.from_pretrained(run.start)
    limits = Limits(c.max_length, c.truncation)
    groups, _ = load_groups(run.data, tokenizer, limits, strict=True, console=QUIET)

    def logp(m, g, r):
        ids = torch.tensor([[*g.prompt, *r.ids]])
        scores = m(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        return scores[len(g.prompt) - 1 :].sum()

    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, weight_decay=0.0)
    losses = []
    for step in range(c.max_steps):
        epoch, place = divmod(step * c.batch_size, len(groups))
        order = epoch_order(len(groups), c.seed, epoch)[place : place + c.batch_size]
        total = 0.0
        for g in (groups[i] for i in order):
            with torch.no_grad():
                ref_w, ref_l = (logp(reference, g, r) for r in g.responses)
            w, l = (logp(model, g, r) for r in g.responses)
            loss = -F.logsigmoid(c.beta * ((w - ref_w) - (l - ref_l))) / len(order)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), c.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    weights = torch.cat([p.detach().double().flatten() for p in model.parameters()])
    return torch.tensor(losses, dtype=torch.float64), weights


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    """(folder with the model, losses, weights) of the definition, on the default test run's data."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("truth")
    run = Run(folder)
    return folder, *one_pair_at_a_time(run)


@pytest.mark.parametrize(
    "keys",
    [dict(max_tokens=n) for n in (1, 50, 120, 10**6)] + [dict(gradient_checkpointing=True)],
    ids=str,
)
def test_any_token_cap_gives_the_same_trajectory(truth, tmp_path, keys):
    folder, losses, weights = truth
    (tmp_path / "model").symlink_to(folder / "model")
    assert_same_trajectory(Run(tmp_path, **keys), losses, weights)


@pytest.mark.parametrize("max_tokens", [60, 10**6])
def test_separate_rows_give_the_same_trajectory(truth, tmp_path, monkeypatch, max_tokens):
    folder, losses, weights = truth
    (tmp_path / "model").symlink_to(folder / "model")
    monkeypatch.setattr(support, "sharing_refusal", lambda *config: "the test says so")
    assert_same_trajectory(Run(tmp_path, max_tokens=max_tokens), losses, weights)


def test_a_run_learns_and_leaves_a_usable_folder(tmp_path):
    run = Run(tmp_path, max_steps=40)
    names = "config.yaml metrics.jsonl held_out.jsonl events.jsonl samples.jsonl data_report.json report.html"
    assert {p.name for p in run.folder.iterdir()} == {*names.split(), "plots", "checkpoints", "model"}
    assert run.losses[-4:].mean() < run.losses[:4].mean() - 0.1
    first, last = run.evals[0], run.evals[-1]
    assert first["eval_rewards/margins"] == 0 and first["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    assert last["eval_rewards/accuracies"] > 0.9 and last["eval_rewards/margins"] > 0.1
    assert last["step"] == 40 and len(run.steps) == 40
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    inputs = tokenizer("the cat", return_tensors="pt", return_token_type_ids=False)
    model.generate(**inputs, max_new_tokens=3)
    saved = json.loads((run.folder / "model/config.json").read_text())
    assert "fastdpo" not in json.dumps(saved)  # nobody else knows our attention


def test_metrics_have_trl_names(tmp_path):
    run = Run(tmp_path, max_steps=2)
    names = "loss grad_norm learning_rate epoch num_tokens rewards/chosen rewards/rejected "
    names += "rewards/accuracies rewards/margins logps/chosen logps/rejected"
    assert set(names.split()) <= run.steps[0].keys()
    evals = "eval_loss eval_entropy eval_logits/chosen eval_logits/rejected eval_mean_token_accuracy"
    assert set(evals.split()) <= run.evals[0].keys()
    assert is_tie(run.steps[0])


def test_evaluation_matches_full_logits(tmp_path):
    run = Run(tmp_path, max_steps=1, learning_rate=0.0)
    model = AutoModelForCausalLM.from_pretrained(run.start)
    tokenizer = AutoTokenizer.from_pretrained(run.start)
    limits = Limits(64, "keep_start")
    groups, _ = load_groups(run.config.eval_data, tokenizer, limits, strict=True, console=QUIET)
    sums = {"chosen": [], "rejected": []}
    tokens = {"entropy": [], "logits/chosen": [], "logits/rejected": [], "mean_token_accuracy": []}
    for g in groups:
        for side, r in zip(sums, g.responses):
            ids = torch.tensor([[*g.prompt, *r.ids]])
            logits = model(ids).logits[0, len(g.prompt) - 1 : -1].detach()
            logp = logits.log_softmax(-1)
            sums[side].append(logp.gather(1, ids[0, len(g.prompt) :, None]).sum())
            tokens["entropy"].append(-(logp.exp() * logp).sum(-1))
            tokens[f"logits/{side}"].append(logits.mean(-1))
            if side == "chosen":
                tokens["mean_token_accuracy"].append((logits.argmax(-1) == ids[0, len(g.prompt) :]).float())
    for side, values in sums.items():
        mean = float(torch.stack(values).mean())
        assert run.evals[0][f"eval_logps/{side}"] == pytest.approx(mean, abs=1e-4)
    for name, values in tokens.items():
        assert run.evals[0][f"eval_{name}"] == pytest.approx(float(torch.cat(values).mean()), abs=1e-5)


def test_last_step_of_an_epoch_may_be_smaller(tmp_path):
    run = Run(tmp_path, n_rows=10, max_steps=None, num_epochs=1.5)
    assert len(run.steps) == 5  # 3 steps an epoch (4 + 4 + 2 rows), one and a half epochs
    assert [r["epoch"] for r in run.steps] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3], abs=1e-3)


def test_lora_trains_only_the_adapter_and_refers_to_the_base(tmp_path):
    from peft import PeftModel

    run = Run(tmp_path, lora_rank=4, learning_rate=1e-2, max_steps=30)
    assert run.evals[0]["eval_rewards/margins"] == 0
    assert run.evals[-1]["eval_rewards/margins"] > 0.05
    base = AutoModelForCausalLM.from_pretrained(run.start)
    tuned = PeftModel.from_pretrained(base, run.folder / "model")
    moved = {n for n, p in tuned.named_parameters() if "lora_B" in n and p.abs().sum() > 0}
    assert moved and not any("lm_head" in name for name in moved)
    assert not (run.folder / "model/model.safetensors").exists()


def test_lora_on_the_head_is_trained_too(tmp_path):
    """TRL refuses an adapter on the lm_head; its gradient goes through linear_logp here."""
    run = Run(tmp_path, lora_rank=4, lora_target_modules=["lm_head"], learning_rate=1e-2)
    assert run.evals[-1]["eval_rewards/margins"] > 0.01


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_a_stage_refers_to_the_model_it_started_from(tmp_path, lora_rank):
    stages = [{"objective": "sft", "max_steps": 10}, {"objective": "sigmoid", "max_steps": 10}]
    run = Run(tmp_path, stages=stages, lora_rank=lora_rank, learning_rate=5e-3)
    sft, dpo = ([r for r in run.evals if r["stage"] == s] for s in (0, 1))
    assert sft[-1]["eval_loss"] < sft[0]["eval_loss"]
    assert dpo[0]["eval_rewards/margins"] == 0  # the SFT model, not the base, is the reference
    assert dpo[0]["eval_logps/chosen"] == pytest.approx(sft[-1]["eval_logps/chosen"], abs=1e-3)
    assert dpo[-1]["eval_rewards/margins"] > 0
    assert [r["step"] for r in run.steps] == list(range(1, 21))


def test_ranked_rows_compute_each_response_once(tmp_path):
    ranked = [
        {
            "prompt": f"the {word}",
            "responses": [{"text": f" cat {i}", "score": s} for i, s in enumerate((3.0, 2.0, 1.0, 1.0))],
        }
        for word in ("red", "blue", "old", "dog")
    ]
    data = write_jsonl(tmp_path / "ranked.jsonl", ranked)
    run = Run(tmp_path, data=data, max_steps=3, batch_size=4)
    assert run.steps[0]["responses_computed"] == 16  # 4 prompts x 4 responses for 4 x 5 pairs
    report = json.loads((run.folder / "data_report.json").read_text())["data"]
    assert report["pairs"] == 20 and report["responses"] == 16


@pytest.mark.parametrize("lora_rank", [None, 4])
def test_bf16_follows_fp32(tmp_path, lora_rank):
    keys = dict(lora_rank=lora_rank, learning_rate=3e-3)
    fp32 = Run(tmp_path, "fp32", **keys)
    bf16 = Run(tmp_path, "bf16", dtype="bf16", **keys)
    assert (fp32.losses - bf16.losses).abs().max() < 0.1
    assert bf16.losses[-1] < bf16.losses[0] - 0.05
    if lora_rank is None:
        saved = AutoModelForCausalLM.from_pretrained(bf16.folder / "model", dtype="auto")
        assert saved.dtype == torch.bfloat16


def test_dropout_is_off_in_training_and_back_in_the_saved_config(tmp_path):
    save_model(tmp_path / "model", "gpt2")
    path = tmp_path / "model/config.json"
    stock = json.loads(path.read_text()) | {"resid_pdrop": 0.1, "attn_pdrop": 0.1}
    path.write_text(json.dumps(stock))
    console = Console(record=True, quiet=False, width=200)
    config = Run(tmp_path, max_steps=1).config
    train(Config(**{**vars(config), "output_dir": str(tmp_path / "again")}), console)
    assert "dropout set to 0" in console.export_text()
    saved = json.loads((tmp_path / "again/model/config.json").read_text())
    assert saved["resid_pdrop"] == 0.1 and saved["attn_pdrop"] == 0.1


def test_a_nan_stops_before_the_weights_are_touched(tmp_path):
    with pytest.raises(TrainingError) as error:
        Run(tmp_path, learning_rate=1e30)
    assert "step 2: the loss is nan" in str(error.value)
    assert "microbatch of rows" in str(error.value) and "lower learning_rate" in str(error.value)
    assert not (tmp_path / "run/model").exists()


def test_a_broken_model_is_never_saved(tmp_path):
    """The last step's update is checked too, with no held-out rows to show it."""
    with pytest.raises(TrainingError, match="nothing was saved"):
        Run(tmp_path, learning_rate=1e39, max_steps=1, eval_data=None)
    with pytest.raises(TrainingError, match="held-out loss is nan"):
        Run(tmp_path, "other", learning_rate=1e30, max_steps=1)
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "other/model").exists()


def test_same_seed_same_bits(tmp_path):
    one, two = Run(tmp_path, "one", max_steps=5), Run(tmp_path, "two", max_steps=5)
    assert torch.equal(one.losses, two.losses) and torch.equal(one.weights(), two.weights())


def test_held_out_fraction_is_disjoint_and_seeded(tmp_path):
    run = Run(tmp_path, eval_data=0.25, max_steps=1)
    held = json.loads((run.folder / "data_report.json").read_text())["eval_data"]
    assert held["split_off"] == 6 and len(set(held["rows"])) == 6
    tokenizer = AutoTokenizer.from_pretrained(run.start)
    trained, evaluated, _ = load_data(data_of(run.config), tokenizer, QUIET)
    assert sorted(g.row for g in [*trained, *evaluated]) == list(range(24))
    assert [g.row for g in evaluated] == held["rows"]
    again = Run(tmp_path, "again", eval_data=0.25, max_steps=1)
    assert json.loads((again.folder / "data_report.json").read_text())["eval_data"] == held
    assert (
        len(load_data(data_of(replace(run.config, eval_data=5.0)), tokenizer, QUIET)[1]) == 5
    )  # so many groups
    with pytest.raises(ConfigError, match=r"eval_data: 30\.0 of 24 groups leaves none"):
        load_data(data_of(replace(run.config, eval_data=30.0)), tokenizer, QUIET)
