"""The Dockerfile: what can be seen without docker, and where docker is, the build for CPUs."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from benchmarks.process import ROOT
from tests.test_wheel import PROJECT, run, tracked

TEXT = (ROOT / "Dockerfile").read_text()
LINES = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
STEPS = [(word, rest) for word, _, rest in (line.partition(" ") for line in LINES)]
COPIED = [source for word, rest in STEPS if word == "COPY" for source in rest.split()[:-1]]
CPU = re.search(r"--build-arg (TORCH_INDEX=\S+)", TEXT)[1]


def test_its_context_is_what_it_copies():
    lines = (ROOT / ".dockerignore").read_text().split("\n")
    assert lines[1] == "*" and sorted(line[1:] for line in lines if line.startswith("!")) == sorted(COPIED)
    assert all((ROOT / name).exists() for name in COPIED)


def test_what_it_copies_is_all_that_the_build_needs(tmp_path):
    """Its own pip command, without the network: the package and every file of it."""
    pytest.importorskip("setuptools", "77", reason="the build needs setuptools>=77")
    for name in tracked():
        if any(name == source or name.startswith(f"{source}/") for source in COPIED):
            (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "src" / name)
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path)
    run(sys.executable, "-m", "pip", "wheel", *options, tmp_path / "src", cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    packages = ("fastdpo/", "kernels/fastdpo_kernels/")
    assert names == {name.removeprefix("kernels/") for name in tracked() if name.startswith(packages)}


def test_what_it_names_is_there():
    """The argument, a Python that is promised, extras, the command."""
    steps = dict(STEPS)
    assert steps["ARG"].startswith(CPU.partition("=")[0] + "=") and "$TORCH_INDEX" in TEXT
    python = re.fullmatch(r"python:(3\.\d+)-slim", steps["FROM"])[1]
    assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]
    assert set(re.search(r"/src\[(.*?)\]", TEXT)[1].split(",")) <= PROJECT["optional-dependencies"].keys()
    assert set(json.loads(steps["ENTRYPOINT"])) == PROJECT["scripts"].keys() and steps["USER"] != "root"


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_build_for_cpus_trains(tmp_path):
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("needs docker, with a daemon that runs")
    run("docker", "build", "--tag", "fastdpo-test", "--build-arg", CPU, ".", cwd=ROOT)
    said = run("docker", "run", "--rm", "fastdpo-test", "--version", cwd=tmp_path)
    assert said == f"fastdpo {PROJECT['version']}\n"
    tmp_path.chmod(0o777)
    demo = ("docker", "run", "--rm", "--volume", f"{tmp_path}:/work", "fastdpo-test", "demo")
    assert "the report: " in run(*demo, cwd=tmp_path)
    assert (tmp_path / "runs/demo/dpo/report.html").is_file()
