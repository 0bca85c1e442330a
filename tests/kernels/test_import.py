"""fastdpo_kernels stands on torch alone."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("transformers", "triton", "numpy", "datasets", "peft"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
import torch
import fastdpo_kernels as k

weight = torch.randn(5, 3, requires_grad=True)
k.linear_logp(torch.randn(2, 3), weight, torch.tensor([1, 4])).sum().backward()
assert weight.grad.shape == (5, 3)
names = {"MEMORY_BUDGET", "DPOStats", "Plan", "avoid", "backend", "default_budget", "linear_dpo"}
names |= {"linear_logp", "plan", "reference", "FusedLinearCrossEntropyLoss", "LinearCrossEntropy"}
assert set(k.__all__) == names
k.linear_dpo(torch.randn(2, 3), weight, torch.tensor([1, 4]), torch.arange(3), torch.tensor([[0, 1]]))
assert k.backend("cpu", torch.bfloat16) == "torch"
assert callable(k.plan) and callable(k.linear_logp) and callable(k.reference.linear_dpo)
"""


def test_needs_neither_transformers_nor_triton():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_is_no_package_named_kernels():
    # it would shadow Hugging Face's `kernels`, which transformers imports
    assert not (ROOT / "kernels" / "__init__.py").exists()
