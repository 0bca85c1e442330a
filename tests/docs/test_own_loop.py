"""docs/own_loop.md: its three losses agree, step after step, and so do their gradients; labels with -100."""

import pytest
import torch

from tests.docs.snippets import block
from tests.docs.workplace import furnish


def snippet():
    """The names that its block defines."""
    names = {}
    exec(block("own_loop.md", "The loss alone", "python"), names)
    return names


def train(loss_of, dtype, steps=3):
    """Losses and parameters of a bare torch loop: an embedding, a layer and a tied head."""
    torch.manual_seed(0)
    table = torch.randn(101, 16, dtype=dtype, requires_grad=True)
    layer = torch.nn.Linear(16, 16, dtype=dtype)
    parameters = [table, *layer.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    cu_resp, pairs = torch.tensor([0, 4, 9, 15, 18, 20]), torch.tensor([[0, 1], [3, 2], [3, 4]])
    losses, gradients = [], []
    for _ in range(steps):
        tokens, target = torch.randint(0, 101, (2, 20))
        ref = torch.randn(20, dtype=dtype) - 5
        loss = loss_of(torch.tanh(layer(table[tokens])), table, target, cu_resp, pairs, ref)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in parameters])
    return losses, gradients


@pytest.mark.parametrize("name", ("any_loss", "fused"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_same_loss_and_gradients_as_the_naive_lines(name, dtype):
    names = snippet()
    near = dict(rtol=1e-10, atol=1e-13) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(train(names[name], dtype), train(names["naive"], dtype), **near)


def test_labels_of_a_collator_under_autocast(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block("own_loop.md", "Labels with -100, autocast, modules", "python"), names)
    batch, labels, model = (names[name] for name in ("batch", "labels", "model"))
    weight = model.get_output_embeddings().weight
    (ours,), weight.grad = [weight.grad], None
    assert (labels == -100).sum() == 5 and ours.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        own = model(**batch, labels=labels).loss
    own.backward()
    for loss in (names["loss"], names["same"]):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, own.float(), rtol=2e-2, atol=2e-2)
    assert (ours - weight.grad).norm() < 0.05 * weight.grad.norm()
