"""The reference's log-probs of a stage's rows: looked up, and computed where they are not stored."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.markup import escape
from torch import Tensor

from fastdpo.console.formatting import counted
from fastdpo.console.progress import make_progress
from fastdpo.data.beginnings import beginnings, once
from fastdpo.data.packing import Cut, row_bounds
from fastdpo.data.store.digests import response_keys
from fastdpo.data.store.facts import HASH, Facts
from fastdpo.data.store.stored import facts_of
from fastdpo.distributed.turns import Turns
from fastdpo.distributed.world import World
from fastdpo.errors import DeadEndError, FastDPOError, TrainingError
from fastdpo.files.installed import versions
from fastdpo.model.policy import Policy
from fastdpo.moving import to_host
from fastdpo.records import Groups, PackedGroups
from fastdpo.reference.cache import RefCache
from fastdpo.reference.fingerprint import Fingerprint, reference_fingerprint
from fastdpo.reference.values import Values, as_keys


class ReferenceTable:
    """The reference's token log-probs of every response of a stage."""

    per_token = True

    def __init__(self, values: Values, account: dict):
        self.values = values
        self.account = (
            account  # file, namespace, hits, misses, packs, tokens, repeated_tokens, seconds, bytes
        )

    def of(self, groups: Groups) -> Tensor:
        """f32[M] on the CPU, in the order of pack(groups)."""
        values = self.values.of(as_keys([key for group in groups for key in response_keys(group)]))
        if values is None:
            unknown = (g.row for g in groups if not self.values.known(as_keys(response_keys(g))).all())
            raise ValueError(f"row {next(unknown)}: not among the rows this reference was made for")
        return torch.from_numpy(values)

    def sums(self, facts: Facts) -> np.ndarray:
        """f64[R]: the log-prob of each response of these groups."""
        return self.values.sums(facts.key)


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
    fingerprint: Fingerprint | None = None,
) -> ReferenceTable:
    """The reference of all responses: the policy as it stands, so call this before the first step.

    Each set (training rows, then held-out ones) is cut into packs in row order, whatever is stored already,
    and a pack with a missing response is computed whole: an interrupted fill then ends with the bits of
    one that was not. Of training rows, what repeats is computed once (see data/beginnings.py); held-out rows
    are packed as an evaluation packs them. `check` is called after each pack and may raise; what has arrived
    is then stored.
    `expected_namespace` is what a resumed run was started from; DeadEndError where this is not it.
    `source` is what `fastdpo cache` shows of it: model, adapter, stage, data, as they were named.
    `fingerprint`: of what is never kept, in place of its hashes."""
    start, world = time.perf_counter(), policy.world
    told, fingerprint = fingerprint is None, fingerprint or reference_fingerprint(policy, fresh_lora)
    facts = [facts_of(groups) for groups in groups_sets]
    wanted = np.unique(np.concatenate([np.zeros(0, HASH), *(some.key for some in facts)]))
    with RefCache(path if world.first else None, fingerprint, wanted, console) as cache:
        if expected_namespace not in (None, fingerprint.namespace):
            raise _other_weights(fingerprint, cache.parts_of(expected_namespace))
        hits = world.told(lambda: cache.values.count)
        packs = tokens = repeated = 0
        if hits < len(wanted):
            cache.start_fill(_environment(policy) | (source or {}))
            gathers = policy.share and not any(some.whole.any() for some in facts[:1])
            sets = [
                _packs(*some, max_tokens, policy.share, gathers and number == 0)
                for number, some in enumerate(zip(groups_sets, facts))
            ]
            # a fresh LoRA's start is the base model; otherwise the policy as it stands
            with policy.model.disable_adapter() if fresh_lora else contextlib.nullcontext():
                packs, tokens, repeated = _fill(
                    policy, sets, told * (len(wanted) - hits), cache, console, check
                )
    hand_on(cache.values, world)
    account = {
        "file": None if path is None else str(path),
        "namespace": fingerprint.namespace,
        "hits": hits,
        "misses": len(wanted) - hits,
        "packs": packs,
        "tokens": tokens,
        "repeated_tokens": repeated,
        "seconds": time.perf_counter() - start,
        "bytes": path.stat().st_size if path is not None and world.first else None,
    }
    if told:
        _print(account, console)
    return ReferenceTable(cache.values, account)


def hand_on(values: Values, world: World, at_once: int = 4096) -> None:
    """Gives all ranks what the first one knows."""
    if world.size == 1:
        return
    for first in range(0, len(values.wanted), at_once):
        keys = values.wanted[first : first + at_once]
        lengths, content = world.told(lambda keys=keys: values.stored(keys))  # type: ignore[misc]
        if not world.first:
            values.add(keys, lengths, content)


class Pack(NamedTuple):
    """What one forward computes."""

    read: Callable[[], Groups]
    keys: np.ndarray  # V16[n] of its responses
    apart: int | None  # where what repeats is computed once: the tokens it would be without that


@dataclass(frozen=True, eq=False)
class _Packs:
    """A set's packs, whose groups are read when they are computed."""

    cut: Cut
    keys: np.ndarray  # V16[R]
    bounds: np.ndarray  # i64[n+1]: the responses of pack i are bounds[i]:bounds[i + 1]
    apart: np.ndarray | None  # i64[n]: see Pack

    def todo(self, values: Values) -> list[int]:
        """The numbers of those with a missing response."""
        return np.flatnonzero(np.logical_or.reduceat(~values.known(self.keys), self.bounds[:-1])).tolist()

    def __getitem__(self, number: int) -> Pack:
        keys = self.keys[slice(*self.bounds[number : number + 2])]
        apart = None if self.apart is None else int(self.apart[number])
        return Pack(partial(self.cut.__getitem__, number), keys, apart)


def _packs(groups: Groups, facts: Facts, max_tokens: int, share: bool, gathers: bool = False) -> _Packs:
    """Cut without a cap on scored tokens: that one is for the backward, and would make other packs of full
    fine-tuning than of a LoRA. A pack in which something repeats has room left: its keys are gathered a
    response, however few tokens that takes."""
    groups, tokens = once(groups) if gathers else (groups, None)
    facts = facts_of(groups) if gathers else facts
    cut = Cut(groups, row_bounds(facts, max_tokens, share))
    apart = None if tokens is None else np.add.reduceat(tokens, cut.bounds[:-1])
    return _Packs(cut, facts.key, facts.cu_resp[cut.bounds], apart)


def _fill(policy, sets: list[_Packs], missing, cache: RefCache, console, check) -> tuple[int, int, int]:
    """Computes and stores the packs with a missing response, of which there are so many to tell; returns
    (packs, tokens, repeated tokens) computed."""
    world = policy.world
    todo = [(sets[s], number) for s, number in world.told(lambda: _todo(sets, cache.values))]
    done = tokens = repeated = 0
    if len(todo) > 1 and missing:
        text = f"reference: {counted(missing, 'response')} to compute, in {counted(len(todo), 'pack')}"
        console.print(text, highlight=False, soft_wrap=True)
    with make_progress(console) as bar:
        turns = Turns(todo, world)
        unit = "packs" if world.size == 1 else "rounds of packs"
        task = bar.add_task("reference", total=len(turns), unit=unit, info="")
        try:
            for keys, computed in _in_turn(policy, turns, cache):
                found = computed and (keys, computed.values(), computed.batch.input_tokens, computed.repeated)
                for theirs, values, more, again in filter(None, world.gather(found)):
                    if world.first:  # the others are given all of it in the end, as it was stored
                        cache.add(theirs, *values)
                    done, tokens, repeated = done + 1, tokens + more, repeated + again
                bar.update(task, advance=1)
                check()
        except BaseException:
            with contextlib.suppress(FastDPOError):  # what stops the fill is the news
                cache.commit()
            raise
        cache.commit()
    return done, tokens, repeated


def _todo(sets: list[_Packs], values: Values) -> list[tuple[int, int]]:
    """(number of the set, number of the pack) of each with a missing response."""
    return [(number, pack) for number, packs in enumerate(sets) for pack in packs.todo(values)]


def _in_turn(policy, turns: Turns, cache: RefCache) -> Iterator[tuple[np.ndarray, "_Computed | None"]]:
    """(its keys, what was computed) of each of this rank's packs, in order; None where an earlier pack, or
    another process, had all of it, and where the rank has none. A GPU has begun with the next pack by then:
    that one is packed, and this one stored, while the GPU computes."""
    ahead, alone = int(policy.device.type == "cuda"), turns.world.size == 1
    waiting: deque[tuple[np.ndarray, _Computed | None]] = deque()
    for number, (packs, place) in turns:
        one = packs[place]
        coming = {key for earlier, _ in waiting for key in earlier.tolist()}
        missing = not coming.issuperset(one.keys[~cache.values.known(one.keys)].tolist())
        try:
            # several ranks compute as often as one another
            computed = _computed(policy, one) if missing or not alone else None
            waiting.append((one.keys, None if number is None else computed))
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
    repeated: int  # tokens that are left out, as they repeat others of this pack or of earlier ones

    def values(self) -> tuple[np.ndarray, np.ndarray]:
        """(i64[n], f32[M]): the lengths of its responses and their log-probs, one response after the other.
        Raises TrainingError where one is not a number."""
        self.arrived()
        token_logp = self.token_logp.numpy().copy()  # the cache would keep pinned memory
        if not math.isfinite(token_logp.sum(dtype=np.float64)):
            raise TrainingError(
                f"reference: the log-probs of rows {self.batch.some_rows} are not numbers, so none of them "
                "is stored. Look at the rows with `fastdpo data`, or try dtype: fp32; the model's weights "
                "may be broken"
            )
        return np.diff(self.batch.cu_resp.numpy()), token_logp


@torch.no_grad()
def _computed(policy: Policy, one: Pack) -> _Computed:
    """The log-probs of a pack, through the policy's own path; on a GPU, asked for."""
    groups = one.read()
    batch = policy.pack(groups, None if one.apart is None else beginnings(groups))
    repeated = 0 if one.apart is None else one.apart - batch.input_tokens
    try:
        return _Computed(batch, *to_host(policy.token_logp(batch.to(policy.device))), repeated)
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
        "attention": policy.core.config.get_text_config()._attn_implementation,
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
        if account["repeated_tokens"]:
            done += f" ({account['repeated_tokens']:,} more repeat these and are not computed)"
    line = f"{account['hits']:,} of {total:,} responses found, {done}, {account['seconds']:.1f} s; "
    line += f"{where}, namespace {account['namespace'][:8]}"
    console.print(f"[bold]reference[/]: {escape(line)}", highlight=False, soft_wrap=True)
