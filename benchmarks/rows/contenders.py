"""Each contender in a process of its own: rows of a file, ready to train on.

    python -m benchmarks.rows.contenders WHO ORDER ANSWER

ORDER and ANSWER are JSON files: {"data", "model", "max_length", "cores", "folder"}, and when it had come how
far, with its CPU seconds and largest RSS by then. Imports come in the functions, for they are timed too.
"""

import hashlib
import json
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path

import numpy as np

Mark = Callable[[str], None]
FIRST = 64  # rows whose token ids are compared


def ours(order: dict, mark: Mark) -> dict:
    """What `fastdpo train` does before its model is loaded."""
    from rich.console import Console

    import fastdpo.api  # noqa: F401 (all that the command imports)
    from fastdpo.config.keys import Config
    from fastdpo.data.load import load_data
    from fastdpo.data.store.stored import facts_of
    from fastdpo.model.loading import load_tokenizer
    from fastdpo.training.job import job_of

    mark("imported")
    job, console = job_of(Config(**_keys(order))), Console()
    tokenizer = load_tokenizer(job.model, console)
    mark("ready")
    groups, _, _ = load_data(job.data, tokenizer, console)
    mark("loaded")
    whole = ([[*g.prompt.tolist(), *r.ids.tolist()] for r in g.responses] for g in groups)
    facts = facts_of(groups)
    tokens = int(facts.prompt.sum(dtype=np.int64) + facts.length.sum(dtype=np.int64))
    return {"groups": len(groups), "tokens": tokens, "first": _digest(whole, tokenizer.eos_token_id)}


def trl(order: dict, mark: Mark) -> dict:
    """What DPOTrainer does to its rows, without a trainer around it, in as many processes as cores."""
    from types import SimpleNamespace

    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    mark("imported")
    tokenizer = AutoTokenizer.from_pretrained(order["model"])
    cores = order["cores"]
    args = DPOConfig(
        order["folder"],
        max_length=order["max_length"],
        dataset_num_proc=cores if cores > 1 else None,  # one process more would be of no use
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    mark("ready")
    rows = datasets.load_dataset("json", data_files=order["data"], split="train")
    stand_in = SimpleNamespace(_tokenizer=tokenizer)
    rows = DPOTrainer._prepare_dataset(stand_in, rows, tokenizer, args, "train")
    mark("loaded")
    whole = ([row["prompt_ids"] + row[name] for name in ("chosen_ids", "rejected_ids")] for row in rows)
    return {"groups": len(rows), "first": _digest(whole, tokenizer.eos_token_id)}


def fill(order: dict, mark: Mark) -> dict:
    """A reference cache with all rows of the order in it, as if computed: to the model that text.make_model
    makes all tokens are about alike, and its forward of so many rows would take hours here."""
    import torch

    from fastdpo import api
    from fastdpo.model.policy import Policy

    def alike(policy, batch):
        return torch.full((len(batch.target),), -np.log(policy.core.config.vocab_size))

    mark("imported")
    Policy.token_logp = alike
    api.fill_reference(_keys(order))
    mark("loaded")
    return {}


def _keys(order: dict) -> dict:
    return {key: order[key] for key in ("data", "model", "max_length")}


def _digest(rows: Iterable[list[list[int]]], eos: int) -> str:
    """Of the token ids of the first rows, each to the end of its last turn: behind that one TRL trains what
    else the template writes, as a line's end."""
    cut = lambda ids: ids[: len(ids) - ids[::-1].index(eos)]
    found = [list(map(cut, row)) for row in islice(rows, FIRST)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def main() -> None:
    who, order, answer = sys.argv[1:]
    marks: dict[str, dict[str, float]] = {}

    def mark(name: str) -> None:
        used = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        cpu = sum(one.ru_utime + one.ru_stime for one in used)
        largest = 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
        marks[name] = {"at": time.monotonic(), "cpu_seconds": cpu, "largest_bytes": largest}

    found = {"ours": ours, "trl": trl, "fill": fill}[who](json.loads(Path(order).read_text()), mark)
    Path(answer).write_text(json.dumps(found | {"marks": marks}))


if __name__ == "__main__":
    main()
