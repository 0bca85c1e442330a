"""Recomputed, offloaded or tiled: the log-probs and every gradient are those of the plain path."""

import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.config.keys import Config
from fastdpo.data.packing import pack
from fastdpo.errors import ConfigError
from fastdpo.model import activations, offloading, tiled_mlp
from fastdpo.model.policy import Policy
from tests.model.test_shared_prompt import FAMILIES, assert_gradients_close, gradients
from tests.rounding import model_ulps
from tests.tiny import group, groups, policy
from tests.training.test_trainer import Run

LEVELS = [False, True, 2, "selective"]


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    """Sizes at which tiny models offload and tile."""
    monkeypatch.setattr(offloading, "MIN_BYTES", 1024)
    monkeypatch.setattr(tiled_mlp, "TILE", 16)


def settings(level=False, offload=False, tiled=False):
    return Config(
        model="m",
        data="d",
        gradient_checkpointing=level,
        activation_offloading=offload,
        tiled_mlp=tiled,
    )


def with_lora(p, **options):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    out = Policy(peft.get_peft_model(p.model, lora).train(), p.dtype)
    for name, parameter in out.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return out


def in_4_bits(module):
    """Freezes every linear layer inside, in NF4."""
    bnb = pytest.importorskip("bitsandbytes")
    for parent in list(module.modules()):
        for name, plain in list(parent.named_children()):
            if isinstance(plain, torch.nn.Linear):
                sizes = plain.in_features, plain.out_features
                small = bnb.nn.Linear4bit(
                    *sizes, bias=False, compute_dtype=plain.weight.dtype, quant_type="nf4"
                )
                small.load_state_dict(plain.state_dict())
                setattr(parent, name, small.to("cpu"))


def trained(p, share=True, dtype=None):
    """(log-probs, gradients) of one forward and backward."""
    p.dtype = dtype or p.dtype
    p.set_sharing(share)
    logp = p.token_logp(pack(groups(), share))
    upstream = torch.randn(len(logp), generator=torch.Generator().manual_seed(5))
    (logp * upstream).sum().backward()
    return logp.detach(), gradients(p.model)


def assert_same(ours, truth):
    assert torch.equal(ours[0], truth[0])
    assert ours[1].keys() == truth[1].keys()
    for name, grad in truth[1].items():
        assert torch.equal(ours[1][name], grad), name


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_every_composition_is_the_plain_path(family, lora, share):
    """Bitwise, but with tiles: those add up a weight's gradient in another order."""
    p = policy(family, num_hidden_layers=3, **FAMILIES[family])
    p = with_lora(p) if lora else p
    truth = trained(p, share)
    for level in LEVELS:
        for offload in (False, True):
            for tiled in (False, True):
                activations.set_up_activations(p.model, settings(level, offload, tiled))
                ours = trained(p, share)
                if tiled:
                    torch.testing.assert_close(ours[0], truth[0], rtol=0, atol=model_ulps(truth[0]))
                    assert_gradients_close(ours[1], truth[1], 1e-5)
                else:
                    assert_same(ours, truth)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_recomputes_and_offloads(family):
    p = policy(family, **FAMILIES[family])
    truth = trained(p)
    for level in (True, "selective"):
        activations.set_up_activations(p.model, settings(level, True))
        assert_same(trained(p), truth)


@pytest.mark.parametrize("level", LEVELS)
def test_bf16_autocast_is_bitwise_too(level):
    p = policy("llama")
    truth = trained(p, dtype=torch.bfloat16)
    activations.set_up_activations(p.model, settings(level, True))
    assert_same(trained(p, dtype=torch.bfloat16), truth)


def test_dora_and_a_lora_on_the_head():
    p = with_lora(policy("llama"), use_dora=True)
    truth = trained(p)
    activations.set_up_activations(p.model, settings(True, True, True))
    ours = trained(p)
    torch.testing.assert_close(ours[0], truth[0], rtol=0, atol=model_ulps(truth[0]))
    assert_gradients_close(ours[1], truth[1], 1e-5)


def test_a_lora_on_4_bit_weights():
    p = policy("llama")
    p.model.requires_grad_(False)
    in_4_bits(p.model.model.layers)
    p = with_lora(p)
    truth = trained(p)
    assert all("lora_" in name for name in truth[1])
    for level in LEVELS:
        activations.set_up_activations(p.model, settings(level, True))
        assert_same(trained(p), truth)
    activations.set_up_activations(p.model, settings("selective", True, True))
    assert_gradients_close(trained(p)[1], truth[1], 1e-5)
    products = [
        backward_operators(p, level)["bitsandbytes::gemm_4bit"] for level in (False, "selective", True)
    ]
    assert products == [0, 0, 2 * 7]


class Counted(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


def backward_operators(p, level):
    activations.set_up_activations(p.model, settings(level))
    p.set_sharing(True)
    logp = p.token_logp(pack(groups()))
    with Counted() as counted:
        logp.sum().backward()
    p.model.zero_grad()
    return counted.seen


def test_autocast_keeps_no_copy_of_a_weight():
    """Or those of all weights would stay until the forward ends."""
    p = policy("llama", dtype=torch.float32)
    p.dtype, x = torch.bfloat16, torch.randn(3, 64, dtype=torch.bfloat16)
    with Counted() as counted, p.autocast():
        for _ in range(2):
            p.model.model.layers[0].self_attn.q_proj(x)
    assert counted.seen["aten::_to_copy"] == 2


def test_levels_recompute_what_they_say():
    p = policy("llama", num_hidden_layers=4)
    products = lambda seen: seen["aten::mm"] + seen["aten::addmm"]
    attention = lambda seen: seen["aten::_scaled_dot_product_flash_attention_for_cpu"]
    norms = lambda seen: seen["aten::rsqrt"]
    none, every, second, third, selective = (
        backward_operators(p, level) for level in (False, True, 2, 3, "selective")
    )
    # a layer has 7 products; that of down_proj, its last, need not be computed again
    assert products(every) - products(none) == 4 * 6
    assert products(second) - products(none) == products(third) - products(none) == 2 * 6
    assert products(selective) == products(none) and attention(selective) == attention(none) == 0
    assert norms(selective) == norms(every) == 4 * 2 and norms(second) == 2 * 2 and norms(none) == 0
    assert attention(every) == 2 * attention(second) > 0
    flags = lambda: [layer.gradient_checkpointing for layer in p.model.model.layers]
    backward_operators(p, 3)
    assert flags() == [True, False, False, True]
    backward_operators(p, False)
    assert not any(flags())


@pytest.fixture
def sent(monkeypatch):
    """Every storage that was moved, as (weak reference, bytes)."""
    seen, send = [], offloading.Moves._send

    def spy(self, tensor):
        seen.append((StorageWeakRef(tensor.untyped_storage()), tensor.untyped_storage().nbytes()))
        return send(self, tensor)

    monkeypatch.setattr(offloading.Moves, "_send", spy)
    return seen


def test_with_checkpointing_each_layers_input_is_moved(sent):
    p, batch = policy("llama", num_hidden_layers=6), pack(groups())
    activations.set_up_activations(p.model, settings(True, True))
    p.set_sharing(True)
    hidden = p.hidden(batch)
    size = batch.input_ids.numel() * 64 * 4
    assert [n for _, n in sent[:6]] == [size] * 6
    # after the layers: what the last norm saved
    gone = [ref.expired() for ref, _ in sent]
    assert all(gone[: -offloading.AHEAD - 1]) and not gone[-1]
    hidden.sum().backward()


def test_what_selective_keeps_is_not_moved_and_the_run_says_so(sent):
    p, batch = policy("llama"), pack(groups())
    p.set_sharing(True)
    said, moved = [], []
    for level in (True, "selective"):
        said.append(activations.set_up_activations(p.model, settings(level, True))[-1])
        sent.clear()
        p.hidden(batch)
        moved.append([size for _, size in sent])
    assert moved[0] == moved[1]
    assert said[0].startswith("what the layers save") and said[1].endswith("products and attention are not")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_checkpointing_each_storage_is_moved_once_and_no_weight(sent, dtype):
    p = policy("llama", num_hidden_layers=3)
    p.dtype = dtype
    p.set_sharing(True)
    batch, saved = pack(groups()), {}

    def pack_hook(tensor):
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
        p.hidden(batch)
    weights = {q.untyped_storage()._cdata for q in p.model.parameters()}
    small = lambda s: s.nbytes() < offloading.MIN_BYTES
    expected = [s.nbytes() for key, s in saved.items() if key not in weights and not small(s)]
    casts = [q.numel() * 2 for q in p.model.model.layers.parameters() if q.dim() == 2]
    if dtype == torch.bfloat16:
        for size in casts:
            expected.remove(size)
    saved.clear()
    activations.set_up_activations(p.model, settings(False, True))
    hidden = p.hidden(batch)
    assert sorted(n for _, n in sent) == sorted(expected)
    alive = [n for ref, n in sent if not ref.expired()]
    assert sum(alive) < 0.2 * sum(expected)
    hidden.sum().backward()


def test_nothing_is_moved_without_a_backward(sent):
    p = policy("llama")
    activations.set_up_activations(p.model, settings(False, True))
    p.set_sharing(True)
    with torch.no_grad():
        p.hidden(pack(groups()))
    assert not sent


def test_the_head_is_not_offloaded(sent):
    p, batch = policy("llama"), pack(groups())
    activations.set_up_activations(p.model, settings(True, True))
    p.set_sharing(True)
    hidden = p.hidden(batch)
    n = len(sent)
    p.token_logp(batch)
    assert len(sent) == 2 * n  # of the second forward, and nothing of the head
    del hidden


def test_host_copies_go_with_the_graph(monkeypatch):
    """Without reference cycles: pinned memory must not wait for the garbage collector."""
    made, init = [], offloading._Moved.__init__

    def spy(self, number, device):
        init(self, number, device)
        made.append(weakref.ref(self))

    monkeypatch.setattr(offloading._Moved, "__init__", spy)
    p = policy("llama")
    activations.set_up_activations(p.model, settings(False, True))
    p.set_sharing(True)
    gc.disable()
    try:
        hidden = p.hidden(pack(groups()))
        assert any(ref() is not None for ref in made)
        del hidden  # a forward that nobody goes back through
        assert all(ref() is None for ref in made)
        p.hidden(pack(groups())).sum().backward()
        assert all(ref() is None for ref in made)
    finally:
        gc.enable()


def test_an_aborted_forward_leaves_no_hooks(sent):
    p = policy("llama")
    activations.set_up_activations(p.model, settings(True, True))
    p.set_sharing(True)
    batch = pack(groups())
    p.model.model.norm.forward = None
    with pytest.raises(TypeError):
        p.hidden(batch)
    del p.model.model.norm.forward
    seen = len(sent)
    x = torch.ones(32, 64, requires_grad=True)  # as large as what was moved
    x.exp()
    assert len(sent) == seen > 0


def test_a_graph_can_be_gone_through_twice():
    p = policy("llama")
    activations.set_up_activations(p.model, settings(False, True))
    p.set_sharing(True)
    out = p.hidden(pack(groups())).sum()
    out.backward(retain_graph=True)
    first = gradients(p.model)
    out.backward()
    assert_same((out, gradients(p.model)), (out, first))


class ChangedInPlace(torch.nn.Module):
    def __init__(self, copies):
        super().__init__()
        self.w, self.copies = torch.nn.Parameter(torch.randn(16, 64)), copies

    def forward(self, x):
        hidden = x @ self.w
        before = hidden.sin()
        hidden = (hidden.clone() if self.copies else hidden).add_(1)
        return before + hidden.cos()


def test_the_backward_gets_what_was_saved():
    """Where its storage was changed in place since (torch alone refuses), and saved once more."""
    x, gradients = torch.randn(32, 16), []
    for copies in (True, False):
        torch.manual_seed(0)
        module = ChangedInPlace(copies)
        if not copies:
            offloading.Offloading(module)
        gradients += torch.autograd.grad(module(x).sum(), module.w)
    assert torch.equal(*gradients)


def test_a_deep_copy_is_its_own_model():
    p = policy("llama")
    activations.set_up_activations(p.model, settings(True, True, True))
    twin = Policy(copy.deepcopy(p.model), p.dtype)
    trained(twin)
    truth = trained(p)
    with torch.no_grad():
        for parameter in p.model.parameters():
            parameter.zero_()
    assert_same(trained(twin), truth)


@pytest.mark.parametrize("level, tiled", [(False, False), (True, True), ("selective", True)])
def test_fake_tensors_run_the_same_code(level, tiled):
    p = policy("llama")
    p.set_sharing(True)
    activations.set_up_activations(p.model, settings(level, True, tiled))
    ids = pack(groups(), share=False)
    p.set_sharing(False)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for module in p.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(mode.from_tensor(parameter.detach()))
        fake = lambda t: mode.from_tensor(t)
        out = p.core.base_model(input_ids=fake(ids.input_ids), attention_mask=fake(ids.attention_mask))
        out.last_hidden_state.sum().backward()
    assert p.model.model.layers[0].mlp.up_proj.weight.grad.shape == (96, 64)


def test_a_run_learns_the_same(tmp_path, monkeypatch):
    """Through the trainer: reference, evaluation and steps."""
    monkeypatch.setattr("fastdpo.api.write_report", lambda *args, **keys: None)
    plain = Run(tmp_path, "plain", max_steps=3)
    keys = dict(gradient_checkpointing="selective", activation_offloading=True)
    ours = Run(tmp_path, "ours", max_steps=3, **keys)
    assert torch.equal(ours.losses, plain.losses) and torch.equal(ours.weights(), plain.weights())


@pytest.mark.gpu
@pytest.mark.parametrize("level", LEVELS)
def test_offloading_on_a_gpu(level, monkeypatch, deterministic):
    """Copies on a stream of their own: the same bits, and the layers' inputs are gone from the device."""
    monkeypatch.setattr(offloading, "MIN_BYTES", 1 << 20)
    p = policy("llama", num_hidden_layers=8, hidden_size=512, head_dim=64, num_attention_heads=8)
    p = Policy(p.model.cuda(), torch.bfloat16)
    p.set_sharing(True)
    batch = pack([group(i, 3000, [500, 500]) for i in range(4)]).to("cuda")
    results, kept = [], []
    for offload in (False, True, True):
        activations.set_up_activations(p.model, settings(level, offload))
        before = torch.cuda.memory_allocated()
        hidden = p.hidden(batch)
        kept.append(torch.cuda.memory_allocated() - before)
        hidden.float().sin().sum().backward()
        results.append((hidden.detach(), gradients(p.model)))
        del hidden
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])
    if level != "selective":  # which keeps what it saves of a layer on the device
        assert max(kept[1:]) < 0.6 * kept[0]


def test_models_that_cannot_say_so():
    p = policy("opt")
    with pytest.raises(ConfigError, match="tiled_mlp: OPTForCausalLM has no dense MLP"):
        activations.set_up_activations(p.model, settings(tiled=True))
    p.model.model.decoder.layers = torch.nn.ModuleList()
    with pytest.raises(ConfigError, match="gradient_checkpointing: OPTForCausalLM has no layers"):
        activations.set_up_activations(p.model, settings(True))
