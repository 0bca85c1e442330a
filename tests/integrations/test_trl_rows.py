"""One batch through TRL's fused forward and through ours: every per-token field and every gradient."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)

from fastdpo.integrations import trl_forward, trl_rows
from tests.integrations.trl_runs import MOE, SOFTCAP
from tests.tiny import policy

pytestmark = pytest.mark.peer
FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def batch(prompts=((3, 4, 5, 6), (7, 8)), tails=(((9, 10), (11,)), ((12,), (13, 14, 15)))):
    """input_ids, attention_mask, labels as TRL's collator and loss make them."""
    full = [(*p, *t[0]) for p, t in zip(prompts, tails)] + [(*p, *t[1]) for p, t in zip(prompts, tails)]
    plens = [len(p) for p in prompts] * 2
    width = max(map(len, full))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in full])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in full])
    inside = torch.arange(width) >= torch.tensor(plens)[:, None]
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.where(inside & mask.bool(), -100)}


def both(model, inputs, **options):
    """(TRL's output, ours) of one model on one batch."""
    out = []
    for add in (trl_forward.STOCK_ADD, trl_forward.add_fused_lm_head):
        model.__dict__.pop("forward", None)
        add(model, outputs=FIELDS)
        out.append(model(**inputs, **options, fused_lm_head=True, use_cache=False))
    return out


def assert_same(theirs, ours, tolerance=1e-5):
    for name in FIELDS:
        a, b = getattr(theirs, name), getattr(ours, name)
        assert a.dtype == b.dtype and a.shape == b.shape
        torch.testing.assert_close(b.float(), a.float(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(ours.loss, theirs.loss, atol=tolerance, rtol=tolerance)
    assert torch.equal(theirs.label_mask, ours.label_mask)


ARCHITECTURES = [
    ("llama", {}),
    ("gpt2", {}),
    ("qwen2", {}),
    ("cohere", {"logit_scale": 0.25}),
    ("gemma2", {"sliding_window": 4, "attn_implementation": "eager", **SOFTCAP}),  # as test_softcap's
    ("granite", {"logits_scaling": 3.0}),
    ("qwen3_moe", MOE),
    ("mixtral", dict(num_local_experts=4, output_router_logits=True)),
]


@pytest.mark.parametrize(("model_type", "options"), ARCHITECTURES, ids=[a for a, _ in ARCHITECTURES])
def test_first_batch(model_type, options):
    """Every per-token field and every gradient, on shared rows (no warning says otherwise)."""
    model = policy(model_type, **options).model
    grads = []
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastdpo")
        outs = both(model, batch())
    assert_same(*outs)
    if outs[0].aux_loss is not None:
        torch.testing.assert_close(outs[1].aux_loss, outs[0].aux_loss, atol=1e-5, rtol=1e-5)
        assert outs[0].aux_loss > 0
    for out in outs:
        model.zero_grad()
        (out.loss + out.entropy.sum()).backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


def unequal_prompts():
    """What keep_end leaves: the rows of a pair begin at different tokens of the prompt. The first pair has
    none in common, the second has one."""
    out = batch(prompts=((3, 4, 5, 6), (7, 8, 9)))
    for row, place in ((0, 0), (3, 1)):
        out["input_ids"][row, place] = 40
    return out


ODD_BATCHES = {
    "prompts cut at their start": unequal_prompts(),
    "the same prompt and a response twice": batch(
        prompts=((3, 4, 5), (3, 4, 5)), tails=(((9, 10), (11, 12)), ((9, 10), (13,)))
    ),
    "equal responses": batch(tails=(((9, 10), (9, 10)), ((12,), (12, 13)))),
    "a row with nothing to score": batch(tails=(((9, 10), ()), ((12,), (13,)))),
    "one pair": batch(prompts=((3, 4),), tails=(((5,), (6, 7, 8)),)),
}


@pytest.mark.parametrize("router", [False, True], ids=["", "router logits"])
@pytest.mark.parametrize("name", ODD_BATCHES)
def test_odd_batches(name, router):
    model = policy("qwen3_moe", **MOE | {"output_router_logits": router}).model
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fastdpo")
        theirs, ours = both(model, ODD_BATCHES[name])
    assert_same(theirs, ours)
    if router:
        torch.testing.assert_close(ours.aux_loss, theirs.aux_loss, atol=1e-5, rtol=1e-5)


def test_work_is_shared():
    """Prompt once, equal rows once, last tokens and padding never."""
    rows = trl_rows.pack_rows(**ODD_BATCHES["the same prompt and a response twice"], whole=False)
    assert rows.batch.input_ids.tolist() == [[3, 4, 5, 9, 11]]
    assert rows.copies.tolist() == [[4, 4, 4, 2, 1]]


@pytest.mark.parametrize("kind", list(CheckpointImpl), ids=str)
def test_a_recompute_outside_the_forward(kind):
    """torch's own checkpointing, as FSDP puts it around layers: the backward repeats a layer's call alone."""
    model, grads = policy("qwen2").model, []
    is_layer = lambda module: type(module).__name__ == "Qwen2DecoderLayer"
    wrapper = partial(checkpoint_wrapper, checkpoint_impl=kind)
    model.get_input_embeddings().register_forward_hook(lambda m, i, out: out.requires_grad_())
    apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=is_layer)
    for out in both(model, batch()):
        model.zero_grad()
        out.loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert model.config._attn_implementation == "sdpa"
    for a, b in zip(*grads):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


def test_nothing_scored():
    """A fully truncated batch gives a zero that has gradients, as DDP needs."""
    model = policy().model
    inputs = batch()
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    theirs, ours = both(model, inputs)
    assert ours.log_probs.eq(0).all() and theirs.log_probs.shape == ours.log_probs.shape
    ours.log_probs.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_log_probs_off_by_a_hundredth_are_caught(monkeypatch):
    real = trl_forward.token_logp
    wrong = lambda *a, **k: (lambda logp, stats: (logp * 0.99, stats))(*real(*a, **k))
    model = policy().model
    monkeypatch.setattr(trl_forward, "token_logp", wrong)
    with pytest.raises(AssertionError):
        assert_same(*both(model, batch()))


def test_a_prompt_shared_wrongly_is_caught(monkeypatch):
    """Every row on the first row's prompt."""
    inputs, real = batch(prompts=((3, 4, 5), (7, 8, 5))), trl_rows.pack
    assert_same(*both(policy().model, inputs))
    wrong = lambda groups: real([replace(group, prompt=groups[0].prompt) for group in groups])
    monkeypatch.setattr(trl_rows, "pack", wrong)
    with pytest.raises(AssertionError):
        assert_same(*both(policy().model, inputs))
