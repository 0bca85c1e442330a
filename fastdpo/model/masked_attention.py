"""Attention in torch under a mask that is added: the dense oracle, and blocks that see both ways.

Shapes: T packed tokens, H heads, D a head's size.
"""

import torch
import torch.nn.functional as F


def full_segments(q, kg, vg, full, scale, window, softcap):
    """Each query of a segment sees all its keys, but for those further back than `window`."""
    lengths_q = [q1 - q0 for q0, q1, _, _ in full.segments]
    lengths_k = [k1 - k0 for _, _, k0, k1 in full.segments]
    out = []
    for pieces in zip(q.split(lengths_q), kg.split(lengths_k), vg.split(lengths_k)):
        q_, k_, v_ = (x[None].transpose(1, 2) for x in pieces)
        n_q, n_k = q_.shape[2], k_.shape[2]
        first = 0 if window is None else max(0, n_k - n_q - window + 1)
        k_, v_ = k_[:, :, first:], v_[:, :, first:]
        if softcap is None and (window is None or window >= n_k):
            piece = sdpa(q_, k_, v_, scale=scale)
        else:
            query = torch.arange(n_k - n_q, n_k, device=q.device)[:, None]
            key = torch.arange(first, n_k, device=q.device)[None]
            sees = key > query - (window or n_k)
            mask = torch.zeros_like(sees, dtype=computed_in(q)).masked_fill_(~sees, -torch.inf)
            piece = masked(q_, k_, v_, mask, scale, softcap)
        out.append(piece[0].transpose(0, 1))
    return torch.cat(out)


def dense(q, k, v, layout, scale, window, softcap):
    """One masked T x T attention: the oracle the other backends are tested against."""
    place = torch.arange(len(q), device=q.device)
    mask = (place[None] <= place[:, None]) & (place[:, None] < layout.seen_until[None])
    both_ways = layout.full.segments if layout.full else ()
    for q0, q1, _, _ in both_ways:
        mask[q0:q1, q0:q1] = True
    if window is not None:
        # A response's rows sit far from its prompt, so distances count in positions, not places.
        position = torch.empty_like(place)
        for q0, q1, k0, k1 in (*layout.segments, *both_ways):
            position[q0:q1] = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=q.device)
        mask &= position[:, None] - position[None] < window
    mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    queries, keys, values = (x[None].transpose(1, 2) for x in (q, k, v))
    return masked(queries, keys, values, mask, scale, softcap)[0].transpose(0, 1)


def computed_in(like) -> torch.dtype:
    device = like.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype


def sdpa(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


def masked(q, k, v, mask, scale, softcap):
    """Attention under a mask that is added, with Gemma 2's softcap where the model has one."""
    if softcap is None:
        return sdpa(q, k, v, attn_mask=mask, scale=scale)
    heads = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(heads, dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * torch.tanh(scores / softcap)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = (scores + mask).softmax(-1, dtype=wide)
    return weights.to(v.dtype) @ v
