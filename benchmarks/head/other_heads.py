"""The other heads, as contenders of `benchmarks.head.run`: {name: maker of run(inputs) -> (loss, logp)}.

A maker imports its package and raises where it is absent or cannot do the shape; the reason goes into
the table. All get the same scored rows. Two serve the mean cross-entropy only: the same GEMMs, no
preference loss, no log-probs.
"""

import torch

from benchmarks.head.inputs import BETA, Inputs


class CannotRunError(Exception):
    """A peer that is there but not for this device or shape."""


def _needs_gpu(inputs: Inputs) -> None:
    if not inputs.hidden.is_cuda:
        raise CannotRunError("needs a GPU")


def _no_softcap(inputs: Inputs) -> None:
    if inputs.shape.softcap is not None:
        raise CannotRunError("has no softcap")


def _full_logp(hidden, weight, target, softcap):
    logits = (hidden @ weight.t()).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(1).gather(1, target[:, None])[:, 0]


def torch_logits(inputs: Inputs):
    """Plain torch: [M, V] logits, in fp32 after the GEMM."""

    def run(inputs):
        logp = _full_logp(inputs.hidden, inputs.weight, inputs.target, inputs.shape.softcap)
        return inputs.loss_of(logp), logp

    return run


def torch_compile(inputs: Inputs):
    """The same, compiled."""
    _needs_gpu(inputs)
    torch._dynamo.reset()  # a shape and a mode each: more than its cache takes
    compiled = torch.compile(_full_logp, dynamic=False)

    def run(inputs):
        logp = compiled(inputs.hidden, inputs.weight, inputs.target, inputs.shape.softcap)
        return inputs.loss_of(logp), logp

    return run


def trl_chunked(inputs: Inputs):
    """TRL's head of DPO since 1.16, at TRL's own chunk."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def run(inputs):
        args = (inputs.hidden, inputs.weight, None, inputs.target, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE)
        logp = ChunkedLogProbFunction.apply(*args, inputs.shape.softcap, 1.0, ())[0]
        return inputs.loss_of(logp), logp

    return run


def cut_cross_entropy(inputs: Inputs):
    """Apple's, with one loss a token."""
    from cut_cross_entropy import linear_cross_entropy

    _needs_gpu(inputs)

    def run(inputs):
        options = dict(softcap=inputs.shape.softcap, reduction="none")
        logp = -linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, **options)
        return inputs.loss_of(logp), logp

    return run


def liger_dpo(inputs: Inputs):
    """LigerFusedLinearDPOLoss: winners, then losers, padded (here to their own length). It takes no
    cached reference, so it runs without one: less work than with."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    _needs_gpu(inputs)
    _no_softcap(inputs)
    fused = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    order = inputs.pairs.t().flatten()

    def run(inputs):
        by_response = inputs.hidden.view(-1, inputs.shape.response, inputs.shape.D)
        targets = inputs.target.view(-1, inputs.shape.response)
        loss, _ = fused(inputs.weight, by_response[order], targets[order])
        return loss * len(inputs.pairs), None

    return run


def liger_ce(inputs: Inputs):
    """LigerFusedLinearCrossEntropyLoss: the mean only."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    _needs_gpu(inputs)
    fused = LigerFusedLinearCrossEntropyLoss(softcap=inputs.shape.softcap)
    return lambda inputs: (fused(inputs.weight, inputs.hidden, inputs.target), None)


def quack_ce(inputs: Inputs):
    """QuACK's chunked linear cross-entropy: the mean only."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    _needs_gpu(inputs)
    _no_softcap(inputs)
    return lambda inputs: (chunked_linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target), None)


MAKERS = {
    "torch": torch_logits,
    "torch.compile": torch_compile,
    "trl chunked": trl_chunked,
    "cut-cross-entropy": cut_cross_entropy,
    "liger DPO": liger_dpo,
    "liger CE (mean only)": liger_ce,
    "quack CE (mean only)": quack_ce,
}
DISTRIBUTIONS = ("trl", "cut-cross-entropy", "liger-kernel", "quack-kernels", "triton")
