"""The lm_head as other trainers hand it over: mixed dtypes, autocast, a temperature."""

import torch
from fastdpo_kernels import linear_logp
from torch import Tensor


def one_dtype(hidden: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """All in the dtype in which a matmul would run: autocast's where it is on, else that of hidden."""
    device, dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in (hidden, *parameters)]


def token_logp(
    hidden, weight, bias, target, *, scale=1.0, softcap=None, temperature=1.0, stats=()
) -> tuple[Tensor, dict[str, Tensor]]:
    """linear_logp of softcap(scale * (h W^T + bias)) / temperature: (f32[M], dict of f32[M])."""
    hidden, weight, bias = one_dtype(hidden, weight, bias)
    # softcap(x) = c tanh(x / c), so dividing by T is the same cap with c / T on x / T
    options = {"scale": scale / temperature, "softcap": softcap and softcap / temperature}
    out = linear_logp(hidden, weight, target, bias, stats=tuple(stats), **options)
    return out if stats else (out, {})
