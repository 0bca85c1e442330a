"""The rehearsal of a visit to the GPU machine, and the wheels that are carried there: their scripts, with a
stand-in for pip's network and for the parts."""

import base64
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import zipfile

import pytest

from benchmarks.process import ROOT

PYTHON = f"""#!/usr/bin/env bash
# in Python's place: what it would fetch lies in $SHELF, and what it would run is told
case "$*" in
"-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip download "*)
    asked="${{@: -1}}"
    cp "$SHELF/${{asked%%[=<>]*}}"-*.whl "${{@: -2:1}}" ;;
"-m pip "*) echo "pip ${{*:3}}" ;;
"-m "*) echo "ran $* with $PYTHONPATH"; [[ "$*" != *"$FAILS"* ]] ;;
*) exec {sys.executable} "$@" ;;
esac
"""
OTHERS = ["trl", "datasets", "dill", "multiprocess", "xxhash", "liger-kernel", "cut-cross-entropy"]
OTHERS += ["cyclopts", "attrs", "docstring_parser", "rich-rst", "gguf", "vaderSentiment"]
LIBRARIES = ["cpu", "cuda118", "cuda130", "cuda132", "rocm713", "xpu2025"]


def run(script, tmp_path, *arguments, **environment):
    fake = tmp_path / "python"
    fake.write_text(PYTHON)
    fake.chmod(0o755)
    environment = {"SHELF": str(tmp_path / "shelf"), "FAILS": "nothing", "PYTHON": str(fake)} | environment
    command = ["bash", ROOT / "benchmarks" / script, *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)


def digest(content: bytes) -> str:
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")


@pytest.fixture
def shelf(tmp_path):
    """A wheel of bitsandbytes with small libraries, its RECORD as pip makes it."""
    info = "bitsandbytes-9.9.dist-info"
    files = {f"bitsandbytes/libbitsandbytes_{name}.so": 999 * name.encode() for name in LIBRARIES}
    files |= {"bitsandbytes/__init__.py": b"", "bitsandbytes/nn.so": b"not a library for a device"}
    files[f"{info}/METADATA"] = b"Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 9.9\n"
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: py3-none-any\n"
    record = "".join(f"{name},{digest(content)},{len(content)}\n" for name, content in files.items())
    (tmp_path / "shelf").mkdir()
    with zipfile.ZipFile(tmp_path / "shelf" / "bitsandbytes-9.9-py3-none-any.whl", "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
        wheel.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    for name in OTHERS:
        (tmp_path / "shelf" / f"{name}-9.9-py3-none-any.whl").touch()


def test_bitsandbytes_is_carried_with_one_library(tmp_path, shelf):
    done = run("gpu/fetch_peers.sh", tmp_path, tmp_path / "wheels", FOR_PYTHON="3.11")
    assert done.returncode == 0, done.stderr
    assert "4 libraries for other devices taken out" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("no wheel of flash-attn for Python 3.11")
    (path,) = (tmp_path / "wheels").glob("bitsandbytes-*")
    with zipfile.ZipFile(path) as wheel:
        names = set(wheel.namelist())
        record = list(csv.reader(io.StringIO(wheel.read("bitsandbytes-9.9.dist-info/RECORD").decode())))
        assert {name for name, *_ in record} == names
        assert all(not hashed or digest(wheel.read(name)) == hashed for name, hashed, _ in record)
    left = {name for name in names if "libbitsandbytes" in name}
    assert left == {f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda130")}
    assert "bitsandbytes/nn.so" in names
    install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", tmp_path / "site", path]
    done = subprocess.run([sys.executable, *install], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    installed = {p.name for p in (tmp_path / "site" / "bitsandbytes").glob("*.so")}
    assert installed == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so", "nn.so"}


def test_a_library_that_is_not_in_the_wheel_is_an_error(tmp_path, shelf):
    done = run("gpu/fetch_peers.sh", tmp_path, tmp_path / "wheels", CUDA="150")
    assert done.returncode == 1 and "no library for CUDA=150" in done.stderr and "cuda132" in done.stderr
    (path,) = (tmp_path / "wheels").glob("bitsandbytes-*")
    assert path.stat().st_size == (tmp_path / "shelf" / path.name).stat().st_size


@pytest.mark.parametrize("name", ["bitsandbytes", *OTHERS])
def test_what_cannot_be_fetched_is_red(tmp_path, shelf, name):
    """flash-attn may be absent. The rehearsal makes its environment anew then, and keeps no half of one."""
    (tmp_path / "shelf" / f"{name}-9.9-py3-none-any.whl").unlink()
    done = run("gpu/fetch_peers.sh", tmp_path, tmp_path / "wheels")
    assert done.returncode == 1 and f"no wheel for Python 3.12 on manylinux: {name}" in done.stderr
    done = rehearse(tmp_path)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "red: environment"
    assert not (tmp_path / "environment").exists()


def test_old_wheels_do_not_stay(tmp_path, shelf):
    (tmp_path / "wheels").mkdir()
    for name in ("trl-0.1-py3-none-any.whl", "notes.txt"):
        (tmp_path / "wheels" / name).touch()
    assert run("gpu/fetch_peers.sh", tmp_path, tmp_path / "wheels").returncode == 0
    found = {path.name for path in (tmp_path / "wheels").iterdir()}
    names = {f"{name}-9.9-py3-none-any.whl" for name in ("bitsandbytes", *OTHERS)}
    assert found == names | {"notes.txt"}


def rehearse(tmp_path, **environment):
    return run("gpu/rehearsal.sh", tmp_path, REHEARSAL=str(tmp_path / "environment"), **environment)


def test_the_rehearsal_makes_its_environment_once(tmp_path, shelf):
    done = rehearse(tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[-1].startswith("green")
    assert [line.split()[0] for line in lines[-5:-1]] == ["environment", "tests", "compile", "dry_run"]
    assert any(line.startswith("pip install") and "benchmarks/gpu/machine.txt" in line for line in lines)
    (pytest_run,) = (line for line in lines if line.startswith("ran -m pytest"))
    assert pytest_run.endswith(f"{ROOT}:{ROOT / 'kernels'}:{tmp_path / 'environment' / 'site'}")
    assert any(line.startswith("ran -m benchmarks.head.aot") for line in lines)
    assert sum(line.startswith("ran -m benchmarks.gpu.") and "--dry-run" in line for line in lines) > 5
    again = rehearse(tmp_path)
    assert again.returncode == 0 and not any("machine.txt" in line for line in again.stdout.splitlines())
    (tmp_path / "environment" / "made_of").write_text("other versions")
    assert "machine.txt" in rehearse(tmp_path).stdout


@pytest.mark.parametrize(
    ("part", "fails"), [("tests", "pytest"), ("compile", "aot"), ("dry_run", "gpu.growth")]
)
def test_what_is_red_is_named_and_the_rest_is_run(tmp_path, shelf, part, fails):
    done = rehearse(tmp_path, FAILS=fails)
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == f"red: {part}"
    assert "ran -m benchmarks.gpu.tuning" in done.stdout and "ran -m benchmarks.head.aot" in done.stdout


def test_a_python_that_does_not_fit_is_said(tmp_path, shelf):
    old = tmp_path / "old"
    old.write_text("#!/bin/sh\necho 3.9\n")
    old.chmod(0o755)
    done = run("gpu/rehearsal.sh", tmp_path, PYTHON=str(old), REHEARSAL=str(tmp_path / "environment"))
    assert done.returncode == 1 and done.stdout.splitlines()[-1] == "red: environment"
    assert "Python 3.9" in done.stdout and "make gpu-rehearsal PYTHON=python3.12" in done.stdout
    assert not (tmp_path / "environment").exists() and "== tests" not in done.stdout


def test_the_oldest_torch_that_is_promised_is_rehearsed():
    promised = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    pinned = re.search(r"^torch==([\d.]+)", (ROOT / "benchmarks/gpu/machine.txt").read_text(), re.M)[1]
    assert pinned == f"{promised}.0"
