"""docs/own_loop.md's compute_loss for Hugging Face's Trainer: its training beside plain logits in fp64."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.docs.snippets import block
from tests.tiny import rows, save_model, write_jsonl

pytestmark = pytest.mark.peer
STEPS, RATE, BETA = 4, 0.05, 0.1
ON_A_CPU = {
    '"path/or/hub-name"': "FOLDER",
    '"train.jsonl"': "DATA",
    '"run"': "OUTPUT",
    "torch.bfloat16": "torch.float32",
    "per_device_train_batch_size=8, learning_rate=1e-6": "**SETTINGS",
}


def snippet() -> str:
    """As written, but for names of files and what a CPU needs."""
    code = block("own_loop.md", "In Hugging Face's Trainer", "python")
    for written, here in ON_A_CPU.items():
        assert code.count(written) == 1, written
        code = code.replace(written, here)
    return code


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the snippet's names stand for: all rows in each step, so that their order is no matter."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = rows(5)
    settings = {"max_steps": STEPS, "learning_rate": RATE, "optim": "sgd", "lr_scheduler_type": "constant"}
    settings |= {"use_cpu": True, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    settings |= {"per_device_train_batch_size": len(data), "max_grad_norm": 0.5}
    found = {"FOLDER": save_model(tmp_path / "model"), "DATA": write_jsonl(tmp_path / "train.jsonl", data)}
    return found | {"OUTPUT": str(tmp_path / "run"), "SETTINGS": settings}


def plain_logps(model, groups) -> torch.Tensor:
    """[chosen, rejected] summed over the response, by full logits of each row alone: f64[pairs, 2]."""
    out = []
    for group in groups:
        for response in group.responses:
            ids = torch.tensor([[*group.prompt, *response.ids]])
            logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scored = torch.tensor([False] * len(group.prompt) + list(response.target_mask))[1:]
            out.append(logp.gather(1, ids[0, 1:, None])[:, 0][scored].sum())
    return torch.stack(out).unflatten(0, (-1, 2))


def plain_training(folder, groups):
    """Losses, gradient norms and weights of DPO as it is defined, with SGD and clipping."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        reference = plain_logps(model, groups)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses, norms = [], []
    for _ in range(STEPS):
        ratios = plain_logps(model, groups) - reference
        loss = -F.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
        optimizer.zero_grad()
        loss.backward()
        losses.append(float(loss.detach()))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    return losses, norms, model.state_dict()


def test_the_snippet_trains_as_plain_logits_do(names):
    exec(snippet(), names)
    assert names["policy"].model.config._attn_implementation == "sdpa"
    log = [entry for entry in names["trainer"].state.log_history if "loss" in entry]
    losses, norms, weights = plain_training(names["FOLDER"], names["groups"])
    assert losses[-1] < losses[0] - 0.05 and abs(losses[0] - 0.6931) < 1e-3
    assert [entry["loss"] for entry in log] == pytest.approx(losses, abs=1e-4)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(names["OUTPUT"], dtype=torch.float64).state_dict()
    start = AutoModelForCausalLM.from_pretrained(names["FOLDER"], dtype=torch.float64).state_dict()
    for name, weight in weights.items():
        moved = (weight - start[name]).norm()
        rounded = STEPS * 2**-24 * weight.norm()  # ours are fp32: half a unit in the last place at each step
        assert (saved[name] - weight).norm() < 1e-3 * moved + rounded, name
    assert len(AutoTokenizer.from_pretrained(names["OUTPUT"])) == len(names["tokenizer"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_compute_loss(names, dtype):
    """One batch: the loss and every gradient. (A Llama's norms round to fp32 whatever its dtype.)"""
    exec(snippet(), names)
    model = AutoModelForCausalLM.from_pretrained(names["FOLDER"], dtype=dtype)
    reference = names["reference"].of(names["groups"])
    trainer, groups = names["trainer"], names["groups"]
    trainer.policy = names["Policy"](model, dtype)
    names["prepare"](trainer.policy, groups, names["console"])
    assert trainer.policy.share
    loss = trainer.compute_loss(model, {"batch": names["pack"](groups), "ref": reference})
    loss.backward()
    exact = AutoModelForCausalLM.from_pretrained(names["FOLDER"], dtype=torch.float64)
    ratios = plain_logps(exact, groups)
    ratios = ratios - torch.stack([r.double().sum() for r in reference.split(scored(groups))]).unflatten(
        0, (-1, 2)
    )
    expected = -F.logsigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()
    expected.backward()
    near = {"rtol": 1e-5, "atol": 1e-7} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(loss.detach().double(), expected.detach(), **near)
    for (name, p), q in zip(model.named_parameters(), exact.parameters()):
        torch.testing.assert_close(p.grad.double(), q.grad, **near, msg=lambda m, name=name: f"{name}: {m}")


def scored(groups) -> list[int]:
    return [int(response.target_mask.sum()) for group in groups for response in group.responses]
