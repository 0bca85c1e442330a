"""Shared-prompt attention for Hugging Face models: one function in transformers' AttentionInterface.

The layout travels as a private keyword argument, `fastdpo_layout`, from the model's forward to each
attention call (so that gradient checkpointing's recompute sees it too). A call that does not get it
raises: such a model would train on the wrong mask.

Prior art, with thanks: li-plus/flash-preference (the segments [P+R1 | R2] x [P+R1 | P+R2] with one
bottom-right-causal varlen call), PrefixGrouper and dpo-prefix-sharing.

Shapes: T packed tokens, K gathered keys, H heads, Hk key/value heads, D a head's size.
"""

import importlib.util
import inspect
from functools import cache

import torch
from transformers import AttentionInterface

from fastdpo.model.masked_attention import computed_in, dense, full_segments, masked, sdpa
from fastdpo.records import FullSegments, PrefixLayout

NAME = "fastdpo_prefix"  # no "flash" and no "sdpa" in it: transformers tests for these substrings

QUERY_BLOCK = 512  # queries that the segments backend computes under one mask

# What transformers' layers hand to attention functions beside the tensors and that changes nothing
# here. Anything else that is not None means a kind of attention that no backend knows: refused.
_HARMLESS = {"position_ids", "position_embeddings", "use_cache", "cache_position", "return_dict"}
_HARMLESS |= {"output_attentions", "output_hidden_states", "output_router_logits", "is_training", "training"}


class UnsharedAttention(RuntimeError):
    """This model's attention cannot be computed on shared prompts; the message says why."""


def prefix_attention(
    module,
    query,  # [1, H, T, D]
    key,  # [1, Hk, T, D]
    value,  # [1, Hk, T, Dv]
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    fastdpo_layout: PrefixLayout | None = None,
    **kwargs,
):
    """What transformers calls in each layer. Returns ([1, T, H, Dv], None), as the interface asks.

    Raises UnsharedAttention for anything it would get silently wrong.
    """
    name = type(module).__name__
    if fastdpo_layout is None:
        raise UnsharedAttention(
            f"the model does not pass the layout on to {name}, or was called outside "
            "Policy.hidden (inside `with policy.stock()` it is the plain model)"
        )
    unknown = [k for k, v in kwargs.items() if v is not None and k not in _HARMLESS]
    if unknown:
        raise UnsharedAttention(f"{name} passes {', '.join(unknown)} to its attention")
    if dropout:
        raise UnsharedAttention(f"attention dropout is {dropout}: it must be 0")
    if attention_mask is not None or is_causal is False or query.shape[0] != 1:
        raise UnsharedAttention(f"{name} brings a mask of its own")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attend(q, k, v, fastdpo_layout, scale=scaling, window=sliding_window, softcap=softcap)
    return out[None], None


AttentionInterface.register(NAME, prefix_attention)


def stock_attention(config) -> str:
    """The name of the attention that computes a model of this transformers config on separate rows: the one
    transformers chose, but for sdpa where the scores have a softcap: it leaves the softcap out, and releases
    up to 5.20 choose it for Gemma 2 (5.22 chooses eager).
    """
    chosen = config._attn_implementation
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped and chosen == "sdpa" else chosen


def by_part(config, text: str) -> str | dict[str, str]:
    """What set_attn_implementation takes for `text` to compute the text model: of a model with towers beside
    it a dict by sub-config, in which these stay as they are."""
    of_text = config.get_text_config()
    if of_text is config:
        return text
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    return {
        key: text if part is of_text else part._attn_implementation for key, part in parts.items() if part
    }


def attend(q, k, v, layout, *, scale=None, window=None, softcap=None, backend=None):
    """Bottom-right-causal attention over the layout's segments, and of those in `layout.full` both ways.

    q [T, H, D], k [T, Hk, D], v [T, Hk, Dv] -> [T, H, Dv]. `window` counts the keys a query sees, itself
    included; `softcap` is c of c*tanh(z/c). `backend` is chosen by device and dtype unless given.
    """
    backend = backend or pick_backend(q, v, softcap)
    if layout.seen is not None:
        layout.seen.append((backend, window))
    if backend == "dense":
        return dense(q, k, v, layout, scale, window, softcap)
    k, v = gather_copies(k, layout), gather_copies(v, layout)
    call = {"segments": _segments, "varlen": _varlen, "flash_attn": _flash_attn}[backend]
    full = layout.full
    if full is None:
        return call(q, k, v, layout, scale, window, softcap)
    n = full.first_key
    parts = [call(q.index_select(0, full.rows), k[n:], v[n:], full, scale, window, softcap)]
    if layout.segments:
        others = q.index_select(0, full.other_rows)
        parts.insert(0, call(others, k[:n], v[:n], layout, scale, window, softcap))
    return torch.cat(parts).index_select(0, full.place)


_avoided: frozenset[str] = frozenset()


def avoid(*rungs: str) -> None:
    """From now on `pick_backend` takes none of these, "varlen" or "flash_attn", whose kernels do not run here
    or are wrong; what only an earlier call named is allowed again. Raises ValueError for other names."""
    global _avoided
    if unknown := set(rungs) - {"varlen", "flash_attn"}:
        raise ValueError(f"attention.avoid knows varlen and flash_attn, got {', '.join(sorted(unknown))}")
    _avoided = frozenset(rungs)


def avoids(rung: str) -> bool:
    return rung in _avoided


def pick_backend(q, v, softcap=None) -> str:
    """The backend for these tensors: varlen kernels for half precision on CUDA, segments elsewhere. Where
    `avoid` named varlen, flash-attn takes its place, if installed."""
    half = q.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(q.device.type)
    size = q.shape[-1]
    if q.is_cuda and half and size % 8 == 0 and size <= 256 and v.shape[-1] == size:
        if softcap is None and not avoids("varlen"):
            return "varlen"
        if _has_flash_attn() and not avoids("flash_attn"):
            return "flash_attn"
    return "segments"


@cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


class _GatherCopies(torch.autograd.Function):
    """k[kv_index], whose backward sums the copies of a row in a fixed order and in fp32 or wider.

    The stock index_select backward is an atomic index_add in the tensor's own dtype: not deterministic
    on CUDA, and lossy in bf16.
    """

    @staticmethod
    def forward(ctx, rows, layout):
        ctx.layout = layout
        return rows.index_select(0, layout.kv_index)

    @staticmethod
    def backward(ctx, grad):
        layout = ctx.layout
        wide = torch.promote_types(grad.dtype, torch.float32)
        out = grad.index_select(0, layout.first_copy).to(wide)
        for rows, places in zip(layout.more_rows, layout.more_places):
            out.index_add_(0, rows, grad.index_select(0, places).to(wide))  # rows all differ
        return out.to(grad.dtype), None


def gather_copies(rows, layout):
    """[T, Hk, D] -> [K, Hk, D]: each segment's keys (or values), its prompt's first."""
    return _GatherCopies.apply(rows, layout) if layout.more_rows or layout.full else rows


def _segments(q, kg, vg, layout, scale, window, softcap):
    """SDPA calls a segment at a time: any device, any float dtype. What the plain causal call cannot do runs
    a block of queries at a time, so that no mask is quadratic in a row's length. (The scores that a softcap
    needs still are, all blocks together, where a backward follows.) Blocks that see both ways run whole."""
    if isinstance(layout, FullSegments):
        return full_segments(q, kg, vg, layout, scale, window, softcap)
    lengths_q = [q1 - q0 for q0, q1, _, _ in layout.segments]
    lengths_k = [k1 - k0 for _, _, k0, k1 in layout.segments]
    out = []
    for pieces in zip(q.split(lengths_q), kg.split(lengths_k), vg.split(lengths_k)):
        q_, k_, v_ = (x[None].transpose(1, 2) for x in pieces)
        n_q, n_k = q_.shape[2], k_.shape[2]
        if softcap is None and n_q == n_k and (window is None or window >= n_k):
            out.append(sdpa(q_, k_, v_, scale=scale, is_causal=True)[0].transpose(0, 1))
            continue
        mask = _block_mask(layout, window, q)
        for start in range(0, n_q, QUERY_BLOCK):
            rows = min(QUERY_BLOCK, n_q - start)
            stop = n_k - n_q + start + rows  # of the keys that the block's last query sees
            first = 0 if window is None else max(0, stop - rows - window + 1)
            corner = mask[len(mask) - rows :, mask.shape[1] - (stop - first) :]
            queries = q_[:, :, start : start + rows]
            keys, values = (x[:, :, first:stop] for x in (k_, v_))
            # CUDA kernels want the mask aligned
            corner = corner.contiguous() if q.is_cuda else corner
            piece = masked(queries, keys, values, corner, scale, softcap)
            out.append(piece[0].transpose(0, 1))
    return torch.cat(out)


def _block_mask(layout, window, like):
    """[rows, columns], 0 or -inf: what the last queries of a causal block see of the keys up to its end, and
    not further back than `window`. A block of any place and size is a corner of it, so that one mask, kept
    with the layout, serves all segments and layers."""
    rows = min(QUERY_BLOCK, layout.max_q)
    columns = layout.max_k if window is None else min(layout.max_k, rows + window - 1)
    dtype = computed_in(like)
    if (window, dtype) not in layout.masks:
        query = torch.arange(rows, device=like.device)[:, None] + columns - rows
        key = torch.arange(columns, device=like.device)[None]
        sees = (key <= query) & (key > query - (window or columns + 1))
        layout.masks[window, dtype] = torch.zeros_like(sees, dtype=dtype).masked_fill_(~sees, -torch.inf)
    return layout.masks[window, dtype]


def _varlen_arguments(q, kg, vg, layout, window) -> tuple[list, tuple[int, int]]:
    """(q, k, v and the segments' ends, window_size) as varlen kernels take them. Under autocast rotary
    embeddings leave q and k in fp32 beside a half v: the kernels want one dtype. A window bounds the past
    only: who sees both ways sees as far ahead as the longest block is."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else vg.dtype
    tensors = [t.to(dtype).contiguous() for t in (q, kg, vg)]
    ends = [layout.cu_q, layout.cu_k, layout.max_q, layout.max_k]
    back = -1 if window is None else window - 1
    if isinstance(layout, FullSegments):
        return tensors + ends, (back, -1 if window is None else layout.max_q - 1)
    return tensors + ends, (back, 0)


@cache
def _torch_varlen():
    """(varlen_attn, its arguments for unequal head counts): torch 2.12 added enable_gqa, and needs it;
    2.11 takes them without."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if "enable_gqa" in known else {}


def _varlen(q, kg, vg, layout, scale, window, softcap):
    """torch's own varlen attention (torch >= 2.11, CUDA, half precision): FlashAttention 2. Torch 2.15 would
    take cuDNN where one tensor is the ends of queries and of keys; a layout has two."""
    varlen_attn, gqa = _torch_varlen()
    arguments, reach = _varlen_arguments(q, kg, vg, layout, window)
    return varlen_attn(*arguments, scale=scale, window_size=reach, **gqa)


def _flash_attn(q, kg, vg, layout, scale, window, softcap):
    """flash-attn 2, where installed: the varlen kernel that knows softcap."""
    from flash_attn import flash_attn_varlen_func

    arguments, reach = _varlen_arguments(q, kg, vg, layout, window)
    causal = not isinstance(layout, FullSegments)
    options = dict(softmax_scale=scale, causal=causal, softcap=softcap or 0.0, deterministic=True)
    return flash_attn_varlen_func(*arguments, window_size=reach, **options)
