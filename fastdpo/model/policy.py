"""A Hugging Face causal LM as a policy: packed ids in, per-token log-probs out."""

import contextlib
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar, cast, overload

import torch
from fastdpo_kernels import Plan, backend, default_budget, linear_logp, plan
from torch import Tensor

from fastdpo.data.beginnings import Branch
from fastdpo.data.packing import pack
from fastdpo.distributed.world import ALONE
from fastdpo.errors import ModelError
from fastdpo.model import attention
from fastdpo.model.lm_head import Head, logit_transform, within_free_memory
from fastdpo.model.sharding import Root
from fastdpo.model.vision import pack_with_images, repeated
from fastdpo.records import PackedGroups, PreferenceGroup

T = TypeVar("T")
WithStats = tuple[Tensor, dict[str, Tensor]]


class Policy:
    """A model and how to score packed groups with it. Policy and reference share this one path."""

    # Whether token_logp adds the head's gradient to its .grad itself: for who clears no gradient between a
    # forward and its backward, which would lose it.
    adds_to_grad = False
    processor: Any = None  # transformers', of a model that sees images; None where no row has any
    saved_processor: Any = None  # what is saved beside the weights of such a model, in either case
    world = ALONE
    of_rewards = False  # see model/rewards.py
    gives, head_name = "log-probs", "lm_head"  # in words

    def __init__(
        self, model: torch.nn.Module, dtype: torch.dtype, dropout: dict[str, float] | None = None,
        head_budget: int | None = None,
    ) -> None:  # fmt: skip
        self.model = cast(Any, model)  # transformers' or peft's, with what only these have
        self.head_budget = head_budget  # bytes that the lm_head may take; None: as linear_logp has it
        self.dtype = dtype  # of the computation; trained weights are fp32
        self.core = self.model.get_base_model() if hasattr(model, "peft_config") else self.model
        self.head = Head(self.core.get_output_embeddings(), *logit_transform(self.core.config))
        self.device = next(model.parameters()).device
        self.dropout = dropout or {}  # what training switched off; saved models get it back
        self.stock_attention = attention.stock_attention(self.core.config)
        self.share = False  # fastdpo.model.support.prepare switches it on where it is exact
        self.root: Any = Root(self.model)

    def set_sharing(self, share: bool) -> None:
        """Switches between shared prompts and separate rows through the model's stock attention."""
        wanted = attention.NAME if share else self.stock_attention
        self.core.set_attn_implementation(attention.by_part(self.core.config, wanted))
        if self.core.config.get_text_config()._attn_implementation != wanted:
            raise attention.UnsharedAttention(
                f"{type(self.core).__name__} does not take its attention from AttentionInterface"
            )
        self.share = share

    @contextlib.contextmanager
    def stock(self) -> Iterator[Any]:
        """Inside, the model is as transformers loaded it: for generation, and to compare with."""
        shared = self.share
        self.set_sharing(False)
        try:
            yield self.model
        finally:
            self.set_sharing(shared)

    def autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type,
            dtype=self.dtype,
            enabled=self.dtype in (torch.bfloat16, torch.float16),
            cache_enabled=False,  # or a copy of every fp32 weight would stay until the forward ends
        )

    def pack(self, groups: Sequence[PreferenceGroup], tree: Sequence[Branch] | None = None) -> PackedGroups:
        """A microbatch for this policy: packing.pack, and what it takes of the prompts' images."""
        if self.processor is None:
            if any(group.images for group in groups):
                name = type(self.core).__name__
                raise ModelError(f"{name} reads no images, and row {groups[0].row} has some")
            return pack(groups, self.share, tree)
        return pack_with_images(self.core, self.processor, groups, self.share, tree)

    def hidden(self, batch: PackedGroups) -> Tensor:
        """Final hidden states [T, D] of a packed batch (on separate rows: [R * L, D])."""
        if batch.layout is None:
            arguments: dict[str, Any] = {"attention_mask": batch.attention_mask}
        else:
            arguments = {"position_ids": batch.position_ids, "fastdpo_layout": batch.layout}
        with self.autocast(), repeated(self.core.base_model, batch.features):
            arguments |= {"input_ids": batch.input_ids, **batch.images}
            out = self.core.base_model(use_cache=False, **arguments)
        return cast(Tensor, out.last_hidden_state).flatten(0, 1)

    @overload
    def token_logp(self, batch: PackedGroups, stats: tuple[()] = ()) -> Tensor: ...
    @overload
    def token_logp(self, batch: PackedGroups, stats: tuple[str, *tuple[str, ...]]) -> WithStats: ...
    @overload
    def token_logp(self, batch: PackedGroups, stats: tuple[str, ...]) -> Tensor | WithStats: ...
    def token_logp(self, batch: PackedGroups, stats: tuple[str, ...] = ()) -> Tensor | WithStats:
        """log pi(target | context) of each scored token, f32[M]; with stats named, (that, dict)."""
        return self.inside(lambda: self._token_logp(batch, stats))

    def inside(self, call: Callable[[], T]) -> T:
        """call(), where every weight that it reads is whole. Of shards collective, as its backward."""
        out: T = self.root(call)
        if self.world.sharded and not torch.is_grad_enabled():
            self.root.reshard()  # no backward does, and parameters() would give what was gathered
        return out

    def _token_logp(self, batch: PackedGroups, stats: tuple[str, ...]) -> Tensor | WithStats:
        return self.head_logp(self.hidden(batch)[batch.score_row].to(self.dtype), batch.target, stats)

    @overload
    def head_logp(self, hidden: Tensor, target: Tensor, stats: tuple[()] = ()) -> Tensor: ...
    @overload
    def head_logp(self, hidden: Tensor, target: Tensor, stats: tuple[str, ...]) -> Tensor | WithStats: ...
    def head_logp(self, hidden: Tensor, target: Tensor, stats: tuple[str, ...] = ()) -> Tensor | WithStats:
        """log pi of each target [M] by final hidden states [M, D] in `dtype`, f32[M]; as token_logp."""
        return linear_logp(
            hidden,
            target=target,
            scale=self.head.scale,
            softcap=self.head.softcap,
            stats=stats,
            memory_budget=self.head_budget,
            grad_into=self.head.main_gradient(self.dtype) if self.adds_to_grad else None,
            **self.head.tensors(self.dtype),
        )

    def trained(self) -> list[torch.nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @staticmethod
    def apart(difference: float) -> str:
        """A difference of what it gives, in words."""
        return f"{difference:.2g} nats a token"

    @property
    def head_size(self) -> tuple[int, int]:
        """(V, D)"""
        V, D = self.core.get_output_embeddings().weight.shape
        return V, D

    @property
    def head_backend(self) -> str:
        """What runs the lm_head: "triton", "cublas" or "torch", see fastdpo_kernels.backend."""
        return backend(self.device, self.dtype, lora=hasattr(self.head.module, "base_layer"))

    def plan(self, scored: int, memory_budget: int | None = None) -> Plan:
        """How linear_logp runs the head on this many scored tokens."""
        V, D = self.head_size
        return plan(
            *(scored, V, D),
            dtype=self.dtype,
            train_weight=self.head.trained,
            memory_budget=memory_budget or self.head_budget,
            backend=self.head_backend,
        )

    def default_budget(self) -> int:
        """Bytes that the lm_head may take where nobody says: as linear_logp has it, and on a GPU no more than
        a share of what is free."""
        V, D = self.head_size
        budget = default_budget(V, D, self.head.trained)
        return within_free_memory(budget, self.free_memory())

    def free_memory(self) -> int | None:
        """Bytes that are free on the model's GPU, for what torch has in reserve too; None on a CPU."""
        if self.device.type != "cuda":
            return None
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held

    @cached_property
    def max_scored(self) -> int | None:
        """The most scored tokens the packer puts into a microbatch: what the head can keep for its
        backward (6MVD, where recomputing is 8MVD) in half of head_budget. The other half is room for a
        single larger group. None with a frozen head, which keeps nothing."""
        if not self.head.trained:
            return None
        budget = (self.head_budget or self.default_budget()) // 2
        recomputes = lambda m: self.plan(m, budget).name != "keep"
        return bisect_left(range(1, 1 << 22), True, key=recomputes) or None

    def head_plan(self, batches: list[PackedGroups]) -> str:
        """One phrase on how the lm_head runs on the largest of these."""
        scored = max(len(batch.target) for batch in batches)
        p, size = self.plan(scored), self.core.get_output_embeddings().weight.numel()
        cost = f"{p.flops / (scored * size):.0f}MVD, at most {p.peak_bytes / 1e6:.0f} MB"
        return f"{p.name} by {self.head_backend}, {cost}"
