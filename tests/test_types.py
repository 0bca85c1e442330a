"""What a user's type checker is told: full signatures, and so a wrong call before it runs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastdpo

ROOT = Path(__file__).resolve().parents[1]
# as strict as `mypy --strict`, but said in the program, so that one cache serves `make lint` and this test
PROGRAM = """\
# mypy: disallow-any-generics, disallow-untyped-calls, disallow-untyped-defs, warn-return-any, strict-equality
from pathlib import Path

import torch
from fastdpo_kernels import Plan, backend, linear_dpo, linear_logp, plan, reference
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer

import fastdpo
from fastdpo import Config, Limits, Policy, ResponseLogps, load_groups, pack
from fastdpo.integrations.liger import FusedLinearDPOLoss
from fastdpo.integrations.trl import FastDPOTrainer


def kernels(h: Tensor, w: Tensor, target: Tensor, cu: Tensor, pairs: Tensor) -> Tensor:
    how: Plan = plan(8, 32, 16, dtype=h.dtype, train_weight=True, backend=backend("cpu", h.dtype))
    logp, stats = linear_logp(h, w, target, stats=("entropy",))
    loss, found = linear_dpo(h, w, target, cu, pairs, loss=lambda margin: margin.exp())
    truth, _ = reference.linear_dpo(h, w, target, cu, pairs, scale=2.0)
    both = linear_logp(h, w, target, softcap=30.0).sum() + logp.sum()
    return both + stats["entropy"].sum() + loss + truth + found.margin.sum() / how.flops


def rows(model: torch.nn.Module) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained("model")
    groups, report = load_groups("a.jsonl", tokenizer, Limits(64), strict=True, console=Console())
    policy = Policy(model, torch.float32)
    fastdpo.prepare(policy, groups, Console())
    batch = pack(fastdpo.split_step(groups, 64)[0]).to("cpu")
    return ResponseLogps.of(batch, policy.token_logp(batch)).log_ratio


def run() -> Path:
    version: str = fastdpo.__version__
    fastdpo.train(model="model", data=Path("a.jsonl"), beta=0.2, output_dir=version)
    fastdpo.train({"model": "model", "data": "a.jsonl"}, resume=True)
    fastdpo.fill_reference("config.yaml", Console())
    return fastdpo.train(Config(model="model", data="a.jsonl", objective={"sigmoid": 1.0}))


def wrong(h: Tensor) -> None:
    linear_logp(h, h)  # wrong
    linear_logp(h, h, h, softcap="30")  # wrong
    linear_dpo(h, h, h, h, [(0, 1)])  # wrong
    reference.linear_dpo(h, h, h, h, h, softcaps=2.0)  # wrong
    plan(8, 32, 16, dtype="bf16", train_weight=True)  # wrong
    fastdpo.train(["config.yaml"])  # wrong
    Config(model="model", learning_rat=1e-6)  # wrong
    Policy("model", torch.float32)  # wrong
    load_groups("a.jsonl", "model", Limits(64), strict=True, console=Console())  # wrong
    pack("a.jsonl")  # wrong
    fastdpo.Trainer  # wrong
    FusedLinearDPOLoss(loss="sigmoid")  # wrong
    FastDPOTrainer(reference_cache=1)  # wrong
"""


def test_right_calls_pass_and_wrong_ones_are_refused(tmp_path):
    pytest.importorskip("mypy")  # not on a machine that only runs kernels
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--hide-error-context", str(program)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    errors = [line.split(":") for line in done.stdout.splitlines() if ": error: " in line]
    refused = {int(number) for _, number, *_ in errors}
    assert refused == {i for i, line in enumerate(PROGRAM.splitlines(), 1) if "# wrong" in line}, done.stdout


def test_the_top_names_the_same_for_type_checkers_as_when_it_runs():
    module = ast.parse(Path(fastdpo.__file__).read_text())
    (block,) = (node for node in module.body if isinstance(node, ast.If))
    told = {alias.name: node.module for node in block.body for alias in node.names}
    assert told == {name: f"fastdpo.{home}" for name, home in fastdpo._HOME.items()}
    assert set(fastdpo.__all__) == told.keys()
