"""TRL 1.9's DPOTrainer on our log-probs: what it asks of logits, answered; and its losses, stock and ours.

The second part needs TRL 1.9: test_axolotl.py says how to get it. The first runs under any.
"""

import datasets
import pytest
import torch
import torch.nn.functional as F
import trl
import trl.trainer.dpo_trainer as dpo_trainer
import trl.trainer.utils as trl_utils
from transformers import AutoModelForCausalLM

from benchmarks.peers.trl_dpo import ExactTrainer, run_training
from fastdpo.errors import ConfigError
from fastdpo.integrations import trl_forward, trl_older
from fastdpo.integrations.versions import check_version
from tests.integrations.test_trl_rows import ODD_BATCHES, batch
from tests.integrations.trl_runs import MOE, SOFTCAP, Run, make, same
from tests.model.test_shared_prompt import assert_gradients_close
from tests.tiny import policy, rows, save_model

pytestmark = pytest.mark.peer
trl_1_9 = pytest.mark.skipif(
    not trl.__version__.startswith("1.9."), reason=f"needs trl 1.9 (axolotl 0.19's), not {trl.__version__}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("llama"))


# The stand-in for logits, under any TRL


@pytest.fixture
def trl_functions(monkeypatch):
    """The two functions of logits where TRL 1.9's DPOTrainer looks them up."""
    for name in ("selective_log_softmax", "entropy_from_logits"):
        monkeypatch.setattr(dpo_trainer, name, getattr(trl_utils, name), raising=False)


def asked(logits, inputs) -> list[torch.Tensor]:
    """All that TRL 1.9 asks of logits in a loss, masked as there: one list of tensors."""
    logits, labels = logits[..., :-1, :], inputs["input_ids"][..., 1:]
    mask = inputs["completion_mask"][..., 1:]
    logps = dpo_trainer.selective_log_softmax(logits, labels)
    logps[mask == 0] = 0.0
    chosen_mask, rejected_mask = (part.bool() for part in mask.chunk(2, dim=0))
    chosen, rejected = logits.chunk(2, dim=0)
    chosen_labels = labels.chunk(2, dim=0)[0]
    sft = F.cross_entropy(chosen[chosen_mask], chosen_labels[chosen_mask]).expand(chosen.size(0))
    with torch.no_grad():
        lse1, lse2 = torch.logsumexp(logits, dim=-1), torch.logsumexp(2.0 * logits, dim=-1)
    entropy = dpo_trainer.entropy_from_logits(logits.detach()) * mask
    means = [
        part.detach()[m].mean(-1).sum() for part, m in ((chosen, chosen_mask), (rejected, rejected_mask))
    ]
    correct = (chosen.detach().argmax(dim=-1) == chosen_labels) & chosen_mask
    return [logps, sft, (lse2 - 2.0 * lse1) * mask, entropy, *means, correct]


def inputs_of(rows) -> dict:
    """A batch as TRL's collator makes it."""
    return {k: rows[k] for k in ("input_ids", "attention_mask")} | {
        "completion_mask": (rows["labels"] != -100).long()
    }


def compare_answers(model, inputs, **options):
    """Every answer and every gradient, from the model's logits and from TokenScores."""
    trl_older.add_scores(model)
    arguments = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    outs = [model(**arguments, **options)]
    theirs = [asked(outs[0].logits, inputs)]
    with trl_older._scoring(inputs):
        outs.append(model(**arguments, **options))
        theirs.append(asked(outs[1].logits, inputs))
    grads = []
    for logps, sft, *_ in theirs:
        model.zero_grad()
        (logps.sum(1).square().sum() + sft.sum()).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*theirs):
        assert a.dtype == b.dtype
        torch.testing.assert_close(b.detach().float(), a.detach().float(), atol=1e-4, rtol=1e-4)
    assert_gradients_close(dict(enumerate(grads[1])), dict(enumerate(grads[0])), 2e-5)
    return outs


ARCHITECTURES = [
    ("llama", {}),
    ("gemma2", {"sliding_window": 4, "attn_implementation": "eager", **SOFTCAP}),  # as test_softcap's
    ("cohere", {"logit_scale": 0.25}),
]


@pytest.mark.parametrize(("model_type", "options"), ARCHITECTURES, ids=[a for a, _ in ARCHITECTURES])
def test_answers(model_type, options, trl_functions):
    model = policy(model_type, **options).model
    outs = compare_answers(model, inputs_of(batch()))
    assert isinstance(outs[1].logits, trl_older.TokenScores) and torch.is_tensor(outs[0].logits)
    assert torch.is_tensor(model(**{k: batch()[k] for k in ("input_ids", "attention_mask")}).logits)


@pytest.mark.parametrize("name", ODD_BATCHES)
def test_odd_batches(name, trl_functions):
    compare_answers(policy().model, inputs_of(ODD_BATCHES[name]))


def test_router(trl_functions):
    outs = compare_answers(policy("qwen3_moe", **MOE).model, inputs_of(batch()), output_router_logits=True)
    torch.testing.assert_close(outs[1].aux_loss, outs[0].aux_loss, atol=1e-5, rtol=1e-5)


def test_the_most_likely_token_is_counted(trl_functions):
    """A random model is right about none: here half the labels are its own choice."""
    model = policy().model
    inputs = inputs_of(batch())
    for place in range(3, 6):
        best = model(input_ids=inputs["input_ids"]).logits[:1, place - 1].argmax(-1)
        inputs["input_ids"][:1, place] = best
    with trl_older._scoring(inputs):
        out = model(**{k: inputs[k] for k in ("input_ids", "attention_mask")})
    assert asked(out.logits, inputs)[-1].sum() == 2 == inputs["completion_mask"][0, 3:].sum()


@pytest.mark.parametrize("modules", ["target_modules", "modules_to_save"])
def test_lm_head_that_is_trained_by_peft(modules, trl_functions):
    """A LoRA on the lm_head: the model's own logits, said once. A trained copy of it: ours."""
    peft = pytest.importorskip("peft", reason="needs peft")
    options = {"target_modules": ["q_proj"], modules: ["lm_head"]} | {"r": 4, "task_type": "CAUSAL_LM"}
    model = policy().model
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(weight, std=0.1)
    if modules == "target_modules":
        with pytest.warns(UserWarning, match="fastdpo: the lm_head has an adapter"):
            outs = compare_answers(model, inputs_of(batch()))
        assert torch.is_tensor(outs[1].logits)
    else:
        outs = compare_answers(model, inputs_of(batch()))
        assert not torch.is_tensor(outs[1].logits)


def test_other_questions_are_errors(trl_functions):
    model, inputs = policy().model, inputs_of(batch())
    trl_older.add_scores(model)
    with trl_older._scoring(inputs):
        logits = model(**{k: inputs[k] for k in ("input_ids", "attention_mask")}).logits
    wrong = [lambda: logits.softmax(-1), lambda: torch.sort(logits), lambda: logits[0], lambda: 3.0 * logits]
    wrong += [lambda: logits.mean(0), lambda: F.cross_entropy(logits, inputs["input_ids"], reduction="sum")]
    for question in wrong:
        with pytest.raises((TypeError, AttributeError)):
            question()


def test_versions():
    for version in ("1.8.0", "1.15.0", "1.16.0"):
        with pytest.raises(ConfigError, match=r"TRL .* is installed.* 1\.9"):
            check_version("trl_older", version)
    check_version("trl_older", "1.9.0")


# TRL 1.9's DPOTrainer, stock and ours


class ExactFast(ExactTrainer, trl_older.FastDPOTrainer):
    """Keeps exact losses."""


LOSSES = (
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot apo_zero discopop sft sigmoid_norm"
)
SETTINGS = {loss: {"loss_type": [loss], "max_steps": 2} for loss in LOSSES.split()}
SETTINGS["exo_pair"]["label_smoothing"] = 1e-3
SETTINGS |= {
    "WPO": {"use_weighting": True},
    "LD-DPO": {"ld_alpha": 0.3},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "several losses": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "checkpointing": {"gradient_checkpointing": True},
    "keep_end": {"max_length": 9, "truncation_mode": "keep_end"},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 1},
}


def compare(folder, cache=None, explicit=True, **settings):
    """Stock and ours; `cache`: our reference_cache, `explicit`: with a reference model."""
    runs = []
    fast = lambda *a, **k: ExactFast(*a, reference_cache=cache, **k)
    for make_trainer in (ExactTrainer, fast):
        options = {"precompute_ref_log_probs": True} if cache else {}
        if explicit:
            options["ref_model"] = AutoModelForCausalLM.from_pretrained(folder)
        if "eval_strategy" in settings:
            options["more"] = {"eval_dataset": datasets.Dataset.from_list(rows(3, seed=9))}
        torch.manual_seed(0)  # TRL 1.9 draws a LoRA's start before it sets its seed
        trainer = make(folder, make_trainer=make_trainer, **options | settings)
        runs.append(Run(run_training(trainer), trainer.state.log_history, trainer))
    same(*runs)
    return runs


@trl_1_9
@pytest.mark.parametrize("name", SETTINGS)
def test_trl(folder, name, monkeypatch):
    calls, real = [], trl_forward.FusedForward.shared
    monkeypatch.setattr(trl_forward.FusedForward, "shared", lambda *a: calls.append(1) or real(*a))
    compare(folder, **SETTINGS[name])
    assert calls


@trl_1_9
@pytest.mark.parametrize("name", ["sigmoid", "LD-DPO", "evaluation"])
def test_trl_cached_reference(folder, name):
    _, ours = compare(folder, cache="auto", explicit=False, **SETTINGS[name])
    assert ours.trainer.ref_model is None


@trl_1_9
@pytest.mark.parametrize("cache", [None, "auto"])
def test_trl_lora(folder, cache):
    peft = pytest.importorskip("peft", reason="needs peft")
    settings = peft.LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    more = {"more": {"peft_config": settings}, "gradient_checkpointing": True, "learning_rate": 2e-2}
    compare(folder, cache=cache, explicit=False, **more)


@trl_1_9
def test_trl_moe(tmp_path):
    stock, _ = compare(save_model(tmp_path / "moe", "qwen3_moe", **MOE))
    assert "aux_loss" in stock.logs[0]


@trl_1_9
def test_trl_logits_for_compute_metrics(folder):
    """Who measures on logits gets them."""
    seen = []
    measure = lambda prediction: seen.append(prediction.predictions.shape) or {"one": 1.0}
    more = {"compute_metrics": measure, "eval_dataset": datasets.Dataset.from_list(rows(2, seed=9))}
    fast = lambda *a, **k: ExactFast(*a, reference_cache=None, **k)
    trainer = make(folder, make_trainer=fast, more=more)
    assert trainer.evaluate()["eval_one"] == 1.0
    assert seen[0][-1] == trainer.model.config.vocab_size


@trl_1_9
def test_trl_liger_is_refused(folder):
    config = trl.DPOConfig(use_cpu=True, bf16=False)
    config.use_liger_kernel = True
    with pytest.raises(ConfigError, match="use_liger_kernel"):
        trl_older.FastDPOTrainer(None, None, config)
