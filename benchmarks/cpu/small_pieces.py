"""The small pieces of a step, each alone, on a CPU, by pytest-benchmark (not collected by `make test`).

python -m benchmarks.cpu.small_pieces [--out DIR]                            and writes the JSON
python -m pytest benchmarks/cpu/small_pieces.py --benchmark-only [-k pack]   for a closer look
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from fastdpo_kernels import linear_dpo, linear_logp
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.inputs import groups_of, random_rows
from benchmarks.lengths import draw
from benchmarks.models import MODELS, build, tiny
from benchmarks.results import RESULTS, write_result
from fastdpo.config.keys import Config
from fastdpo.data.groups import Limits, to_group
from fastdpo.data.load import load_groups
from fastdpo.data.packing import epoch_order, pack, split_step
from fastdpo.data.store.digests import response_keys
from fastdpo.demo import DISHES, HELPFUL, QUESTIONS, RUDE, make_model
from fastdpo.model import attention
from fastdpo.model.policy import Policy
from fastdpo.records import ResponseLogps
from fastdpo.reference.fill import load_reference
from fastdpo.training.job import objective_of

PAIRS, MAX_TOKENS, VOCAB = 64, 8192, 32_000
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def groups():
    """One step's rows, as long as HH-RLHF's."""
    return groups_of(random_rows(draw("HH-RLHF", PAIRS), VOCAB))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_model(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def rows():
    """Conversations of the demo's text."""
    turn = lambda role, text, dish: [{"role": role, "content": text.format(dish=dish, a="a", b="b", c="c")}]
    return [
        {
            "prompt": turn("user", QUESTIONS[i % len(QUESTIONS)], dish),
            "chosen": turn("assistant", " ".join(HELPFUL), dish),
            "rejected": turn("assistant", " ".join(RUDE), dish),
        }
        for i, dish in enumerate(list(DISHES) * 4)
    ]


@pytest.fixture
def batch(groups):
    return pack(groups[:16])


def test_to_group(benchmark, rows, tokenizer):
    """One row: format, template, tokens, masks."""
    benchmark(to_group, rows[0], 0, tokenizer, Limits(1024))


def test_load_groups(benchmark, rows, tokenizer, tmp_path):
    """64 rows of a file: what a row costs where many are tokenised together."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    load = lambda: load_groups(
        str(path), tokenizer, Limits(1024), strict=True, console=QUIET, data_cache="off"
    )
    benchmark(load)


def test_split_step(benchmark, groups):
    """A step's rows to microbatches."""
    benchmark(split_step, groups, MAX_TOKENS)


def test_pack(benchmark, groups):
    """A microbatch of shared prompts, with its layout."""
    benchmark(pack, groups)


def test_epoch_order(benchmark):
    """The permutation of 100,000 rows."""
    benchmark(epoch_order, 100_000, 0, 1)


def test_response_keys(benchmark, groups):
    """The cache's keys of a step's responses."""
    benchmark(lambda: [response_keys(group) for group in groups])


def test_cache_lookup(benchmark, groups):
    """The stored reference of a step's rows."""
    policy = Policy(build(tiny(MODELS["CPU"]), "cpu", torch.float32), torch.float32)
    policy.set_sharing(True)
    policy.token_logp = lambda batch: -torch.rand(len(batch.target))
    options = dict(path=None, fresh_lora=False, max_tokens=MAX_TOKENS, console=QUIET)
    table = load_reference(policy, [groups], **options)
    benchmark(table.of, groups)


def head(M=128, D=64):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(M, D, generator=draw).requires_grad_()
    weight = (torch.randn(VOCAB, D, generator=draw) / D**0.5).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (M,), generator=draw)


def test_linear_logp(benchmark):
    """128 rows, forward and backward, head trained."""
    hidden, weight, target = head()
    benchmark(lambda: linear_logp(hidden, weight, target).sum().backward())


def test_linear_dpo(benchmark):
    """The same rows as 8 pairs, with the loss."""
    hidden, weight, target = head()
    cu_resp, pairs = torch.arange(0, 129, 8), torch.arange(16).view(8, 2)
    benchmark(lambda: linear_dpo(hidden, weight, target, cu_resp, pairs)[0].backward())


def test_objective(benchmark, batch):
    """DPO's loss of 16 pairs and its gradient by token."""
    objective = objective_of(Config(model="random", data="random"))
    logp = torch.from_numpy(np.random.default_rng(0).normal(-6, 1, len(batch.target))).float()
    logp.requires_grad_()
    reference = logp.detach() + 0.1
    benchmark(lambda: objective.whole(ResponseLogps.of(batch, logp, reference)).backward())


def test_attention_segments(benchmark, batch):
    """Shared-prompt attention of 16 pairs on 4 heads, forward and backward."""
    T = len(batch.layout.seen_until)
    q, k, v = (torch.randn(T, heads, 64, requires_grad=True) for heads in (4, 2, 2))
    benchmark(lambda: attention.attend(q, k, v, batch.layout).sum().backward())


def main() -> int:
    """All of them; of each the median, the quartiles' distance and the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "raw.json")
        options = ["-q", "-p", "no:cacheprovider", "--benchmark-only", f"--benchmark-json={path}"]
        code = pytest.main([__file__, *options, "--benchmark-columns=median,iqr,rounds"])
        if code:
            return code
        found = json.loads(path.read_text())["benchmarks"]
    pieces = {
        b["name"].removeprefix("test_"): {
            "median_us": 1e6 * b["stats"]["median"],
            "iqr_us": 1e6 * b["stats"]["iqr"],
            "rounds": b["stats"]["rounds"],
        }
        for b in found
    }
    write_result("pieces", {"results": pieces}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
