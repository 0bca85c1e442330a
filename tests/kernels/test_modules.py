"""The modules against F.cross_entropy in float64, and their signatures against Liger's and CCE's."""

import inspect

import pytest
import torch
import torch.nn.functional as F
from fastdpo_kernels import FusedLinearCrossEntropyLoss, LinearCrossEntropy

# what the module of cut_cross_entropy is made with, of what is here, and called with
CCE = {"ignore_index": -100, "softcap": None, "reduction": "mean", "shift": 0}
CCE_CALL = ["e", "c", "targets", "bias"]


def tensors(*shape, D=6, V=11):
    normal = lambda *size: torch.randn(*size, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, V, shape)
    target.view(-1)[::3] = 7
    return normal(*shape, D), normal(V, D), target, normal(V)


def truth(hidden, weight, target, bias, *, scale=1.0, softcap=None, reduction="mean", ignore_index=-100):
    logits = scale * (hidden @ weight.T + bias)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    options = {"ignore_index": ignore_index, "reduction": reduction}
    loss = F.cross_entropy(logits.flatten(0, -2), target.flatten(), **options)
    return loss.view(target.shape) if reduction == "none" else loss


@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
@pytest.mark.parametrize("options", ({}, {"softcap": 2.0, "scale": 0.5, "ignore_index": 7}), ids=str)
@pytest.mark.parametrize("module", (LinearCrossEntropy, FusedLinearCrossEntropyLoss))
def test_cross_entropy(module, options, reduction):
    hidden, weight, target, bias = tensors(2, 5)
    made = module(reduction=reduction, **options)
    swapped = module is FusedLinearCrossEntropyLoss
    loss = made(weight, hidden, target, bias) if swapped else made(hidden, weight, target, bias)
    want = truth(hidden, weight, target, bias, reduction=reduction, **options)
    torch.testing.assert_close(loss, want)
    upstream = torch.randn_like(want)
    grads = [torch.autograd.grad(out, (hidden, weight, bias), upstream) for out in (loss, want)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("reduction", ("mean", "none"))
@pytest.mark.parametrize("shift", (True, 2, 0))
def test_a_shift_is_to_later_targets(shift, reduction):
    hidden, weight, target, bias = tensors(2, 5)
    loss = LinearCrossEntropy(shift=shift, reduction=reduction)(hidden, weight, target, bias)
    want = truth(hidden[:, : 5 - shift], weight, target[:, int(shift) :], bias, reduction=reduction)
    if reduction == "none":  # as CCE's: of targets' shape
        assert loss.shape == target.shape and not loss[:, : int(shift)].any()
        loss = loss[:, int(shift) :]
    torch.testing.assert_close(loss, want)


def test_nothing_that_counts_is_nan_as_in_torch():
    hidden, weight, target, bias = tensors(4)
    target[:] = -100
    assert (
        LinearCrossEntropy()(hidden, weight, target, bias).isnan()
        and truth(hidden, weight, target, bias).isnan()
    )
    assert LinearCrossEntropy(reduction="sum")(hidden, weight, target, bias) == 0


def takes(function):
    return {p.name: p.default for p in inspect.signature(function).parameters.values()}


def test_called_like_cce():
    assert list(inspect.signature(LinearCrossEntropy().forward).parameters) == CCE_CALL
    assert takes(LinearCrossEntropy) == CCE | {"scale": 1.0}


def test_called_like_liger():
    liger = pytest.importorskip("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss
    ours = FusedLinearCrossEntropyLoss
    assert takes(ours().forward) == takes(liger().forward)
    assert takes(ours).items() <= (takes(liger) | {"scale": 1.0}).items()


@pytest.mark.parametrize("module", (LinearCrossEntropy, FusedLinearCrossEntropyLoss))
@pytest.mark.parametrize(
    "option", ("label_smoothing", "lse_square_scale", "ce_weight", "filter_eps", "return_lse")
)
def test_an_option_of_theirs_that_is_not_here_is_refused_by_name(module, option):
    with pytest.raises(TypeError, match=option):
        module(**{option: 0.1})


def test_refusals():
    with pytest.raises(ValueError, match="mean, sum or none, got 'batchmean'"):
        LinearCrossEntropy(reduction="batchmean")
    hidden, weight, target, _ = tensors(2, 5)
    for shift in (-1, 5):
        with pytest.raises(ValueError, match=rf"\[0, 5\), got {shift}"):
            LinearCrossEntropy(shift=shift)(hidden, weight, target)
    with pytest.raises(TypeError):  # Liger's first is ce_weight
        FusedLinearCrossEntropyLoss(torch.ones(11))
