"""FusedLinearDPOLoss beside Liger's own class, run by torch on the CPU."""

import inspect

import pytest
import torch

from fastdpo.integrations import liger as ours
from tests.rounding import ulps

pytestmark = pytest.mark.peer
B, T, H, V = 3, 7, 16, 53


@pytest.fixture(scope="module")
def theirs():
    reason = "needs liger-kernel (its torch-only losses run on a CPU)"
    return pytest.importorskip("liger_kernel.chunked_loss", reason=reason).LigerFusedLinearDPOLoss


def inputs(bias: bool):
    """Arguments of the forward; the policy's require a gradient."""
    draw = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=draw)
    target = torch.randint(0, V, (2 * B, T), generator=draw)
    target[:, :2] = -100
    target[1, 5:] = target[5, 4:] = -100
    policy = [normal(V, H), normal(2 * B, T, H)]
    biases = [normal(V).requires_grad_() if bias else None, normal(V) if bias else None]
    policy = [t.requires_grad_() for t in policy]
    return [
        *policy,
        target,
        biases[0],
        normal(2 * B, T, H),
        policy[0].detach() + 0.1 * normal(V, H),
        biases[1],
    ]


def results(loss_class, arguments, **settings):
    """Loss, statistics and gradients."""
    loss, stats = loss_class(compiled=False, **settings)(*arguments)
    wanted = [t for t in arguments if t is not None and t.requires_grad]
    return [loss.detach(), *stats, *torch.autograd.grad(3 * loss, wanted)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.shape == y.shape and x.dtype == y.dtype
        # a loss is a difference of log-probs of hundreds of nats: its rounding is theirs, not its own
        torch.testing.assert_close(y, x, atol=max(1e-5, ulps(16, x)), rtol=1e-5)


SMOOTHING = {"exo_pair": 0.01, "robust": 0.1}
SETTINGS = [{"loss_type": name, "label_smoothing": SMOOTHING.get(name, 0.0)} for name in ours._LOSSES]
SETTINGS += [{"compute_nll_loss": True, "alpha": 0.7}, {"average_log_prob": True, "beta": 0.5}]
SETTINGS += [
    {"use_ref_model": False, "beta": 0.01},
    {"chunk_size": 3},
    {"discopop_tau": 0.5, "loss_type": "discopop"},
]


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_values_and_gradients(theirs, settings, bias):
    arguments = inputs(bias)
    assert_same(
        results(theirs, arguments, **settings), results(ours.FusedLinearDPOLoss, arguments, **settings)
    )


def test_interface(theirs):
    """Their arguments, in their order and with their defaults; ours come last."""
    assert inspect.signature(ours.FusedLinearDPOLoss) == inspect.signature(theirs)
    mine, liger = (list(inspect.signature(c.forward).parameters) for c in (ours.FusedLinearDPOLoss, theirs))
    assert mine == [*liger, "ref_chosen_logps", "ref_rejected_logps"]
    assert set(ours._LOSSES) == theirs._SUPPORTED_LOSS_TYPES


@pytest.mark.parametrize("average", [False, True])
def test_stored_reference(average):
    """Log-probs computed once give what the reference's hidden states give, to the bit."""
    arguments = inputs(True)
    loss = ours.FusedLinearDPOLoss(average_log_prob=average)
    live = loss(*arguments)
    only_reference = ours.FusedLinearDPOLoss(use_ref_model=False, average_log_prob=average)
    hidden, weight, bias = arguments[4:]
    chosen, rejected = only_reference(weight, hidden, arguments[2], bias)[1][:2]
    stored = loss(*arguments[:4], ref_chosen_logps=chosen, ref_rejected_logps=rejected)
    assert torch.equal(live[0], stored[0])
    wrong = loss(*arguments[:4], ref_chosen_logps=0.99 * chosen, ref_rejected_logps=rejected)
    assert (wrong[0] - live[0]).abs() > 1e-4


def test_autocast():
    """As a linear layer would: bf16 operands, fp32 results."""
    arguments = inputs(False)
    exact = ours.FusedLinearDPOLoss()(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, stats = ours.FusedLinearDPOLoss()(*arguments)
    assert loss.dtype == stats[0].dtype == torch.float32
    assert 0 < (loss - exact[0]).abs() < 0.3 * exact[0]


def test_refusals():
    with pytest.raises(ValueError, match="ref_input and ref_weight, or ref_chosen_logps"):
        ours.FusedLinearDPOLoss()(*inputs(False)[:4])
    for settings in (
        {"loss_type": "ipo"},
        {"loss_type": "exo_pair"},
        {"loss_type": "robust", "label_smoothing": 0.5},
    ):
        with pytest.raises(ValueError, match=r"loss_type"):
            ours.FusedLinearDPOLoss(**settings)
