"""A trained policy as a folder that transformers, or peft, loads."""

from pathlib import Path

from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from fastdpo.console.quiet import no_bars
from fastdpo.distributed.shards import whole
from fastdpo.model.loading import restore_dropout
from fastdpo.model.policy import Policy
from fastdpo.model.processors import save_processor


@no_bars()
def save_model(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """Writes a folder that `from_pretrained` loads: the model, or the LoRA adapter, and the tokenizer
    (of a model that sees images the processor too). All
    ranks of a world have to call it, and the first one writes.

    A model is saved in the compute dtype (after dtype: bf16 its fp32 master weights are rounded), an
    adapter as it trained; the config gets back the dropout that training switched off.
    """
    restore_dropout(policy.core.config, policy.dropout)
    with policy.stock() as model:
        if policy.core is policy.model:
            model.to(policy.dtype)
        state = whole_state(policy)
        if policy.world.first:
            model.save_pretrained(folder, **({"state_dict": state} if state else {}))
    if policy.world.first:
        tokenizer.save_pretrained(folder)
        if policy.saved_processor is not None:
            save_processor(policy.saved_processor, folder)


def whole_state(policy: Policy) -> dict[str, Tensor]:
    """Of shards the state dict in the first rank's host memory, a tensor at a time; else nothing, for the
    model holds it."""
    if not policy.world.sharded:
        return {}
    found: dict[int, Tensor] = {}  # tied weights once
    state = {}
    for name, tensor in policy.model.state_dict(keep_vars=True).items():
        if policy.core is not policy.model and not tensor.requires_grad:
            continue  # an adapter's file has none of its base
        if id(tensor) not in found:
            full = whole(tensor.detach())
            found[id(tensor)] = full.cpu() if policy.world.first else full.new_empty(0)
        state[name] = found[id(tensor)]
    return state


@no_bars()
def save_copy(policy: Policy, tokenizer: PreTrainedTokenizerBase, folder: Path | str) -> None:
    """As `save_model`, of a policy that trains on: its weights stay as they are, and are rounded to the
    compute dtype in host memory. Not of shards, nor for 4-bit weights without an adapter."""
    with policy.stock() as model:
        state = _rounded(policy) if policy.core is policy.model else None
        model.save_pretrained(folder, **({"state_dict": state} if state else {}))
    tokenizer.save_pretrained(folder)


def _rounded(policy: Policy) -> dict[str, Tensor]:
    found: dict[int, Tensor] = {}  # tied weights once
    for tensor in (state := policy.model.state_dict(keep_vars=True)).values():
        if id(tensor) not in found:
            dtype = policy.dtype if tensor.is_floating_point() else tensor.dtype
            found[id(tensor)] = tensor.detach().to("cpu", dtype, copy=True)
    return {name: found[id(tensor)] for name, tensor in state.items()}
