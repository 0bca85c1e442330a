"""What stands, in a step without data, for kernels that only a GPU runs: tensors of the same sizes that
come and go at the same times. None computes anything.

Letters: T packed tokens, K gathered keys, H heads, Hk key/value heads, d a head's size, S segments,
M scored rows, D hidden, V vocabulary.
"""

from dataclasses import replace

import torch
from torch import nn
from transformers import AttentionInterface

from fastdpo.model import attention
from fastdpo.model.quantised import nf4_bytes
from fastdpo.planning.allocations import ATTENTION, COPIES, Tracker

NAME = "fastdpo_plan"
_ROUNDS = 128  # flash-attention's backward rounds each segment's queries up to this many


def _attention(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, **options
):
    """attention.prefix_attention as a GPU would run it, without what this process avoids. Its varlen kernel
    is an operator that knows what it returns for tensors without data; it stands for flash-attn too. The
    layout's `seen` is the tracker."""
    layout = options["fastdpo_layout"]
    tracker, layout = layout.seen, replace(layout, seen=None)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    half = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else v.dtype
    size = q.shape[-1]
    fast = half.itemsize == 2 and size % 8 == 0 and size <= 256 and v.shape[-1] == size and softcap is None
    if attention.avoids("varlen"):
        fast = fast and attention._has_flash_attn() and not attention.avoids("flash_attn")
    if not fast:
        how = {"scale": scaling, "window": sliding_window, "softcap": softcap}
        return attention.attend(q, k, v, layout, backend="segments", **how)[None], None
    with tracker.owned_by(ATTENTION):
        k, v = (attention.gather_copies(t, layout) for t in (k, v))
        k, v = (t.to(half).contiguous() for t in (k, v))
    q = q.to(half).contiguous()
    return attention._varlen(q, k, v, layout, scaling, sliding_window, softcap)[None], None


AttentionInterface.register(NAME, _attention)


def varlen_backward_bytes(grad, query, key, value, out, lse, cu_q, *rest) -> int:
    """What FlashAttention 2's varlen backward (mha_varlen_bwd) takes beside its results: a sum a query and an
    fp32 dq, both padded, and where query heads share keys dk and dv of each query head."""
    padded = len(query) + _ROUNDS * (len(cu_q) - 1)
    heads, size = query.shape[1:]
    shared = 2 * len(key) * heads * size * key.itemsize if key.shape[1] != heads else 0
    return 4 * padded * heads * (size + 1) + shared


def masked_scatter_bytes(into, mask, source) -> int:
    """What CUDA's takes beside its result: for each element its place in the source, and the mask whole."""
    return 9 * into.numel()


def head(hidden, plan, tensors: dict):
    """f32[M]. hidden [M, D]; plan: a fastdpo_kernels.Plan; tensors: model.lm_head.Head.tensors."""
    weight, bias, lora = tensors["weight"], tensors["bias"], tensors["lora"] or ()
    if plan.name == "frozen":
        return _Frozen.apply(hidden, plan)
    keeps = plan.rows * len(weight) * hidden.dtype.itemsize if plan.name == "keep" else 0
    return _Head.apply(hidden, plan, keeps, *(t for t in (weight, bias, *lora[:2]) if t is not None))


class _Head(torch.autograd.Function):
    """linear_logp by a Plan (fastdpo_kernels.plan): what it keeps, and its peak_bytes beside that."""

    @staticmethod
    def forward(ctx, hidden, plan, keeps, *parameters):
        ctx.work = plan.peak_bytes - keeps
        kept = hidden.new_empty(keeps, dtype=torch.uint8)
        hidden.new_empty(ctx.work, dtype=torch.uint8)
        ctx.save_for_backward(hidden, kept, *parameters)
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        hidden, _, *parameters = ctx.saved_tensors
        work = hidden.new_empty(ctx.work, dtype=torch.uint8)
        wanted = ctx.needs_input_grad[:1] + ctx.needs_input_grad[3:]
        grads = [torch.empty_like(t) if w else None for t, w in zip((hidden, *parameters), wanted)]
        del work
        return grads[0], None, None, *grads[1:]


class _Frozen(torch.autograd.Function):
    """linear_logp with a frozen head: the hidden gradient is made in the forward, and only scaled later."""

    @staticmethod
    def forward(ctx, hidden, plan):
        hidden.new_empty(plan.peak_bytes, dtype=torch.uint8)
        ctx.save_for_backward(torch.empty_like(hidden))
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad):
        (rows,) = ctx.saved_tensors
        return (rows * grad[:, None]).to(rows.dtype), None


class _Dequantised(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit: the weight is dequantised for each product, forward and backward."""

    @staticmethod
    def forward(ctx, x, packed, bias, linear):
        ctx.save_for_backward(packed)
        ctx.linear = linear
        return torch.nn.functional.linear(x, linear.weight, bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.linear.weight, None, None, None


class Linear4bit(nn.Module):
    """Stands for bitsandbytes' Linear4bit under a LoRA: a frozen weight [out, in] in NF4."""

    def __init__(self, of: nn.Module, out_features: int, in_features: int, dtype, tracker: Tracker, device):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        packed = torch.empty(nf4_bytes(out_features, in_features), dtype=torch.uint8, device=device)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias, self.dtype, self.tracker = of.bias, dtype, tracker

    @property
    def weight(self):
        """Dequantised, as each product and DoRA ask for it."""
        with self.tracker.owned_by(COPIES):
            return self.packed.new_empty(self.out_features, self.in_features, dtype=self.dtype)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(self.dtype)
        out = _Dequantised.apply(x.to(self.dtype), self.packed, bias, self)
        return out.clone()  # as peft does after bitsandbytes' product
