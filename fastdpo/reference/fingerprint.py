"""What the reference's log-probs depend on besides the tokens: a content hash of the model. Names and places
do not count.
"""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastdpo.distributed.shards import whole
from fastdpo.errors import ModelError
from fastdpo.files.durable import json_digest
from fastdpo.model.policy import Policy

NUMERICS_VERSION = 1  # raise it when our own forward gives other values for the same model and tokens
_PIECE_BYTES = 64 << 20  # a thread's piece of a tensor: one such copy a thread, when it comes from a GPU

# What a transformers config says besides the model's mathematics. The dtype of each weight and of the
# computation are hashed as they are; training sets every dropout (and router jitter) to 0; transformers'
# Trainer overwrites the special tokens with the tokenizer's when it begins to train (up to 5.17 with None
# where that has none). Which ids a row holds is in its key.
_NOT_THE_MODEL = set(
    "architectures dtype torch_dtype use_cache transformers_version bos_token_id eos_token_id "
    "pad_token_id".split()
)
_RANDOM = ("drop", "jitter")
# What a peft config says besides what its tensors' names and values already do.
_NOT_THE_ADAPTER = set(
    "auto_mapping base_model_name_or_path exclude_modules inference_mode init_lora_weights lora_dropout "
    "peft_version revision target_modules task_type".split()
)


@dataclass(frozen=True)
class Fingerprint:
    """Which reference: `parts` says what went in, so that two of them can be compared in words."""

    parts: dict[str, str | int | None]

    @property
    def namespace(self) -> str:
        """32 hex digits."""
        return json_digest(self.parts)

    def differs_from(self, parts: dict) -> list[str]:
        """The names of the parts in which another fingerprint's parts differ."""
        return sorted(name for name in self.parts if self.parts[name] != parts.get(name))


def reference_fingerprint(policy: Policy, fresh_lora: bool) -> Fingerprint:
    """Of the policy as it stands: without its adapter where that is fresh, with it where it has learnt.

    A fresh LoRA of any rank and full fine-tuning refer to the same weights, so they hash alike where
    the weights are kept in the same dtype.
    """
    prefix = policy.model.base_model.prefix if policy.core is not policy.model else None
    weights: dict[str, Tensor] = {}
    adapter: dict[str, Tensor] = {}
    for name, tensor in policy.core.state_dict(keep_vars=True).items():
        where, name = _place(name, prefix, weights, adapter)
        where[name] = tensor
    config = _mathematics(policy.core.config.to_dict())
    quantization = config.pop("quantization_config", None)
    found = Fingerprint(
        {
            "numerics": NUMERICS_VERSION,
            "weights": _tensors_digest(weights),
            "config": json_digest([type(policy.core).__name__, config]),
            "compute dtype": str(policy.dtype).removeprefix("torch."),
            "quantization": None if quantization is None else json_digest(quantization),
            "adapter": None if fresh_lora or prefix is None else _adapter_digest(policy, adapter),
            "logit scale": repr(policy.head.scale),
            "logit softcap": repr(policy.head.softcap),
        }
    )
    for rank, other in enumerate(policy.world.gather(found)):
        if differ := found.differs_from(other.parts):
            raise ModelError(
                f"model: rank {rank} has another one than rank {policy.world.rank} (what differs: "
                f"{', '.join(differ)}); give all nodes the same files"
            )
    return found


def _place(name: str, prefix: str | None, weights: dict, adapter: dict) -> tuple[dict, str]:
    """(the dict a tensor belongs to, its name there). Under peft, the base's names without the wrappers."""
    if prefix is None:
        return weights, name
    parts = name.split(".")
    if "modules_to_save" in parts or any(part.startswith(prefix) for part in parts):
        return adapter, name
    return weights, ".".join(part for part in parts if part not in ("base_layer", "original_module"))


def _adapter_digest(policy: Policy, tensors: dict[str, Tensor]) -> str:
    """Of an adapter that has learnt: its tensors, and what its config makes of them."""
    configs = {}
    for name, config in policy.model.peft_config.items():
        kept = {k: v for k, v in config.to_dict().items() if k not in _NOT_THE_ADAPTER}
        configs[name] = {k: v for k, v in kept.items() if v}  # a newer peft's unused features are falsy
    return json_digest([_tensors_digest(tensors), configs])


def _mathematics(config: dict) -> dict:
    """A transformers config (nested ones too) without names, paths, versions and dropout, and without
    None: unset is as good as absent, and newer versions add keys."""
    out = {}
    for key, value in config.items():
        key = str(key)  # id2label's are numbers
        if key.startswith("_") or key in _NOT_THE_MODEL or any(word in key for word in _RANDOM):
            continue
        if value is not None:
            out[key] = _mathematics(value) if isinstance(value, dict) else value
    return out


def _tensors_digest(tensors: dict[str, Tensor]) -> str:
    """Of names, dtypes, shapes and bytes. Tied tensors count under each name and are read once. Those in
    parts are gathered one after the other, by all ranks."""
    memory = lambda t: id(t) if isinstance(t, DTensor) else t.data_ptr()
    owner = {name: (memory(t), t.dtype, t.shape, t.stride()) for name, t in tensors.items()}
    distinct = {owner[name]: tensor for name, tensor in tensors.items()}
    digest = lambda piece: hashlib.blake2b(piece.cpu().numpy(), digest_size=16).hexdigest()
    pieces: dict[tuple, list[Future[str]]] = {}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:  # hashlib lets other threads run
        for o, t in distinct.items():
            pieces[o] = [pool.submit(digest, piece) for piece in _pieces(whole(t.detach()))]
            if isinstance(t, DTensor):
                wait(pieces[o])  # before the next one takes as much memory
        content = {o: [job.result() for job in jobs] for o, jobs in pieces.items()}
    said = lambda name, t: [name, str(t.dtype), list(t.shape), content[owner[name]]]
    return json_digest([said(name, t) for name, t in sorted(tensors.items())])


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """A tensor's bytes in views of at most _PIECE_BYTES (copied only where they do not lie in a row)."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_PIECE_BYTES)
