"""What several processes need to train as on GPUs, under DDP, FSDP2 or ZeRO-2, and to be compared."""

import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import accelerate.state
import pytest
import torch
import transformers
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from benchmarks.process import python_path

ZERO_2 = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
ZERO_2 |= {name: "auto" for name in ("train_batch_size", "train_micro_batch_size_per_gpu")}
ZERO_2 |= {name: "auto" for name in ("gradient_accumulation_steps", "gradient_clipping")}
WRAPPERS: dict[str, dict] = {  # TrainingArguments
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard auto_wrap", "fsdp_config": {"version": 2}},
    "zero2": {"deepspeed": ZERO_2, "use_cpu": False},
}
KINDS = {"ddp": "MULTI_CPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
SGD = dict(optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_steps=3, ddp_backend="gloo")


def as_on_gpus(wrapper: str):
    """accelerate has FSDP and DeepSpeed for GPUs alone; with gloo they compute on a CPU too."""
    if wrapper == "ddp":
        return nullcontext()
    return mock.patch.multiple(
        accelerate.state.PartialState,
        _prepare_backend=lambda *_: ("gloo", DistributedType.MULTI_GPU),
        set_device=lambda state: setattr(state, "device", torch.device("cpu")),
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Keep(transformers.TrainerCallback):
    """Keeps what a run came to: each step's gradients as the optimizer takes them, but for ZeRO's, which are
    nobody's whole; the trained weights; the logs."""

    def __init__(self):
        self.result = {"gradients": []}

    def on_pre_optimizer_step(self, *_, model, **__):
        named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
        self.result["gradients"].append({name: whole(grad) for name, grad in named})

    def on_train_end(self, args, state, control, *, model, **__):
        logs = state.log_history
        self.result["weights"] = {name: whole(p) for name, p in model.named_parameters()}
        self.result["losses"] = [log["loss"] for log in logs if "loss" in log]
        self.result["norms"] = [log["grad_norm"] for log in logs if "grad_norm" in log]
        self.result["kind"] = accelerate.state.AcceleratorState().distributed_type.value


def launch(worker: str, root: Path, wrapper: str, *cases: str) -> None:
    """Both processes of a worker, as torchrun starts them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, "-m", f"tests.integrations.{worker}", str(root), wrapper, *cases]
    env = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"} | python_path()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    said = [line for line in done.stderr.splitlines() if line.startswith("[rank")]
    assert done.returncode == 0, "\n".join(said or done.stderr.splitlines())[-4000:]


def results(root: Path, wrapper: str, case: str) -> list[dict[str, dict]]:
    """Each process's {"stock": ..., "ours": ...}."""
    return [torch.load(root / f"{wrapper}-{case}-{rank}.pt") for rank in (0, 1)]


def far(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    assert some.keys() == others.keys()
    return max((float((some[name] - others[name]).abs().max()) for name in some), default=0.0)


def same(stock: dict, ours: dict, tolerance: float = 1e-5) -> None:
    """Losses, gradient norms, each step's gradients, and the weights that SGD made of them."""
    assert ours["losses"] == pytest.approx(stock["losses"], abs=tolerance)
    assert ours["norms"] == pytest.approx(stock["norms"], abs=tolerance, rel=tolerance)
    assert len(stock["losses"]) == len(ours["gradients"]) == 3 and min(stock["norms"]) > 0.1
    for theirs, mine in zip(stock["gradients"], ours["gradients"]):
        assert far(theirs, mine) < tolerance, "gradients"
    assert far(stock["weights"], ours["weights"]) < tolerance


def hold(root: Path, wrapper: str, case: str, tolerance: float = 1e-5) -> dict:
    """Ours against stock in each process; and that both processes came to the same weights by the same
    gradients, on shared prompts. Returns the first one's run of ours."""
    both = results(root, wrapper, case)
    for one in both:
        same(one["stock"], one["ours"], tolerance)
        assert set(one["ours"]["ways"]) == {"shared"} and one["ours"]["heads"], (case, one["ours"]["ways"])
    first, second = (one["ours"] for one in both)
    assert far(first["weights"], second["weights"]) == 0
    assert all(far(*pair) == 0 for pair in zip(first["gradients"], second["gradients"]))
    assert first["kind"] == KINDS[wrapper]
    return first
