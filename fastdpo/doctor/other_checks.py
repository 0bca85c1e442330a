"""What a run may ask for beside the head and the attention: offloaded activations, weights in 4 bits."""

import contextlib
import importlib.util
import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastdpo.doctor.measuring import Measured, NotHere, all_beside, short
from fastdpo.model.offloading import MIN_BYTES, Moves

# ||w - NF4 of w|| / ||w||: 0.091 on normal weights in blocks of 64. Another table of values, or scales of
# other blocks, give more than twice that.
NF4_LOSS = 0.12


def check_offloading(device: str) -> list[Measured]:
    """Gradients with what the forward saves on the host have the same bits as without. fp32."""
    torch.manual_seed(0)
    sizes = (256, 1024, 1024, 256)
    pairs = itertools.pairwise(sizes)
    layers = [part for n_in, n_out in pairs for part in (nn.Linear(n_in, n_out), nn.GELU())]
    module = nn.Sequential(*layers).to(device)
    x = torch.randn(2 * MIN_BYTES // (4 * min(sizes)), min(sizes)).to(device)

    def gradients(hooks) -> list[Any]:
        module.zero_grad(set_to_none=True)
        with hooks:
            loss = module(x).sin().sum()
        loss.backward()
        return [p.grad for p in module.parameters()]

    plain, moves = gradients(contextlib.nullcontext()), Moves(module)
    offloaded = gradients(torch.autograd.graph.saved_tensors_hooks(moves.pack, moves.unpack))
    differ = sum((a != b).sum().item() for a, b in zip(plain, offloaded))
    stayed = max(0, len(sizes) - 1 - len(moves.order))
    return [
        Measured("gradient entries that differ from those without", differ, 0),
        Measured("layers whose activations stayed", stayed, 0),
    ]


def check_4bit(device: str) -> list[Measured]:
    """A frozen NF4 layer as load_in_4bit makes them: its output and its inputs' gradient against fp64 with
    the dequantised weights, and these against the weights. Raises NotHere."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise NotHere("bitsandbytes is not installed")
    import bitsandbytes as bnb

    found = []
    for dtype in (torch.bfloat16, torch.float32):
        torch.manual_seed(0)
        weight = (torch.randn(192, 320) / 16).to(dtype)
        options = dict(compute_dtype=dtype, compress_statistics=True, quant_type="nf4")
        layer = bnb.nn.Linear4bit(320, 192, bias=False, **options)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        layer = layer.to(device)
        layer.support_avx512bf16_for_cpu = False  # as quantised.set_up_4bit does
        stored: Any = layer.weight
        held = bnb.functional.dequantize_4bit(stored.data, stored.quant_state)
        truth, baseline = (partial(F.linear, weight=held.to(kind)) for kind in (torch.float64, dtype))
        names, x = (f"output ({short(dtype)})", f"d input ({short(dtype)})"), torch.randn(37, 320)
        found += all_beside(names, [x.to(device, dtype)], layer, truth, baseline, dtype)
        far = ((weight - held.cpu()).double().norm() / weight.double().norm()).item()
        found.append(Measured(f"weights, by rounding to 4 bits ({short(dtype)})", far, NF4_LOSS))
    return found
