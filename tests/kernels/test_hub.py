"""The package in the layout of Hugging Face's `kernels`: loaded from a folder, beside the installed one."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# as kernels.get_local_kernel imports a variant: __init__.py under the name of its id
LIKE_KERNELS = """
import importlib.util, json, sys
from pathlib import Path

path = Path(sys.argv[1]) / "build" / "torch-cpu"
name = json.loads((path / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
loaded = importlib.util.module_from_spec(spec)
sys.modules[name] = loaded
spec.loader.exec_module(loaded)
"""
BY_KERNELS = """
import json, sys
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Digest, Metadata

path = Path(sys.argv[1]) / "build"
loaded = get_local_kernel(path, backend="cpu")
metadata = Metadata.read_from_file(path / "torch-cpu" / "metadata.json")
metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, path / "torch-cpu"))
name = metadata.id
"""
WORKS = """
import fastdpo_kernels, torch

assert loaded.__name__ == name and "fastdpo_kernels" not in loaded.__file__
hidden, weight, target = torch.randn(2, 3), torch.randn(5, 3), torch.tensor([1, 4])

def gradient(function):
    leaf = weight.clone().requires_grad_()
    function(hidden, leaf, target).sum().backward()
    return leaf.grad

expected = gradient(fastdpo_kernels.linear_logp)
compiled = torch.compile(loaded.linear_logp, fullgraph=True, backend="aot_eager")
for function in (loaded.linear_logp, compiled):
    assert torch.equal(gradient(function), expected)
assert hasattr(torch.ops, name) and hasattr(getattr(torch.ops, name), "linear_logp")
assert torch.ops.fastdpo.linear_logp is not getattr(torch.ops, name).linear_logp
"""


def run(script: str, *arguments) -> None:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("hub")
    done = subprocess.run(
        [sys.executable, ROOT / "kernels" / "hub.py", out], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        str(out / "build" / f"torch-{backend}") for backend in ("cpu", "cuda")
    ]
    return out


def test_a_loader_by_path_gets_operators_of_their_own(folder):
    run(LIKE_KERNELS + WORKS, folder)


@pytest.mark.skipif(
    importlib.util.find_spec("kernels.load") is None, reason="Hugging Face's `kernels` is not installed"
)
def test_kernels_loads_it(folder):
    run(BY_KERNELS + WORKS, folder)


def test_every_source_is_there_and_only_the_namespace_differs(folder):
    package = ROOT / "kernels" / "fastdpo_kernels"
    for variant in (folder / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"]["type"] == variant.name.removeprefix("torch-")
        there = {path.name for path in variant.iterdir()} - {"metadata.json"}
        assert there == {path.name for path in package.glob("*.py")} == set(metadata["digest"]["files"])
        differ = {name for name in there if (variant / name).read_text() != (package / name).read_text()}
        assert differ == {"_ops.py"}
