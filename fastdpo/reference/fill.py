"""The reference's log-probs of a stage's rows: looked up, and computed where they are not stored."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from fastdpo.console.formatting import counted
from fastdpo.console.progress import make_progress
from fastdpo.data.packing import in_row_order, pack
from fastdpo.errors import DeadEndError, FastDPOError, TrainingError
from fastdpo.files.installed import versions
from fastdpo.model.policy import Policy
from fastdpo.moving import to_host
from fastdpo.records import Groups, PackedGroups
from fastdpo.reference.cache import RefCache
from fastdpo.reference.fingerprint import Fingerprint, reference_fingerprint, response_keys


class ReferenceTable:
    """The reference's token log-probs of every response of a stage, in memory."""

    per_token = True

    def __init__(self, values: dict[bytes, np.ndarray], account: dict):
        self._values = values
        self.account = account  # file, namespace, hits, misses, packs, tokens, seconds, bytes

    def of(self, groups: Groups) -> Tensor:
        """f32[M] on the CPU, in the order of pack(groups)."""
        try:
            values = [self._values[key] for group in groups for key in response_keys(group)]
        except KeyError:
            unknown = (g.row for g in groups if any(k not in self._values for k in response_keys(g)))
            raise ValueError(f"row {next(unknown)}: not among the rows this reference was made for") from None
        return torch.from_numpy(np.concatenate(values))


def load_reference(
    policy: Policy,
    groups_sets: list[Groups],
    *,
    path: Path | None,
    fresh_lora: bool,
    max_tokens: int,
    console,
    check: Callable[[], None] = lambda: None,
    expected_namespace: str | None = None,
    source: dict | None = None,
) -> ReferenceTable:
    """The reference of all responses: the policy as it stands, so call this before the first step.

    Each set (training rows, held-out rows) is cut into packs in row order, whatever is stored already,
    and a pack with a missing response is computed whole: an interrupted fill then ends with the bits of
    one that was not. `check` is called after each pack and may raise; what has arrived is then stored.
    `expected_namespace` is what a resumed run was started from; DeadEndError where this is not it.
    `source` is what `fastdpo cache` shows of it: model, adapter, stage, data, as they were named.
    """
    start = time.perf_counter()
    fingerprint = reference_fingerprint(policy, fresh_lora)
    keys = [[response_keys(group) for group in groups] for groups in groups_sets]
    wanted = {key for of_set in keys for of_group in of_set for key in of_group}
    with RefCache(path, fingerprint, wanted, console) as cache:
        if expected_namespace not in (None, fingerprint.namespace):
            raise _other_weights(fingerprint, cache.parts_of(expected_namespace))
        hits = len(cache.values)
        packs = tokens = 0
        if hits < len(wanted):
            cache.start_fill(_environment(policy) | (source or {}))
            # no cap on scored tokens: that one is for the backward, and would make other packs of full
            # fine-tuning than of a LoRA
            parts = [part for g in groups_sets for part in in_row_order(g, max_tokens, share=policy.share)]
            in_order = chain.from_iterable(keys)
            all_packs = [(part, [key for _ in part for key in next(in_order)]) for part in parts]
            # a fresh LoRA's start is the base model; otherwise the policy as it stands
            with policy.model.disable_adapter() if fresh_lora else contextlib.nullcontext():
                packs, tokens = _fill(policy, all_packs, cache, console, check)
    account = {
        "file": None if path is None else str(path),
        "namespace": fingerprint.namespace,
        "hits": hits,
        "misses": len(wanted) - hits,
        "packs": packs,
        "tokens": tokens,
        "seconds": time.perf_counter() - start,
        "bytes": None if path is None else path.stat().st_size,
    }
    _print(account, console)
    return ReferenceTable(cache.values, account)


def _fill(policy, packs, cache: RefCache, console, check) -> tuple[int, int]:
    """Computes and stores the packs with a missing response; returns (packs, tokens) computed."""
    todo = [(groups, keys) for groups, keys in packs if any(key not in cache.values for key in keys)]
    done = tokens = 0
    if len(todo) > 1:
        missing = set(chain.from_iterable(keys for _, keys in todo)) - set(cache.values)  # each once
        text = f"reference: {counted(len(missing), 'response')} to compute, in {counted(len(todo), 'pack')}"
        console.print(text, highlight=False, soft_wrap=True)
    with make_progress(console) as bar:
        task = bar.add_task("reference", total=len(todo), unit="packs", info="")
        try:
            for keys, computed in _in_turn(policy, todo, cache):
                if computed is not None:
                    cache.add(keys, computed.values())
                    done, tokens = done + 1, tokens + computed.batch.input_tokens
                bar.update(task, advance=1)
                check()
        except BaseException:
            with contextlib.suppress(FastDPOError):  # what stops the fill is the news
                cache.commit()
            raise
        cache.commit()
    return done, tokens


def _in_turn(policy, packs, cache: RefCache) -> Iterator[tuple[list[bytes], "_Computed | None"]]:
    """(its keys, what was computed) of each pack, in order; None where an earlier pack, or another process,
    had all of it. A GPU has begun with the next pack by then: that one is packed, and this one stored, while
    the GPU computes."""
    ahead = int(policy.device.type == "cuda")
    waiting: deque[tuple[list[bytes], _Computed | None]] = deque()
    for groups, keys in packs:
        coming = {key for earlier, _ in waiting for key in earlier}
        missing = any(key not in cache.values and key not in coming for key in keys)
        try:
            waiting.append((keys, _computed(policy, groups) if missing else None))
        except BaseException:
            yield from waiting  # what the GPU has computed before it is stored
            raise
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting


@dataclass(frozen=True)
class _Computed:
    """A pack that the device may still be computing."""

    batch: PackedGroups
    token_logp: Tensor  # f32[M] on the host, once it has arrived
    arrived: Callable[[], None]  # waits until then

    def values(self) -> list[np.ndarray]:
        """The log-probs of each response. Raises TrainingError where one is not a number."""
        self.arrived()
        token_logp = self.token_logp.numpy().copy()  # the table would keep pinned memory
        if not math.isfinite(token_logp.sum(dtype=np.float64)):
            raise TrainingError(
                f"reference: the log-probs of rows {self.batch.some_rows} are not numbers, so none of them "
                "is stored. Look at the rows with `fastdpo data`, or try dtype: fp32; the model's weights "
                "may be broken"
            )
        return [token_logp[a:b] for a, b in pairwise(self.batch.cu_resp.tolist())]


@torch.no_grad()
def _computed(policy: Policy, groups: Groups) -> _Computed:
    """The log-probs of a pack, through the policy's own path; on a GPU, asked for."""
    batch = pack(groups, policy.share)
    try:
        return _Computed(batch, *to_host(policy.token_logp(batch.to(policy.device))))
    except torch.OutOfMemoryError:
        raise TrainingError(
            f"reference: out of GPU memory on a pack of {batch.input_ids.numel()} tokens (rows "
            f"{batch.some_rows}). Lower max_tokens (or, if it is one group, max_length)"
        ) from None


def _environment(policy: Policy) -> dict:
    """The model's name, and what the values may depend on in their last digits: recorded with each fill,
    not keyed."""
    gpu = policy.device.type == "cuda"
    return {
        "versions": versions("fastdpo", "torch", "transformers", "peft", "triton", "flash-attn"),
        "device": torch.cuda.get_device_name(policy.device) if gpu else policy.device.type,
        "attention": policy.core.config._attn_implementation,
        "share": policy.share,
        "model": policy.core.config.name_or_path,
    }


def _other_weights(fingerprint: Fingerprint, expected: dict | None) -> DeadEndError:
    differ = fingerprint.differs_from(expected) if expected else []
    what = f" (what differs: {', '.join(differ)})" if differ else ""
    return DeadEndError(
        f"reference: these are not the start weights of the run to resume{what}, so its reference cannot "
        "be computed from them. Give the model it was started with, or start a new run, by --overwrite and "
        "without --resume"
    )


def _print(account: dict, console) -> None:
    total = account["hits"] + account["misses"]
    where = "not kept (reference_cache: off)" if account["file"] is None else account["file"]
    done = "nothing to compute"
    if account["misses"]:
        packs = counted(account["packs"], "pack")
        done = f"{account['misses']:,} computed in {packs} of {account['tokens']:,} tokens"
    line = f"{account['hits']:,} of {total:,} responses found, {done}, {account['seconds']:.1f} s; "
    line += f"{where}, namespace {account['namespace'][:8]}"
    console.print(f"[bold]reference[/]: {escape(line)}", highlight=False, soft_wrap=True)
