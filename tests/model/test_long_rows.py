"""Rows that are tens of thousands of tokens long: nothing is quadratic in them, nothing is cut, and what goes
over max_tokens is said."""

import json

import numpy as np
import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.data.packing import pack, split_step
from fastdpo.model import activations, attention, support
from fastdpo.records import PreferenceGroup, Response
from tests.model.test_shared_prompt import assert_gradients_close, gradients
from tests.rounding import model_ulps
from tests.tiny import group, policy, rows, save_model, write_jsonl

NARROW = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)


class Largest(TorchDispatchMode):
    """The most elements of any storage that an operator made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.itemsize
                self.elements = max(self.elements, size)
        return out


@pytest.mark.parametrize("block", [1, 4, 7])
@pytest.mark.parametrize("window", [None, 3, 11, 12, 32])  # 12, 32: a segment's keys less one
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_blocks_of_queries_agree_with_the_dense_mask(block, window, softcap, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    layout = pack([group(0, 9, [5, 1, 13]), group(1, 1, [3, 8]), group(2, 30, [4])]).layout
    q = torch.randn(len(layout.seen_until), 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(len(q), 2, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    results = []
    for backend in ("dense", "segments"):
        out = attention.attend(q, k, v, layout, window=window, softcap=softcap, backend=backend)
        results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    for dense, ours in zip(*results):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("family, window", [("llama", None), ("mistral", 700)])
def test_no_mask_is_as_long_as_a_row(family, window):
    """A prompt of 2k with 2 x 1k: exact, and no tensor holds all queries x keys of a segment."""
    window = dict(sliding_window=window) if window else {}
    p = policy(family, **NARROW, **window, num_hidden_layers=2, max_position_embeddings=8192)
    pair = group(0, 2048, [1024, 1024])
    logp = support.stock_logp(p, pair)
    logp.sum().backward()
    truth = gradients(p.model)
    p.set_sharing(True)
    with Largest() as largest:
        ours = p.token_logp(pack([pair]))
        ours.sum().backward()
    torch.testing.assert_close(ours, logp, rtol=0, atol=model_ulps(logp))
    assert_gradients_close(gradients(p.model), truth, 1e-4)
    assert largest.elements <= attention.QUERY_BLOCK * (2048 + 1024) < 1023 * (2048 + 1023) / 1.9


def test_the_head_stays_within_its_budget():
    """Two responses of 2k scored tokens and 2,000 words: 16 MB of logits, on 2 MiB."""
    p = policy("llama", **NARROW, num_hidden_layers=1, max_position_embeddings=8192, vocab_size=2000)
    p.head_budget = 1 << 21
    p.set_sharing(True)
    pair = group(0, 500, [2000, 2000], vocab=2000)
    assert p.plan(pair.scored_tokens).name == "recompute"
    batch = pack([pair])
    hidden = p.hidden(batch).detach().requires_grad_()
    p.hidden = lambda batch: hidden
    with Largest() as largest:
        p.token_logp(batch).sum().backward()
    assert largest.elements * 4 <= p.head_budget
    assert hidden.grad.norm() > 0 and p.model.lm_head.weight.grad.norm() > 0


def test_the_probe_of_long_rows_is_short():
    """Full logits of the smallest group would be [40960, vocabulary] in fp32."""
    p = policy("llama", **NARROW, num_hidden_layers=1, max_position_embeddings=65536)
    draw = np.random.default_rng(0)
    late = np.zeros(8192, bool)
    late[8000:] = True  # a response whose first 8000 tokens are not scored
    ids = lambda n: draw.integers(3, 131, n)
    responses = (Response(ids(8192), np.ones(8192, bool)), Response(ids(8192), late))
    seen = []
    p.core.base_model.register_forward_pre_hook(
        lambda module, args, named: seen.append(named["input_ids"].numel()), with_kwargs=True
    )
    support.prepare(p, [PreferenceGroup(0, ids(32768), responses, ())], Console())
    assert p.share and len(seen) == 3 and max(seen) <= 3 * 128
    p.model.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, p.model.lm_head.weight) * 1.5
    with pytest.raises(support.ModelError, match="differ from the model's own"):
        support.prepare(p, [PreferenceGroup(0, ids(32768), responses, ())], Console())


def test_a_short_group_is_probed_whole():
    short = group(0, 100, [100, 90])
    assert support._probe([short]) == [short]


def test_a_group_over_max_tokens_goes_alone_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
    long = {"prompt": "the red cat " * 40, "chosen": " dog" * 30, "rejected": " bird" * 20}
    folder = train(
        Config(
            model=save_model(tmp_path / "model"),
            data=write_jsonl(tmp_path / "train.jsonl", [*rows(6), long, *rows(2, seed=3), long | long]),
            output_dir=str(tmp_path / "run"),
            reference_cache="off",
            max_tokens=60,
            max_length=250,
            max_steps=2,
            samples=0,
            dtype="fp32",
        ),
        Console(width=1000),
    )
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    (stage,) = [event for event in events if "largest_group_tokens" in event]
    assert stage["groups_over_max_tokens"] == 2 and stage["largest_group_tokens"] > 150
    said = capsys.readouterr().out
    assert said.count("2 groups are larger than max_tokens=60 and go alone, whole (rows 6, 9)") == 1
    assert f"the largest has {stage['largest_group_tokens']} tokens (row 9)" in said


def test_a_long_group_is_a_microbatch_of_its_own():
    some = [group(0, 20, [5, 5]), group(1, 500, [50, 60]), group(2, 30, [5, 5])]
    assert [[g.row for g in part] for part in split_step(some, 100)] == [[1], [2, 0]]


@pytest.mark.slow
def test_a_pair_of_32k_and_2_x_8k_tokens_trains():
    p = policy("llama", **NARROW, num_hidden_layers=1, max_position_embeddings=65536)
    pair = group(0, 32768, [8192, 8192])
    with torch.no_grad():
        logp = support.stock_logp(p, pair)
    config = Config(
        model="m", data="d", gradient_checkpointing=True, activation_offloading=True, tiled_mlp=True
    )
    activations.set_up_activations(p.model, config)
    p.set_sharing(True)
    with Largest() as largest:
        ours = p.token_logp(pack([pair]))
        ours.mean().backward()
    torch.testing.assert_close(ours, logp, rtol=0, atol=model_ulps(logp))
    assert largest.elements <= attention.QUERY_BLOCK * (32768 + 8192)
    grads = gradients(p.model)
    assert all(g.isfinite().all() and g.any() for g in grads.values())
    with torch.no_grad():
        for name, parameter in p.model.named_parameters():
            parameter += 0.01 * grads[name] / torch.stack([g.norm() for g in grads.values()]).norm()
        assert p.token_logp(pack([pair])).mean() > ours.mean()
