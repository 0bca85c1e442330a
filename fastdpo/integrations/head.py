"""The lm_head as other trainers hand it over: mixed dtypes, a temperature."""

import torch
from fastdpo_kernels import linear_logp
from torch import Tensor


def token_logp(
    hidden, weight, bias, target, *, scale=1.0, softcap=None, temperature=1.0, stats=()
) -> tuple[Tensor, dict[str, Tensor]]:
    """linear_logp of softcap(scale * (h W^T + bias)) / temperature: (f32[M], dict of f32[M])."""
    if not torch.is_autocast_enabled(hidden.device.type):  # there linear_logp casts
        weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
    # softcap(x) = c tanh(x / c), so dividing by T is the same cap with c / T on x / T
    options = {"scale": scale / temperature, "softcap": softcap and softcap / temperature}
    out = linear_logp(hidden, weight, target, bias, stats=tuple(stats), **options)
    return out if stats else (out, {})
