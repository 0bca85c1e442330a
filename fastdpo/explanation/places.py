"""Where in a model its neurons are, and what enters its residual stream.

A decoder layer adds two parts to the residual stream, its attention's and its MLP's, so that the state before
the final norm is the embedding plus all parts. A neuron is an entry of what enters the last projection of an
MLP; what it writes is its row there, the value vector (Geva et al. 2021, arXiv 2012.14913).
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fastdpo.errors import ModelError
from fastdpo.explanation.hooks import FINAL, hooks
from fastdpo.explanation.norms import affine_of, folded
from fastdpo.model.policy import Policy
from fastdpo.records import PackedGroups

__all__ = ["Layer", "Places", "check_sum", "find_places", "folded", "last_bias"]
__all__ += ["neurons_of", "value_vectors"]

_LAYERS = ("layers", "h", "blocks")
_ATTENTION = ("self_attn", "attn", "attention", "self_attention", "linear_attn", "conv")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
_LAST = ("down_proj", "c_proj", "fc2", "dense_4h_to_h", "fc_out", "proj_out", "w2")
_NORM = ("norm", "ln_f", "final_layernorm", "final_layer_norm", "norm_f", "layer_norm", "embedding_norm")
# The norms between a part and the residual stream: (after the attention, after the MLP). Without the second
# one, post_attention_layernorm is the name of a norm before the MLP (Llama).
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ("post_norm1", "post_norm2"),
)
_SCALE = ("residual_multiplier", "residual_scale")  # Granite's, MiniCPM3's
_MIXTURE = ("experts", "router", "gate")  # submodules that tell a mixture of experts


@dataclass(frozen=True)
class Layer:
    """A decoder layer's parts. What `attention` and `mlp` give (the first of a tuple), times Places.scale, is
    added to the residual stream."""

    attention: nn.Module  # a norm after the attention, where there is one
    mlp: nn.Module  # a norm after the MLP, where there is one (Gemma 2 and 3, OLMo 2, GLM 4)
    last: nn.Module | None  # the MLP's last projection, peft's wrapper where a LoRA is on it; None: experts
    post_norm: nn.Module | None  # == mlp where that is a norm


@dataclass(frozen=True)
class Places:
    """What of a model fastdpo explain looks at."""

    layers: tuple[Layer, ...]
    first: nn.Module  # the first decoder layer: what enters it is the embedding's part, positions included
    norm: nn.Module  # the final norm: what enters it is the final residual
    scale: float  # of both parts of every layer: Granite's residual_multiplier; 1 elsewhere
    experts: bool  # some MLP is a mixture: neurons are not looked at


def find_places(policy: Policy) -> Places:
    """The places of a policy's model, by the names that transformers' families give their modules;
    `check_sum` says whether they are right. Raises ModelError where something has none of the known names."""
    core, name = policy.core, type(policy.core).__name__
    decoder = core.get_decoder() if hasattr(core, "get_decoder") else core.base_model
    blocks = _child(decoder, _LAYERS, f"{name}: decoder layers")
    norm = _child(decoder, _NORM, f"{name}: a final norm")
    found = tuple(_layer(block, f"{name}: layer {i}") for i, block in enumerate(blocks))
    if not found:
        raise ModelError(f"{name}: it has no decoder layers, so there is nothing to explain")
    if len({id(block) for block in blocks}) < len(found):
        raise ModelError(
            f"{name}: some of its layers are one module, so that they have no parts of their own"
        )
    return Places(found, blocks[0], norm, _scale(blocks[0]), any(layer.last is None for layer in found))


def _child(module: Any, names: tuple[str, ...], what: str) -> Any:
    for name in names:
        if (found := getattr(module, name, None)) is not None:
            return found
    there = ", ".join(name for name, _ in module.named_children()) or "nothing"
    raise ModelError(
        f"{what} not found by one of the names {', '.join(names)} (there: {there}); fastdpo explain does not "
        "know this model yet"
    )


def _layer(block: Any, what: str) -> Layer:
    attention = _child(block, _ATTENTION, f"{what}: an attention")
    last: nn.Module | None
    if hasattr(block, "fc1") and hasattr(block, "fc2"):  # OPT has no module of its own for its MLP
        mlp = last = block.fc2
    else:
        mlp = _child(block, _MLP, f"{what}: an MLP")
        mixture = any(hasattr(mlp, name) for name in _MIXTURE)
        last = None if mixture else _child(mlp, _LAST, f"{what}: the MLP's last projection")
    post_norm = None
    for after_attention, after_mlp in _POST_NORMS:
        norms = [getattr(block, name, None) for name in (after_attention, after_mlp)]
        if all(isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity) for norm in norms):
            attention, mlp = norms
            post_norm = mlp
    return Layer(attention, mlp, last, post_norm)


def _scale(block: Any) -> float:
    found = [getattr(block, name, None) for name in _SCALE]
    return next((float(scale) for scale in found if isinstance(scale, float | int)), 1.0)


@torch.no_grad()
def value_vectors(layer: Layer, scale: float = 1.0) -> Tensor:
    """f64[N, D], on the CPU: what each neuron of a layer writes into the residual stream for an activation
    of 1 (of `Neurons.through`, where a norm follows the MLP). The rows of the last projection with what a
    LoRA or DoRA adds (nothing is merged), 4 bits dequantised; times the post norm's factor and
    Places.scale, which is `scale`.

    Raises ModelError of a layer of experts, and of adapters of other kinds.
    """
    weight = _weight(_last(layer))
    return _entering(layer, weight.T, scale)


@torch.no_grad()
def last_bias(layer: Layer, scale: float = 1.0) -> Tensor | None:
    """f64[D]: the last projection's bias, times the same factors; None without one. Where a norm follows the
    MLP, each token's rms divides it."""
    last: Any = _last(layer)
    base = last.base_layer if hasattr(last, "base_layer") else last
    bias = None if base.bias is None else base.bias.double().cpu()
    for name in _adapters(last):
        more = last.lora_B[name].bias
        if more is not None:
            zero = torch.zeros(len(more), dtype=torch.float64)
            bias = (zero if bias is None else bias) + last.scaling[name] * more.double().cpu()
    return None if bias is None else _entering(layer, bias, scale)


def neurons_of(layer: Layer) -> int:
    """N of a layer that is no mixture of experts."""
    last: Any = _last(layer)
    base = getattr(last, "base_layer", last)
    return int(base.weight.shape[0] if isinstance(base, Conv1D) else base.in_features)


def _last(layer: Layer) -> nn.Module:
    if layer.last is None:
        raise ModelError("a mixture of experts: fastdpo explain does not look at its neurons")
    return layer.last


def _entering(layer: Layer, rows: Tensor, scale: float) -> Tensor:
    """f64[..., D]: what rows that leave the last projection are in the residual stream."""
    if layer.post_norm is None:
        return scale * rows
    g, _, centred = affine_of(layer.post_norm, rows.shape[-1])
    return scale * g * (rows - rows.mean(-1, keepdim=True) if centred else rows)


def _adapters(last: Any) -> list[str]:
    """The LoRAs that a projection adds to its base now."""
    if not hasattr(last, "base_layer"):
        return []
    if not hasattr(last, "lora_A"):
        raise ModelError(f"{type(last).__name__}: of adapters, only LoRA's value vectors are known here")
    if last.disable_adapters or last.merged:
        return []
    names = [name for name in last.active_adapters if name in last.lora_A]
    for name in names:
        if name in last.lora_variant and name not in last.lora_magnitude_vector:
            kind = type(last.lora_variant[name]).__name__
            raise ModelError(f"{kind}: of LoRA's variants, only DoRA's value vectors are known here")
    return names


def _weight(last: Any) -> Tensor:
    """f64[D, N], on the CPU: W + s B A; of DoRA magnitude * that / its rows' norms (2402.09353, eq. 5)."""
    names = _adapters(last)
    base = last.base_layer if hasattr(last, "base_layer") else last
    weight = _dequantised(base).double().cpu()
    weight = weight.T if isinstance(base, Conv1D) else weight
    for name in names:
        a, b = (some[name].weight.double().cpu() for some in (last.lora_A, last.lora_B))
        weight = weight + last.scaling[name] * b @ a
        if name in last.lora_magnitude_vector:
            magnitude = last.lora_magnitude_vector[name].weight.double().cpu().flatten()
            weight = weight * (magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]
    return weight


def _dequantised(base: Any) -> Tensor:
    """The weight of a projection, as it lies."""
    if getattr(base.weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        out: Tensor = dequantize_4bit(base.weight.data, base.weight.quant_state)
        return out
    if base.weight.ndim != 2 or not base.weight.is_floating_point():
        raise ModelError(f"{type(base).__name__}: its weight is stored in a way that is not known here")
    return base.weight


@torch.no_grad()
def check_sum(policy: Policy, places: Places, batch: PackedGroups) -> float:
    """How far the embedding and all parts of all layers are from the final residual, over the scored rows of
    a batch: the largest difference in units of the final residual's rms. Raises ModelError where rounding
    does not explain it, and where an MLP does more than a norm after its last projection."""
    batch, name = batch.to(policy.device), type(policy.core).__name__
    check = _SumCheck(places, batch.score_row)
    with hooks() as on:
        check.put(on)
        policy.inside(lambda: policy.hidden(batch))
    if not all(finite := torch.stack(check.finite).tolist()):
        parts = (f"layer {i}: {part}" for i in range(len(places.layers)) for part in ("attention", "mlp"))
        where = ["embedding", *parts, "final"][finite.index(False)]
        raise ModelError(
            f"{name}: {where}: activations are not finite (rows {batch.some_rows}); the weights may be broken"
        )
    worst = float(check.apart.abs().max() / check.final.square().mean().sqrt())
    if not bool((check.apart.abs() <= check.allowed()).all()):
        raise ModelError(
            f"{name}: its final residual differs from the embedding plus its {2 * len(places.layers)} parts "
            f"by {worst:.2g} of its rms (rows {batch.some_rows}), so that it cannot be split into them; "
            "fastdpo explain does not know this model's residual stream yet"
        )
    for number, more in enumerate(check.more):
        if not bool(more):
            raise ModelError(
                f"{name}: layer {number}: its MLP gives something else than its last projection does (rows "
                f"{batch.some_rows}), so that it is no sum over neurons; fastdpo explain does not know this "
                "MLP yet"
            )
    return worst


class _SumCheck:
    """A running residual f64[M, D], and how much rounding each of its additions may have brought."""

    def __init__(self, places: Places, rows: Tensor) -> None:
        self.places, self.rows = places, rows
        self.more: list[Tensor] = []  # of each dense layer: whether its MLP gives what the projection does
        self.finite: list[Tensor] = []  # of the embedding, each part and the final residual
        self._eps = 0.0
        self.sum = self.seen = torch.zeros(())  # where the norm is also before the layers (nanochat)

    def put(self, on: Any) -> None:
        on.before(self.places.first, "layer 0", self._begin)
        for number, layer in enumerate(self.places.layers):
            on.after(layer.attention, f"layer {number}: the attention", self._add)
            if layer.last is not None and layer.last is not layer.mlp:
                on.after(layer.last, f"layer {number}: the MLP's last projection", self._projected)
                after = on.after if layer.post_norm is None else on.before
                after(layer.mlp, f"layer {number}: after the MLP's last projection", self._given)
            on.after(layer.mlp, f"layer {number}: the MLP", self._add)
        on.before(self.places.norm, FINAL, self._end)

    def _taken(self, x: Tensor) -> Tensor:
        self._eps = max(self._eps, torch.finfo(x.dtype).eps)
        taken = x[self.rows].double()
        self.finite.append(taken.isfinite().all())
        return taken

    def _begin(self, x: Tensor) -> None:
        self.finite = []
        self.sum = self._taken(x)
        self.seen = self.sum.abs()

    def _add(self, x: Tensor) -> None:
        self.sum = self.sum + self.places.scale * self._taken(x)
        self.seen += self.sum.abs()

    def _projected(self, x: Tensor) -> None:
        self._of_last = x[self.rows].double()

    def _given(self, x: Tensor) -> None:
        given, wanted = x[self.rows].double(), self._of_last
        limit = 4 * torch.finfo(x.dtype).eps * wanted.abs()
        self.more.append(((given - wanted).abs() <= limit).all())

    def _end(self, x: Tensor) -> None:
        self.final = self._taken(x)
        self.apart = self.final - self.sum

    def allowed(self) -> Tensor:
        """f64[M, D]: each addition rounds its sum, and the part before it, by half a unit in the last place;
        eight times that."""
        return 4 * self._eps * (self.seen + self.final.square().mean().sqrt())
