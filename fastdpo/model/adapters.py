"""LoRA adapters: a fresh one on a model, or the one that a peft folder holds, to train on."""

import json
import os
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.markup import escape
from safetensors import safe_open

from fastdpo.errors import ConfigError, ModelError
from fastdpo.files.names import gguf_path, similar
from fastdpo.model.finding import Source, find_source, tokenizer_beside
from fastdpo.model.source import damage, sees_images
from fastdpo.model.spec import ModelSpec
from fastdpo.model.towers import beside_towers
from fastdpo.values import not_one_of

_SETTINGS, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_OF_A_FRESH_LORA = ("lora_rank", "lora_alpha", "lora_target_modules")
# What these do depends on more than a module's input (the tokens around it, other adapters), or
# changes layers that the head or the reference would not know of.
_UNSUPPORTED: tuple[str, ...] = ("alora_invocation_tokens", "arrow_config", "kasa_config")
_UNSUPPORTED += ("layer_replication", "megatron_config", "monteclora_config", "trainable_token_indices")
_UNSUPPORTED += ("use_bdlora", "use_qalora", "velora_config")


class Start(NamedTuple):
    """What a run starts from."""

    model: str  # a folder, a GGUF file or a hub name, never an adapter
    adapter: Path | None  # a peft folder that goes on it
    settings: dict  # what is in its adapter_config.json

    @property
    def tokenizer(self) -> Source:
        """The adapter's folder, where one is beside it, as it was trained with it; or else the model."""
        return tokenizer_beside(self.adapter, "model") or self.source()

    def source(self) -> Source:
        """Where the model is. Raises ModelError where it is not."""
        if self.adapter is None:
            return find_source(self.model, f"model: {self.model!r}")
        label = f"model: {self.model!r}, the base of the adapter {self.adapter},"
        way_out = f"if it is elsewhere now, set model to where, and adapter: {self.adapter}"
        return find_source(self.model, label, way_out=way_out)


def find_start(spec: ModelSpec) -> Start:
    """The base model and the adapter that `model` and `adapter` name; `model` may be an adapter folder."""
    given = gguf_path(os.path.expanduser(spec.model))
    model_is_adapter = Path(given, _SETTINGS).exists()
    if model_is_adapter and spec.adapter is not None:
        raise ConfigError(
            f"adapter: model {spec.model} is a peft adapter already, and there can be one only; "
            "give as model the base of the one to start from"
        )
    if not model_is_adapter and spec.adapter is None:
        return Start(given, None, {})
    if spec.pure_bf16:
        raise ConfigError("pure_bf16: a LoRA's weights stay in fp32 (they are few); leave the key out")
    folder = Path(given if spec.adapter is None else os.path.expanduser(spec.adapter))
    settings = _read_settings(folder)
    for key in _OF_A_FRESH_LORA:
        if getattr(spec, key) != getattr(ModelSpec, key):
            raise ConfigError(f"{key}: the adapter {folder} has its own, so leave the key out")
    base = settings.get("base_model_name_or_path") if model_is_adapter else given
    if not base:
        raise ModelError(
            f"model: {folder} is a peft adapter that does not say what its base is; "
            f"set model to the base, and adapter: {folder}"
        )
    if Path(base, _SETTINGS).exists():
        raise ModelError(f"model: {base}, the base of {folder}, is an adapter itself; merge it first")
    return Start(base, folder, settings)


def _read_settings(folder: Path) -> dict:
    """A folder's adapter_config.json, when it is an adapter that can be trained on."""
    if not (folder / _SETTINGS).exists():
        raise ModelError(f"adapter: {folder} {_no_adapter(folder)}")
    try:
        settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"adapter: cannot read {_SETTINGS} in the folder {folder}: {error}") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise ModelError(f"adapter: {folder} is of peft_type {kind}; only LORA adapters can be trained on")
    for name in filter(settings.get, _UNSUPPORTED):
        raise ModelError(f"adapter: {folder} uses {name}, which is not supported; merge it into its base")
    if not (folder / _WEIGHTS).exists():
        pickled = "only adapter_model.bin, a pickle, which can run anything when it is loaded"
        found = pickled if (folder / "adapter_model.bin").exists() else "none"
        raise ModelError(
            f"adapter: {folder} needs its weights as {_WEIGHTS}, and there is {found}; "
            "save it with peft's save_pretrained"
        )
    if problem := damage(folder / _WEIGHTS):
        raise ModelError(f"adapter: {folder} has weights in {_WEIGHTS} that {problem}")
    return settings


def _no_adapter(folder: Path) -> str:
    """What a path is instead of an adapter's folder."""
    if not folder.exists():
        way_out = "; give the folder of a peft adapter (one of the hub is brought by `hf download`)"
        return f"does not exist here{similar(folder) or way_out}"
    if (folder / "config.json").exists():
        return "is a whole model, not an adapter; give it as model, and leave adapter out"
    inside = sorted(str(found.parent) for found in folder.glob(f"*/{_SETTINGS}"))
    return f"holds no {_SETTINGS}" + (f"; the adapter is in {' or '.join(inside[:3])}" if inside else "")


def _peft():
    try:
        import peft
    except ImportError:
        raise ModelError("LoRA adapters need peft: pip install 'fastdpo[peft]'") from None
    return peft


def _with_lora(model, lora):
    """A model with a peft LoRA of these settings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")  # tell_tied says it
        return _peft().get_peft_model(model, lora)


def _check_targets(model, targets: str | list[str]) -> None:
    """Raises ConfigError for a name that no module has: peft passes over it where another one fits."""
    modules = dict(model.named_modules())
    last = {
        path.rpartition(".")[2] for path, module in modules.items() if isinstance(module, torch.nn.Linear)
    }
    for name in targets if isinstance(targets, list) else ():
        if not any(path == name or path.endswith(f".{name}") for path in modules):
            raise not_one_of("lora_target_modules", name, sorted(last))


def add_lora(model, spec: ModelSpec):
    """A fresh LoRA on a model: it starts as no change at all."""
    assert spec.lora_rank is not None
    _check_targets(model, spec.lora_target_modules)
    targets = None if spec.lora_target_modules == "peft" else spec.lora_target_modules
    if targets is not None and spec.freeze_vision and sees_images(model.config):
        targets = beside_towers(model, targets)
    torch.manual_seed(spec.seed)
    lora = _peft().LoraConfig(
        r=spec.lora_rank,
        lora_alpha=2 * spec.lora_rank if spec.lora_alpha is None else spec.lora_alpha,
        target_modules=targets,
        use_dora=spec.use_dora,
        use_rslora=spec.use_rslora,
        task_type="SEQ_CLS" if spec.rewards else "CAUSAL_LM",  # peft then trains a copy of the score, too
    )
    try:
        model = _with_lora(model, lora)
    except ValueError as error:
        raise ConfigError(f"lora_target_modules: {error}") from None
    if spec.use_dora and hasattr(model.get_base_model().get_output_embeddings(), "lora_A"):
        raise ConfigError(
            "use_dora: the lm_head cannot have it (each step would need its whole matrix once more); take it "
            "out of lora_target_modules"
        )
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft does this to LoRA's own weights only
            parameter.data = parameter.data.float()
    steady_dora(model, fresh=True)
    leave_out_base(model)
    return model


def leave_out_base(model) -> None:
    """Makes `save_pretrained` write no weight of the base: where a LoRA is on the embeddings or the lm_head,
    peft would write these too, whole, and put them in place of the base's own wherever it loads them."""
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)


def steady_dora(model, fresh: bool) -> None:
    """Makes peft's DoRA take its norms in fp32, hand on the activations' dtype, and, where it is fresh,
    change nothing at all.

    DoRA scales each row of W + s B A by magnitude / norm (2402.09353, equation 5). peft takes the norm in the
    activations' dtype: in bf16 it stands still, or moves by 2^-8, while the magnitude learns in fp32, and
    before the first step the two differ. And on 4-bit weights, under CUDA's autocast, it goes on in fp32.
    """
    from peft.tuners.lora.dora import DoraEmbeddingLayer, DoraLinearLayer
    from peft.utils.integrations import dequantize_module_weight

    for module in model.modules():
        for layer in getattr(module, "lora_magnitude_vector", {}).values():
            if type(layer) not in (DoraLinearLayer, DoraEmbeddingLayer):
                continue  # convolutions
            layer.get_weight_norm = partial(_norm_in_fp32, layer.fan_in_fan_out)
            if fresh:
                weight = dequantize_module_weight(module.get_base_layer()).detach()
                layer.weight.data = layer.get_weight_norm(weight, torch.zeros((), device=weight.device), 1.0)
            if type(layer) is DoraLinearLayer:
                layer.get_lora_weight = _product
                module.register_forward_hook(_in_autocast_dtype)


@torch.no_grad()
def _product(lora_A, lora_B, adapter_name=None):
    """B A, for the norm: DoraLinearLayer.get_lora_weight, which goes through an identity matrix and makes a
    graph that nobody reads. A batched product, as those are what `selective` checkpointing never keeps: this
    one is as large as the weight."""
    return torch.bmm(lora_B.weight[None], lora_A.weight[None])[0]


def _norm_in_fp32(transposed: bool, weight, lora_weight, scaling, adapter_name=None):
    """|W + s B A| of each output feature, f32[out] (f64 of f64 weights): DoraLinearLayer.get_weight_norm."""
    device = "cpu" if weight.is_meta else weight.device.type  # `fastdpo plan` makes LoRAs without data
    with torch.no_grad(), torch.autocast(device, enabled=False):
        weight = weight.T if transposed else weight
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32)) + scaling * lora_weight.detach()
        return torch.linalg.vector_norm(wide, dim=1)


def _in_autocast_dtype(module, inputs, out):
    device = out.device.type
    return out.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else out


def tell_tied(model, console) -> None:
    """Says what an adapter on the lm_head or the embeddings means where these are one weight."""
    configs = getattr(model, "peft_config", {}).values()
    if not configs or any(getattr(config, "ensure_weight_tying", False) for config in configs):
        return
    core = model.get_base_model()
    ends = {"lm_head": core.get_output_embeddings(), "embeddings": core.get_input_embeddings()}
    changed = " and ".join(name for name, module in ends.items() if hasattr(module, "base_layer"))
    if changed and core.config.get_text_config().tie_word_embeddings:
        text = f"the model's lm_head and embeddings are one weight, and the LoRA on its {changed} sets them "
        text += "apart; `fastdpo merge` gives each its own (peft's merge_and_unload would add to both)"
        console.print(f"[yellow]{text}", highlight=False, soft_wrap=True)


def load_adapter(model, start: Start, console):
    """The adapter of a folder on its base, to train on; says what it changes. Raises ModelError."""
    assert start.adapter is not None
    fields = _peft().LoraConfig.__dataclass_fields__
    unknown = [name for name, value in start.settings.items() if value and name not in fields]
    if unknown:
        raise ModelError(
            f"adapter: {start.adapter} sets {unknown[0]}, which the installed peft does not know: update peft"
        )
    trained_on = start.settings.get("base_model_name_or_path")
    other = "" if trained_on == start.model else f" (it was trained on {trained_on})"
    line = f"starting from the adapter {start.adapter} on {start.model}{other}; a run's reference is both"
    console.print(escape(line), highlight=False, soft_wrap=True)
    lora = _peft().PeftConfig.from_pretrained(start.adapter)
    lora.base_model_name_or_path = start.model  # where whoever loads the result finds it
    lora.inference_mode = False
    dropout, lora.lora_dropout = lora.lora_dropout, 0.0
    try:
        model = _with_lora(model, lora)
        result = model.load_adapter(start.adapter, "default", is_trainable=True)
        odd = [f"{key} is not in the base" for key in result.unexpected_keys]
        odd += [f"{key} is not in the adapter" for key in result.missing_keys]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever shapes and names that do not fit make peft raise
        lines = str(error).strip().splitlines()
        odd = [f"{type(error).__name__}: {' '.join(line.strip() for line in lines[:2])}"]
    if odd:
        raise ModelError(
            f"adapter: {start.adapter} does not fit the model {start.model}; "
            f"it was trained on {trained_on}.\n{odd[0]}"
        )
    head = model.get_base_model().get_output_embeddings()
    for name in ("use_dora", "lora_bias"):  # linear_logp knows the lm_head's LoRA as scale * B A, and no more
        if hasattr(head, "lora_A") and getattr(lora, name):
            raise ModelError(f"adapter: {start.adapter} has {name} on the lm_head: merge it into its base")
    for parameter in model.parameters():
        if parameter.requires_grad:  # peft does this to LoRA's own weights only
            parameter.data = parameter.data.float()
    steady_dora(model, fresh=False)
    with safe_open(start.adapter / _WEIGHTS, framework="pt") as file:
        if not any(".base_layer." in key for key in file.keys()):
            leave_out_base(model)
    if dropout:
        lora.lora_dropout = dropout  # the saved adapter keeps what its settings name
        console.print(f"dropout set to 0 for training: lora_dropout (was {dropout})")
    return model
