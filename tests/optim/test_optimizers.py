"""Every optimizer does what its library does, keeps its states over a stop, and learns what AdamW learns."""

import importlib.util
import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from fastdpo.api import train
from fastdpo.config.keys import Config
from fastdpo.errors import ConfigError
from fastdpo.optim import optimizers
from fastdpo.optim import pieces as optim_pieces
from fastdpo.optim.bytes import PAGED_FROM, host_state_bytes, state_bytes
from fastdpo.optim.library import check_library
from fastdpo.optim.optimizers import check_schedule, make_optimizer, set_schedule
from fastdpo.training import checkpoint
from tests.optim.optimizer_runs import OPTIMIZERS, RATE, config, make, needs, one_step, stepped, weights
from tests.optim.optimizer_runs import eager as eager
from tests.tiny import rows, save_model, write_jsonl

WAYS = {
    "plain": {},
    "in backward": dict(optimizer_in_backward=True),
    "offloaded": dict(offload_optimizer=True),
    "both": dict(offload_optimizer=True, optimizer_in_backward=True),
    "bf16": dict(pure_bf16=True),
    "bf16 in backward": dict(pure_bf16=True, optimizer_in_backward=True),
    "bf16, both": dict(pure_bf16=True, offload_optimizer=True, optimizer_in_backward=True),
}
COMBINATIONS = [
    pytest.param(*(name.values[0], way), marks=name.marks, id=f"{name.values[0]}-{way}")
    if hasattr(name, "marks")
    else pytest.param(name, way, id=f"{name}-{way}")
    for name in OPTIMIZERS
    for way in WAYS
]


def skip_sgd_offloaded(optim, way):
    if optim == "sgd" and WAYS[way].get("offload_optimizer"):
        pytest.skip("refused: sgd has no states")


def equal(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def apart(some, others):
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(some, others, strict=True))


def decaying(some):
    matrices, vectors = ([p for p in some if (p.ndim > 1) is big] for big in (True, False))
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


def test_adamw_rmsprop_and_sgd_are_torchs_own():
    kinds = {"adamw_torch_fused": torch.optim.AdamW, "rmsprop": torch.optim.RMSprop, "sgd": torch.optim.SGD}
    for optim, kind in kinds.items():
        some, want = weights(), weights()
        ours, fused = make(some, optim=optim), {"fused": True} if "fused" in optim else {}
        theirs = kind(decaying(want), lr=RATE, **fused)
        theirs.in_backward = False
        for step in range(3):
            one_step(ours, some, step)
            one_step(theirs, want, step)
        assert equal(some, want)


@needs("bitsandbytes")
def test_adamw_8bit_is_bitsandbytes_own():
    import bitsandbytes

    some, want = weights(), weights()
    ours = make(some, optim="adamw_8bit")
    theirs = bitsandbytes.optim.AdamW8bit(decaying(want), lr=RATE)
    theirs.in_backward = False
    for step in range(3):
        one_step(ours, some, step)
        one_step(theirs, want, step)
    assert equal(some, want) and ours.tensors()["0.state1"].dtype == torch.uint8


@pytest.mark.parametrize(
    "optim, bound",
    [
        pytest.param("adamw_8bit", 0.3, marks=needs("bitsandbytes")),
        pytest.param("adamw_torch_8bit", 0.3, marks=needs("torchao")),
        pytest.param("adamw_torch_4bit", 0.6, marks=needs("torchao")),
    ],
)
def test_few_bits_follow_adamw(optim, bound):
    """The updates of 8 steps, beside AdamW's: within what the quantised states explain, and not the same."""
    start, full, (few, states) = weights(), stepped(8)[0], stepped(8, optim=optim)
    start, full, few = ([w.detach() for w in some] for some in (start, full, few))
    assert 0 < float((few[2] - full[2]).norm() / (full[2] - start[2]).norm()) < bound
    assert any(value.dtype == torch.uint8 for value in states.values())
    assert torch.allclose(few[1], full[1], rtol=0, atol=1e-6)  # below 4,096 elements the states have 32 bits


def test_adafactors_rate_is_the_learning_rate():
    """No relative step and no scaling by the weights: the first update of a weight is RATE * its sign."""
    some, start = weights(), weights()
    with closing(make(some, optim="adafactor", weight_decay=0.0)) as optimizer:
        one_step(optimizer, some, 0)
    torch.testing.assert_close((some[1] - start[1]).abs(), torch.full((72,), RATE), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "optim", [name for name in OPTIMIZERS if name not in ("sgd", "adafactor", "rmsprop")]
)
def test_adamws_betas_and_eps(optim):
    """Those of torch's AdamW, in every library; small weights have states of 32 bits."""
    keys = {"adam_beta1": 0.6, "adam_beta2": 0.7, "adam_epsilon": 0.01}
    some, want, plain = (weights(shapes=((3, 4), (5,))) for _ in range(3))
    theirs = torch.optim.AdamW(decaying(want), lr=RATE, betas=(0.6, 0.7), eps=0.01)
    theirs.in_backward = False
    with closing(make(some, optim=optim, **keys)) as ours, closing(make(plain, optim=optim)) as without:
        for step in range(3):
            for optimizer, stepping in ((ours, some), (theirs, want), (without, plain)):
                one_step(optimizer, stepping, step)
    torch.testing.assert_close([*some], [*want], rtol=0, atol=1e-6)
    assert apart(some, plain) > 1e-3


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_only_matrices_decay(optim):
    """With gradients of zero, what moves is what decays."""
    some, start = weights(), weights()
    with closing(make(some, optim=optim, weight_decay=0.5)) as optimizer:
        for p in some:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(some[1], start[1])
    if optim == "rmsprop":  # the decay is in the gradient, which is then scaled
        assert (start[0] - some[0]).sign().equal(start[0].sign())
        return
    torch.testing.assert_close(some[0], start[0] * (1 - 0.5 * RATE))
    torch.testing.assert_close(some[2], start[2] * (1 - 0.5 * RATE))


@pytest.mark.parametrize("optim, way", COMBINATIONS)
def test_states_go_through_a_checkpoint_bitwise(optim, way, tmp_path):
    """Stopped after 2 of 4 steps, saved as the trainer saves, loaded into a new optimizer: every bit of the
    weights and of the states is as without the stop."""
    skip_sgd_offloaded(optim, way)
    want, states = stepped(4, optim=optim, **WAYS[way])
    some, saved = stepped(2, optim=optim, **WAYS[way])
    save_file(checkpoint._apart(saved), tmp_path / "optimizer.safetensors")
    with closing(make(some, optim=optim, **WAYS[way])) as optimizer:
        optimizer.load(load_file(tmp_path / "optimizer.safetensors"), 2)
        again = optimizer.tensors()
        assert again.keys() == saved.keys()
        for name in saved:
            assert torch.equal(again[name], saved[name]) and again[name].dtype == saved[name].dtype, name
        for step in (2, 3):
            one_step(optimizer, some, step)
        assert equal(some, want)
        assert all(torch.equal(value, states[name]) for name, value in optimizer.tensors().items())


@pytest.mark.parametrize("optim", OPTIMIZERS)
def test_ways_of_stepping_agree_bitwise_and_read_each_others_states(optim):
    want, states = stepped(4, optim=optim)
    for way in ("in backward", "offloaded", "both"):
        if optim == "sgd" and "offload_optimizer" in WAYS[way]:
            continue
        got, same = stepped(4, optim=optim, **WAYS[way])
        assert equal(got, want), way
        assert same.keys() == states.keys() and all(torch.equal(same[name], states[name]) for name in states)
        some, saved = stepped(2, optim=optim)
        with closing(make(some, optim=optim, **WAYS[way])) as optimizer:
            optimizer.load(saved, 2)
            for step in (2, 3):
                one_step(optimizer, some, step)
        assert equal(some, want), way


def on_gpu(optim, way, steps):
    """(weights on the GPU after the steps, states on the CPU)."""
    dtype = torch.bfloat16 if WAYS[way].get("pure_bf16") else torch.float32
    shapes = ((64, 130), (72,), (1024, 256))  # the last is large enough to be paged
    some = [torch.nn.Parameter(p.detach().cuda()) for p in weights(dtype, shapes)]
    some, states = stepped(steps, some, optim=optim, **WAYS[way])
    torch.cuda.synchronize()
    return some, {name: value.cpu() for name, value in states.items()}


@pytest.mark.gpu
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "optim", ["adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
)
def test_on_a_gpu_states_go_through_a_checkpoint_and_ways_agree(optim, way, tmp_path):
    if "paged" in optim and WAYS[way].get("offload_optimizer"):
        pytest.skip("refused: paged states move by themselves")
    if "8bit" in optim or "paged" in optim:
        pytest.importorskip("bitsandbytes")
    want, _ = on_gpu(optim, way, 4)
    some, saved = on_gpu(optim, way, 2)
    save_file(checkpoint._apart(saved), tmp_path / "optimizer.safetensors")
    with closing(make(some, optim=optim, **WAYS[way])) as optimizer:
        optimizer.load(load_file(tmp_path / "optimizer.safetensors"), 2)
        for step in (2, 3):
            one_step(optimizer, some, step)
    assert equal(some, want)
    if way == "in backward":
        assert equal(want, on_gpu(optim, "plain", 4)[0])
    if way in ("offloaded", "both"):  # the host's AdamW rounds in its own way
        assert apart(want, on_gpu(optim, "plain", 4)[0]) < (
            1e-5 if optim == "adamw_torch_fused" else 4 * RATE
        )


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("way", ["offloaded", "bf16"])
def test_many_pieces_are_as_one(optim, way, monkeypatch):
    """A weight of 5 pieces, the last one shorter: updates and states of the whole."""
    if optim == "sgd" and way == "offloaded":
        pytest.skip("refused: sgd has no states")
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    shape = (176, 128)  # 22,528 elements: 5 pieces of 4,608 at most
    keys = dict(optim=optim, **WAYS[way])
    want, states = stepped(3, weights(dtype, shapes=[shape]), **keys)
    monkeypatch.setattr(optim_pieces, "PIECE", 5000)
    spans = optim_pieces.spans_of(176 * 128)
    assert [s.stop - s.start for s in spans] == [4608] * 4 + [4096]
    some, saved = stepped(3, weights(dtype, shapes=[shape]), **keys)
    assert saved.keys() == states.keys()
    close = dict(rtol=0, atol=0) if way == "offloaded" else dict(rtol=0, atol=2 * RATE * 3)
    torch.testing.assert_close(some[0], want[0], **close)
    assert all(saved[name].shape == states[name].shape for name in states)
    if way == "offloaded":  # rounding at random draws other bits for other pieces
        assert all(torch.equal(saved[name], states[name]) for name in states)
        with closing(make(some, **keys)) as optimizer:
            optimizer.load(saved, 3)
            again = optimizer.tensors()
        assert all(torch.equal(again[name], states[name]) for name in states)


@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("shape", [(64, 130), (64, 128), (72,), (5000,)], ids=str)
def test_state_bytes_are_those_of_the_library(optim, shape):
    """What the plan counts, against the tensors that the library made; tables and step numbers aside."""
    _, states = stepped(1, weights(shapes=[shape]), optim=optim)
    kept = [v for name, v in states.items() if v.ndim and "qmap" not in name]
    found = sum(v.numel() * v.element_size() for v in kept)
    keys, numel = config(optim=optim), weights(shapes=[shape])[0].numel()
    assert state_bytes(keys, numel, 4, shape) == found and host_state_bytes(keys, numel, 4, shape) == 0
    if optim != "sgd":
        moved = config(optim=optim, offload_optimizer=True)
        assert (state_bytes(moved, numel, 4, shape), host_state_bytes(moved, numel, 4, shape)) == (0, found)


def test_paged_bytes_are_counted_on_the_host():
    """bitsandbytes' get_state_buffer: from 100,000 elements on, states are paged; the scales never are."""
    for numel in (PAGED_FROM - 1, PAGED_FROM):
        eight, thirty_two = config(optim="paged_adamw_8bit"), config(optim="paged_adamw_32bit")
        scales, paged = 8 * -(-numel // 256), numel == PAGED_FROM
        assert state_bytes(eight, numel) == scales + (0 if paged else 2 * numel)
        assert host_state_bytes(eight, numel) == (2 * numel if paged else 0)
        assert (state_bytes(thirty_two, numel), host_state_bytes(thirty_two, numel)) == (
            (0, 8 * numel) if paged else (8 * numel, 0)
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to page out of")
@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_paging_without_a_gpu_is_refused(optim):
    missing = importlib.util.find_spec("bitsandbytes") is None
    with pytest.raises(ConfigError, match=r"fastdpo\[quant\]" if missing else "there is no GPU here"):
        check_library(config(optim=optim))


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch_8bit", "adamw_torch_4bit"])
def test_a_missing_library_is_named(optim, monkeypatch):
    def gone(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("fastdpo.optim.library.importlib.import_module", gone)
    with pytest.raises(ConfigError, match=rf"optim: {optim} is .*pip install 'fastdpo\[quant\]'"):
        check_library(config(optim=optim))


@pytest.mark.parametrize(
    "keys, text",
    [
        (dict(offload_optimizer=True, optim="sgd"), "sgd has no states"),
        (dict(offload_optimizer=True, optim="paged_adamw_8bit"), "moves its states to the host by itself"),
        (dict(optimizer_in_backward=True, max_grad_norm=1.0), "set max_grad_norm: 0"),
        (dict(pure_bf16=True, lora_rank=2), "pure_bf16: a LoRA's weights stay in fp32"),
        (dict(pure_bf16=True, dtype="fp32"), "pure_bf16: contradicts dtype: fp32"),
        (dict(optim="adam"), "optim: 'adam' is not one of"),
    ],
)
def test_refused_combinations_say_why(keys, text):
    with pytest.raises(ConfigError, match=text):
        config(**keys)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return dict(model=save_model(folder / "model"), data=write_jsonl(folder / "rows.jsonl", rows(20)))


def trained(config):
    """(metrics without times, weights' bytes) of a run that goes through the trainer."""
    train(config, Console(quiet=True))
    folder = Path(config.output_dir)
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    timed = ("per_second", "seconds", "memory", "idle_share")
    lines = [{k: v for k, v in line.items() if not any(t in k for t in timed)} for line in lines]
    (path,) = (folder / "model").glob("*.safetensors")
    return lines, path.read_bytes()


RUNS = [
    dict(optimizer_in_backward=True, max_tokens=100),
    dict(offload_optimizer=True, optimizer_in_backward=True, pure_bf16=True, dtype="auto"),
    dict(optim="adafactor", pure_bf16=True, dtype="auto"),
    pytest.param(dict(optim="adamw_8bit", lora_rank=2), marks=needs("bitsandbytes")),
    pytest.param(dict(optim="adamw_torch_4bit", offload_optimizer=True), marks=needs("torchao")),
]


@pytest.mark.parametrize("keys", RUNS, ids=str)
def test_a_run_resumed_is_the_same_run(inputs, tmp_path, monkeypatch, keys):
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
    common = dict(learning_rate=1e-3, batch_size=4, max_steps=6, max_length=64, max_grad_norm=0)
    common |= dict(logging_steps=1, save_steps=3, samples=0, dtype="fp32", lr_scheduler_type="constant")
    make = lambda name, **more: Config(output_dir=str(tmp_path / name), **inputs | common | keys | more)
    whole = trained(make("whole"))
    trained(short := make("cut", max_steps=3))
    again = trained(replace(short, resume=True, max_steps=6))
    assert again[1] == whole[1]
    assert [line for line in again[0] if line["step"] > 3 and "loss" in line] == [
        line for line in whole[0] if line["step"] > 3 and "loss" in line
    ]


@pytest.mark.parametrize("name", optimizers._KNOWN)
def test_schedules_that_need_no_look_are_functions_of_the_step(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
    assert isinstance(get_scheduler(name, optimizer, 2, 10), LambdaLR)


def test_options_of_a_schedule():
    """transformers' own function with them; what it does not take is told before any work."""
    keys = dict(
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr": RATE / 4}, warmup_steps=2
    )
    spec = config(**keys)
    check_schedule(spec)
    parameter = weights(shapes=((2, 3),))
    optimizer, schedule = make_optimizer(SimpleNamespace(trained=lambda: parameter), spec, 10)
    with closing(optimizer):
        set_schedule(schedule, 10)
        assert schedule.get_last_lr()[0] == pytest.approx(RATE / 4)
    for kind, options in (("linear", {"min_lr": 0.1}), ("cosine_with_min_lr", None)):
        with pytest.raises(ConfigError, match=rf"lr_scheduler_type: '{kind}' with lr_scheduler_kwargs {{"):
            check_schedule(config(lr_scheduler_type=kind, lr_scheduler_kwargs=options))
