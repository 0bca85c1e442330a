"""FLOPs that the training of a decoder cannot do without: what model FLOP utilisation is counted by.

A multiply-add is 2. Matrix products are counted and nothing else. Letters: T places that go through the
decoder layers, N weights of their linear layers, A weights of a LoRA, M scored rows, V vocabulary, D hidden,
H heads, d a head's size.

As in PaLM (Chowdhery et al. 2022, appendix B) nothing that is computed a second time counts: no recomputed
layer, no forward without gradient. What is never computed does not count either: a prompt that responses
share is T once, and of the lm_head only scored rows are M. Sliding windows count as if whole.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers.pytorch_utils import Conv1D

from fastdpo.model.experts import experts
from fastdpo.model.policy import Policy
from fastdpo.records import PackedGroups


def causal(length: int) -> int:
    """(query, key) pairs of a causal row."""
    return length * (length + 1) // 2


def attended(prompt: int, responses: Iterable[int]) -> int:
    """(query, key) pairs, a head, of a shared prompt and its responses, by their lengths; a response's last
    token predicts nothing."""
    return causal(prompt) + sum((R - 1) * prompt + causal(R - 1) for R in responses)


def useful(N: int, A: int, pair: int, places: int, pairs: int) -> tuple[int, int]:
    """(of linear layers, of attention), forward and backward: 2 T (N + A), as much for the gradients of
    inputs, 2 T N or under a LoRA 2 T A for those of weights; `pair` = 4 d H over all layers a (query, key)
    pair forward, twice as much backward."""
    return 2 * places * (2 * (N + A) + (A or N)), 3 * pair * pairs


_ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")  # transformers' layer_types


@dataclass(frozen=True)
class Counted:
    """What of a policy the FLOPs of its training depend on."""

    N: int
    A: int
    pair: int
    row: int  # of the lm_head, a scored row: 2 V D a product; logits, gradient of hidden, and its own

    @classmethod
    def of(cls, policy: Policy) -> "Counted | None":
        """None for a mixture of experts, and where the layers' attention is not all alike, or is none: what a
        place goes through is then not one number."""
        text = policy.core.config.get_text_config()
        others = set(getattr(text, "layer_types", None) or ()) - set(_ATTENTION)
        if experts(text) or others or getattr(text, "is_heterogeneous", False):
            return None
        heads = getattr(text, "num_attention_heads", None)
        if not isinstance(heads, int):
            return None
        body = list(policy.core.get_decoder().named_modules())  # no head, and no tower for pictures
        sizes = [_size(module) for name, module in body if ".lora_" not in name]
        lora = [p for _, m in body for name, p in m.named_parameters(recurse=False) if p.requires_grad]
        has_lora = policy.core is not policy.model
        V, D = policy.head_size
        return cls(
            N=sum(sizes),
            A=sum(p.numel() for p in lora) if has_lora else 0,
            pair=4 * (getattr(text, "head_dim", None) or D // heads) * heads * text.num_hidden_layers,
            row=2 * V * D * (3 if policy.head.trained else 2),
        )

    def flops(self, batch: PackedGroups) -> int:
        """Of one microbatch, as it was packed, on the host."""
        if batch.layout is not None:
            cuts = [(q1 - q0, k1 - k0) for q0, q1, k0, k1 in batch.layout.segments]
            pairs = sum(q * (k - q) + causal(q) for q, k in cuts)
            if full := batch.layout.full:
                pairs += sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in full.segments)
        else:
            assert batch.attention_mask is not None
            pairs = sum(map(causal, batch.attention_mask.sum(1).tolist()))
        return sum(useful(self.N, self.A, self.pair, batch.input_tokens, pairs)) + self.row * len(
            batch.target
        )


def _size(module: nn.Module) -> int:
    """Weights of a linear layer, in 4 bits too; 0 of all else."""
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    return module.weight.numel() if isinstance(module, Conv1D) else 0
