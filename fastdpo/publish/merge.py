"""`fastdpo merge`: a LoRA adapter and its base as one whole model, which needs no peft to load."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError

from fastdpo.config.reading import read_yaml
from fastdpo.console.formatting import significant
from fastdpo.console.quiet import no_bars
from fastdpo.errors import ConfigError, ModelError
from fastdpo.files import durable
from fastdpo.model.finding import Source, find_source, tokenizer_beside
from fastdpo.model.processors import stored_files, write_files
from fastdpo.model.source import (
    as_reward_model,
    check_weights,
    damage,
    load_config,
    load_tokenizer,
    load_weights,
    sees_images,
)
from fastdpo.publish.model_card import SETTINGS, add_card, base_of, model_folder, run_of

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_TOKENS = 32  # of the row on which the merged model is compared with base + adapter


@no_bars()
def merge(
    source: str | Path, output: str | Path | None = None, dtype: str = "auto", console: Console | None = None
) -> Path:
    """Writes the adapter in a run folder (or in a peft folder) merged into its base, as a folder that
    AutoModelForCausalLM loads (or AutoModelForImageTextToText, of a reward model
    AutoModelForSequenceClassification), tokenizer and processor included; returns it (default:
    `source`-merged beside it).

    Each weight is merged in fp32 and rounded once, to `dtype`: bf16, fp32, or auto, the base's own. Raises
    ConfigError for an output that exists, ModelError for what cannot be merged or what merged badly.
    """
    console = console or Console()
    adapter = model_folder(source, "merge")
    if not (adapter / SETTINGS).exists():
        raise ConfigError(f"merge: {adapter} is a whole model already, not an adapter; use it as it is")
    if dtype not in (*_DTYPES, "auto"):
        raise ConfigError(f"--dtype: {dtype!r} is not one of auto, bf16, fp32")
    output = Path(output or f"{Path(source).resolve()}-merged")
    if output.exists():
        raise ConfigError(f"--output: {output} exists already; remove it, or name another folder")
    settings = _read_settings(adapter)
    base = _base(adapter, settings)
    model_config: Any = load_config(base)
    if getattr(model_config, "quantization_config", None):
        raise ModelError(
            f"{base.label} is stored quantised, and merged weights would be rounded to its few values again; "
            f"{_way_out(adapter)} the model that it was made of"
        )
    check_weights(base)
    wanted = _DTYPES.get(dtype) or model_config.dtype or torch.float32
    named = f"merging {adapter} into {base_of(settings)}, in {str(wanted).removeprefix('torch.')}"
    console.print(escape(named), highlight=False, soft_wrap=True)
    run = run_of(adapter)
    if run and read_yaml(run / "config.yaml").get("load_in_4bit"):
        text = "load_in_4bit: the run trained on this base in 4 bits. The merged model has its whole "
        text += "weights, so its log-probs differ from the run's by what 4 bits lost"
        console.print(f"[yellow]{text}", soft_wrap=True)
    beside = tokenizer_beside(adapter, "merge")
    tokenizer = load_tokenizer(beside or base, "merge")
    files = {} if not sees_images(model_config) else (beside and stored_files(beside)) or stored_files(base)
    if settings.get("task_type") == "SEQ_CLS":
        as_reward_model(base, model_config)
        model_config.pad_token_id = tokenizer.pad_token_id
    model = _with_adapter(adapter, settings, base, model_config, wanted, console)
    merged = _merged(model, wanted, console)
    try:
        with durable.new_folder(output) as part:
            merged.save_pretrained(part)
            tokenizer.save_pretrained(part)
            write_files(files, part)
            add_card(run, part, console, adapter=adapter)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--output: cannot write into {output}: {error}") from None
    console.print(f"[bold]done:[/] {escape(f'the merged model is in {output}')}", soft_wrap=True)
    return output


def _read_settings(adapter: Path) -> dict:
    try:
        settings = json.loads((adapter / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"merge: cannot read {adapter}/{SETTINGS}: {error}") from None
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if kind != "LORA":
        raise ModelError(f"merge: {adapter} is of peft_type {kind}; only LORA adapters can be merged")
    base, weights = base_of(settings), "adapter_model.safetensors"
    if not base:
        raise ModelError(f"merge: {adapter}/{SETTINGS} names no base; set base_model_name_or_path there")
    if not (adapter / weights).exists():
        raise ModelError(f"merge: {adapter} has no {weights}; save it with peft's save_pretrained")
    if problem := damage(adapter / weights):
        raise ModelError(f"merge: {adapter} has weights in {weights} that {problem}")
    if Path(base, SETTINGS).exists():
        raise ModelError(f"merge: {base}, the base of {adapter}, is an adapter itself; merge it first")
    return settings


def _base(adapter: Path, settings: dict) -> Source:
    name = base_of(settings)
    label = f"merge: {name!r}, the base that {adapter} names,"
    return find_source(name, label, settings.get("revision"), f"{_way_out(adapter)} where it is")


def _way_out(adapter: Path) -> str:
    return f"set base_model_name_or_path in {adapter}/{SETTINGS} to"


def _with_adapter(adapter: Path, settings: dict, base: Source, model_config, dtype: torch.dtype, console):
    """The base in `dtype` with the adapter on it in fp32, every tensor of which found its place."""
    try:
        import peft
    except ImportError:
        raise ModelError("merge: adapters need peft: pip install 'fastdpo[peft]'") from None
    for key in settings:
        if settings[key] and key not in peft.LoraConfig.__dataclass_fields__:
            raise ModelError(
                f"merge: {adapter} sets {key}, which the installed peft does not know: update peft"
            )
    rewards = settings.get("task_type") == "SEQ_CLS"
    whole = load_weights(base, model_config, console, rewards, dtype=dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's, on embeddings: what they fear is checked below
            model = peft.get_peft_model(whole, peft.PeftConfig.from_pretrained(str(adapter)))
            result = model.load_adapter(adapter, "default")
        odd = [f"{key} is not in the base" for key in result.unexpected_keys]
        odd += [f"{key} is not in the adapter" for key in result.missing_keys]
    except Exception as error:  # whatever shapes, names and newer settings make peft raise
        odd = [f"{type(error).__name__}: {str(error).strip()[:300]}"]
    if odd:
        raise ModelError(f"merge: {adapter} does not fit {base.name}, the base that it names.\n{odd[0]}")
    return model.eval()


@torch.no_grad()
def _merged(model, dtype: torch.dtype, console: Console):
    """The base model with the adapter in its weights; its logits are compared with those of both."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    core = model.get_base_model()
    untied = _untie(core)
    limit = getattr(core.config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    n_ids, same = core.get_input_embeddings().weight.shape[0], torch.Generator().manual_seed(0)
    ids = torch.randint(n_ids, (1, min(_TOKENS, limit)), generator=same)
    expected = model(ids).logits.float()
    with model.disable_adapter():
        moved = expected - model(ids).logits.float()
    try:
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):  # one at a time, so that one is in fp32 at a time
                module.get_base_layer().float()
                module.merge(safe_merge=True)
                module.get_base_layer().to(dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they are merged already
            merged = model.merge_and_unload().to(dtype)
    except (ValueError, RuntimeError) as error:  # weights that are not numbers, kinds that do not merge
        raise ModelError(f"merge: {error}") from None
    inside = core.get_input_embeddings().weight
    if untied:
        tied = torch.equal(inside, core.get_output_embeddings().weight)
        core.config.tie_word_embeddings = core.config.get_text_config().tie_word_embeddings = tied
        if tied:
            core.tie_weights()
        else:
            text = "the base ties its lm_head to its embeddings, and the adapter changes them apart: the "
            text += "merged model has both (tie_word_embeddings: false)"
            console.print(text, soft_wrap=True)
    units = _units_of_rounding(inside.shape[1], dtype)
    _check(merged(ids).logits.float(), expected, moved, units, dtype, console)
    return merged


def _untie(core) -> bool:
    """Gives the lm_head a weight of its own where it shares one with the embeddings and the adapter is on
    either; merged into the shared one, it would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    inside, out = core.get_input_embeddings(), core.get_output_embeddings()
    if out is None:  # a reward model's
        return False
    changed = any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in (inside, out))
    if not changed or not core.config.get_text_config().tie_word_embeddings:
        return False
    base = getattr(out, "base_layer", getattr(out, "original_module", out))
    base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    return True


def _units_of_rounding(width: int, dtype: torch.dtype) -> float:
    """How many units in their last place logits may move between two right ways to compute them, as a root
    mean square. In fp32 a sum of `width` products rounds at each, a random walk: measured are up to 0.9
    sqrt(width), with MKL's kernels for AMD and for Intel, 2 to 48 layers, widths of 64 to 512. In bf16 it is
    summed in fp32 and rounded once: up to 4, whatever the width."""
    return 4 * width**0.5 if dtype == torch.float32 else 16


def _check(got, expected, moved, units: float, dtype: torch.dtype, console: Console) -> None:
    """Raises ModelError where merged logits are off by more than rounding, in `units` of the last place, and
    a small share of what the adapter moves them by. All logits are f32[1, T, V]."""
    rms = lambda values: float(values.square().mean().sqrt())
    effect, off = rms(moved), rms(got - expected)
    share = 0.01 if dtype == torch.float32 else 0.5  # an adapter left out of one matrix of 500 is 0.04 off
    if not off <= share * effect + units * torch.finfo(dtype).eps * rms(expected):
        again = "" if dtype == torch.float32 else " this way (--dtype fp32 rounds less)"
        raise ModelError(
            f"merge: the merged logits are {off:.2g} from those of base + adapter, where the adapter itself "
            f"moves them by {effect:.2g}: it cannot be merged{again}; nothing was written"
        )
    text = f"logits: the adapter moves them by {significant(effect, 2)} (root mean square on a random row), "
    text += f"the merged weights give the same within {significant(off, 2)}"
    lost = off > 0.5 * effect and dtype != torch.float32
    more = f". {str(dtype).removeprefix('torch.')} rounds away much of the adapter; --dtype fp32 keeps it"
    console.print(f"[yellow]{text}{more}" if lost else text, highlight=False, soft_wrap=True)
