"""`FastDPOTrainer`: trl.DPOTrainer with packed, shared rows and our reference cache."""

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
import trl
import trl.trainer.dpo_trainer as dpo_trainer
import xxhash
from accelerate import PartialState
from accelerate.utils import is_peft_model
from rich.console import Console
from torch.utils.data import RandomSampler, Sampler
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from fastdpo.data.packing import epoch_order
from fastdpo.doctor import settle_backends
from fastdpo.errors import ConfigError
from fastdpo.integrations.trl_forward import add_fused_lm_head
from fastdpo.model.policy import Policy
from fastdpo.model.support import prepare
from fastdpo.records import Pair, PreferenceGroup, Response
from fastdpo.reference.cache_file import cache_path
from fastdpo.reference.fill import ReferenceTable, load_reference

_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


class FastDPOTrainer(trl.DPOTrainer):
    """trl.DPOTrainer, with its arguments and one more.

    reference_cache: "auto" (a file in ~/.cache/fastdpo), the path of a file, "off" (computed before the
    training and not kept), or None, which leaves the reference to TRL. The first three switch on
    precompute_ref_log_probs; what it cannot do (IterableDataset, sync_ref_model) is then refused by TRL: say
    None there. A row's reference log-probs are found again after any change of the data set,
    hyper-parameters or LoRA, and only those of new rows are computed. Of rows with images TRL takes no
    stored ones: "auto" leaves them to TRL, with a warning, and "off" and a path raise ConfigError.

    Rows of the same prompt follow each other in a random order of prompts, so that a batch shares them.
    """

    _made_with: tuple = (("add_fused_lm_head", add_fused_lm_head),)  # in TRL's module, while one is made

    def __init__(self, *args: Any, reference_cache: str | None = "auto", **kwargs: Any) -> None:
        given = dict(zip(inspect.signature(trl.DPOTrainer).parameters, args)) | kwargs
        config = given.get("args")
        if reference_cache is not None and _sees_images(given.get("train_dataset")):
            _say_without(reference_cache)
            reference_cache = None
        self._reference_cache = reference_cache
        if reference_cache is not None:
            if config is None:
                raise ConfigError("args: FastDPOTrainer needs a DPOConfig (or reference_cache=None)")
            config.precompute_ref_log_probs = True
        if not getattr(config, "use_cpu", False):
            state = PartialState()
            with state.main_process_first():  # the others read what the first one keeps
                settle_backends(Console(stderr=True, quiet=not state.is_main_process))
        # TRL hashes all weights to name its own file, which ours needs not
        hashed = dpo_trainer.hash_module if reference_cache is None else lambda module: None
        with mock.patch.multiple(dpo_trainer, hash_module=hashed, **dict(self._made_with)):
            super().__init__(*args, **kwargs)

    def _precompute_ref_logps(self, dataset, name: str, batch_size: int):
        """The data set with the two columns that TRL's loss reads, out of our cache."""
        if self._reference_cache is None or isinstance(dataset, datasets.IterableDataset):
            return super()._precompute_ref_logps(dataset, name, batch_size)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ConfigError(
                "reference_cache: its fill needs whole weights on each device, which FSDP and DeepSpeed "
                "split; give FastDPOTrainer reference_cache=None, and TRL computes the reference"
            )
        by_row = [self._groups(number, row) for number, row in enumerate(dataset)]
        table = self._reference([group for groups, _ in by_row for group in groups], batch_size)
        sums = [_sums(groups, n_chosen, table, self.ld_alpha) for groups, n_chosen in by_row]
        for column, values in zip(_COLUMNS, zip(*sums)):
            dataset = dataset.add_column(column, np.array(values, np.float32))
        return dataset

    def _groups(self, number: int, row: dict) -> tuple[list[PreferenceGroup], int]:
        """A row as the collator would cut it: a group of two responses, or a group each where a cut left
        them no first token in common, without those that have nothing to score. And how many tokens of
        the chosen one are scored, which come first."""
        batch = self.data_collator([{k: row[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")}])
        ids, scored = batch["input_ids"].numpy(), batch["completion_mask"].numpy().astype(bool)
        lengths = batch["attention_mask"].sum(1).tolist()
        scored[:, 0] = False  # nothing predicts a row's first token
        rows = [(ids[i, :n], scored[i, :n]) for i, n in enumerate(lengths) if scored[i].any()]
        starts = [int(mask.argmax()) for _, mask in rows]
        differ = np.flatnonzero((ids[0] != ids[1])[: min(starts, default=0)])
        if len(rows) == 2 and not (len(differ) and differ[0] == 0):
            parts = [(rows, int(differ[0]) if len(differ) else min(starts))]
        else:
            parts = [([row], start) for row, start in zip(rows, starts)]
        groups = []
        for rows_of, start in parts:
            responses = tuple(Response(tail[start:].copy(), mask[start:].copy()) for tail, mask in rows_of)
            pairs = (Pair(0, 1),) if len(responses) == 2 else ()
            groups.append(PreferenceGroup(number, rows_of[0][0][:start].copy(), responses, pairs))
        return groups, int(scored[0].sum())

    def _reference(self, groups: list[PreferenceGroup], batch_size: int) -> ReferenceTable:
        """The token log-probs of all responses."""
        assert self._reference_cache is not None
        args, model = self.args, self.ref_model or self.model
        policy = Policy(model, _compute_dtype(args, model))
        console = Console(stderr=True, quiet=not self.accelerator.is_main_process)
        own_adapter = is_peft_model(model) and "ref" in model.peft_config
        adapter = use_adapter(model, "ref") if own_adapter else contextlib.nullcontext()
        options: dict[str, Any] = {
            "path": cache_path(self._reference_cache),
            "fresh_lora": is_peft_model(model) and not own_adapter,
            "max_tokens": batch_size * max(group.input_tokens for group in groups),
            "console": console,
        }
        training = model.training
        model.eval()
        try:
            with disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs), adapter:
                prepare(policy, groups, console)
                if self.accelerator.num_processes > 1 and options["path"] is not None:
                    mine = groups[self.accelerator.process_index :: self.accelerator.num_processes]
                    load_reference(policy, [mine], **options)
                    self.accelerator.wait_for_everyone()
                return load_reference(policy, [groups], **options)
        finally:
            policy.set_sharing(False)
            model.train(training)

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        prompts = _prompts(rows) if type(sampler) is RandomSampler else []
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return PromptSampler(prompts, seed) if len(set(prompts)) < len(prompts) else sampler


def _sees_images(rows: Any) -> bool:
    """As TRL decides it."""
    columns = getattr(rows, "column_names", None) or next(iter(rows or ()), ())
    return not {"image", "images"}.isdisjoint(columns)


def _say_without(reference_cache: str) -> None:
    """TRL refuses a stored reference of rows with images."""
    if reference_cache != "auto":
        raise ConfigError(
            "reference_cache: TRL takes no stored reference of rows with images; give FastDPOTrainer "
            "reference_cache=None, and TRL computes it in every step"
        )
    warnings.warn(
        "fastdpo: TRL takes no stored reference of rows with images, and computes it in every step "
        "(fastdpo train has a cache for them)",
        stacklevel=3,
    )


def _prompts(rows: Any) -> list[bytes]:
    """Equal ones of the data set's rows whose prompts are equal; [] of rows that have none yet."""
    columns = getattr(rows, "column_names", ())
    if "prompt_ids" in columns:
        return [np.asarray(ids).tobytes() for ids in rows["prompt_ids"]]
    images = [name for name in ("image", "images") if name in columns]
    if not images or "prompt" not in columns:
        return []
    words = [repr(prompt).encode() for prompt in rows["prompt"]]
    if len(set(words)) == len(words):
        return words
    undecoded = rows.select_columns(images).with_format("arrow").iter(1)
    return [text + b"".join(_hashes(row.to_pylist())) for text, row in zip(words, undecoded, strict=True)]


def _hashes(cell: Any) -> Iterator[bytes]:
    """Of what images are kept as, in order: their bytes or their paths."""
    if isinstance(cell, list | dict):
        for inner in cell.values() if isinstance(cell, dict) else cell:
            yield from _hashes(inner)
    else:
        yield xxhash.xxh3_128_digest(cell if isinstance(cell, bytes) else repr(cell).encode())


class PromptSampler(Sampler):
    """A random order of prompts, and the rows of each prompt one after the other: a function of (seed,
    epoch)."""

    def __init__(self, prompts: list[bytes], seed: int):
        self.seed, self.epoch = seed, 0
        by_prompt: dict[bytes, list[int]] = {}
        for row, prompt in enumerate(prompts):
            by_prompt.setdefault(prompt, []).append(row)
        self.rows, self.length = list(by_prompt.values()), len(prompts)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self):
        order = epoch_order(len(self.rows), self.seed, self.epoch)
        return (row for i in order for row in self.rows[i])


def _compute_dtype(args, model) -> torch.dtype:
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else model.get_input_embeddings().weight.dtype


def _sums(groups: list[PreferenceGroup], n_chosen: int, table: ReferenceTable, ld_alpha: float | None):
    """A row's two reference log-probs, (chosen, rejected). LD-DPO (arXiv 2409.06411) weighs by ld_alpha
    what lies beyond the shorter response."""
    if not groups:
        return 0.0, 0.0
    values = np.split(table.of(groups).numpy().astype(np.float64), [n_chosen])
    shorter, tail = min(map(len, values)), 1.0 if ld_alpha is None else ld_alpha
    return tuple(v[:shorter].sum() + tail * v[shorter:].sum() for v in values)
