"""The wheel: what it holds, what it says of itself, and that it runs where nothing else of the tree is."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from benchmarks.process import ROOT

pytest.importorskip("setuptools", "77", reason="the build needs setuptools>=77: pip install 'setuptools>=77'")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd):
    """What a command prints; it has to succeed."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def tracked() -> list[str]:
    return run("git", "ls-files", cwd=ROOT).splitlines()


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The tracked files as they are now, in a repository of their own."""
    folder = tmp_path_factory.mktemp("wheel") / "tree"
    for name in tracked():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    someone = (
        "-c",
        "user.name=someone",
        "-c",
        "user.email=someone@example.org",
        "-c",
        "commit.gpgsign=false",
    )
    for words in (
        ("init", "--quiet"),
        ("add", "--all", "--force"),
        (*someone, "commit", "--quiet", "-m", "all"),
    ):
        run("git", *words, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tree):
    """Built as by `pip install git+https://...`: of a clone."""
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tree.parent)
    run(sys.executable, "-m", "pip", "wheel", *options, f"git+file://{tree}", cwd=tree.parent)
    (path,) = tree.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of a new environment: the wheel, and the packages of this one but for our own."""
    home = tmp_path_factory.mktemp("environment") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    pip = (sys.executable, "-m", "pip", "--quiet", "--python", home / "bin/python")
    new = ("--no-deps", "--no-index", "--ignore-installed")  # an egg-info that PYTHONPATH leads to is not it
    run(*pip, "install", *new, wheel, cwd=home.parent)
    others = [path for path in sys.path if path and not any(Path(path).glob("fastdpo*/__init__.py"))]
    site = sysconfig.get_path("purelib", vars={"base": str(home)})
    Path(site, "others.pth").write_text("\n".join(others))  # whose own .pth files are not read then
    return home / "bin"


def test_it_holds_every_file_of_the_packages_and_nothing_else(wheel):
    """A package that setup.cfg forgets, or a file that is no .py and has no package-data, is missing here."""
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if name.startswith(f"fastdpo-{PROJECT['version']}.dist-info/")}
    packages = ("fastdpo/", "kernels/fastdpo_kernels/")
    ours = [name.removeprefix("kernels/") for name in tracked() if name.startswith(packages)]
    assert names - about == set(ours)
    assert f"fastdpo-{PROJECT['version']}.dist-info/licenses/LICENSE" in about


def test_the_sdist_has_what_it_is_built_of(wheel, tree):
    """It has the packages and what builds them; tests need the rest of the tree, so none of them."""
    build = "import setuptools.build_meta as b; print(b.build_sdist('..'))"
    archive = tree.parent / run(sys.executable, "-c", build, cwd=tree).splitlines()[-1]
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    packages = ("fastdpo/", "kernels/fastdpo_kernels/")
    needed = {name for name in tracked() if name.startswith(packages)}
    assert names >= needed | {"pyproject.toml", "setup.cfg", "README.md", "LICENSE"}
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_it_says_whose_it_is(wheel):
    with zipfile.ZipFile(wheel) as files:
        about = message_from_bytes(files.read(f"fastdpo-{PROJECT['version']}.dist-info/METADATA"))
    assert about["Version"] == PROJECT["version"] and about["Summary"] == PROJECT["description"]
    assert about["License-Expression"] == "Apache-2.0" and about["License-File"] == "LICENSE"
    urls = dict(line.split(", ") for line in about.get_all("Project-URL"))
    assert urls == PROJECT["urls"]
    assert about["Description-Content-Type"] == "text/markdown"
    assert about.get_payload(decode=True).decode().strip() == (ROOT / "README.md").read_text().strip()


def test_its_demo_learns(installed, tmp_path):
    """What a newcomer runs first learns what it says it learns, outside of the tree."""
    python = (installed / "python", "-I")  # no PYTHONPATH
    where = "import fastdpo, fastdpo_kernels; print(fastdpo.__file__, fastdpo_kernels.__file__, sep='\\n')"
    for path in run(*python, "-c", where, cwd=tmp_path).splitlines():
        assert Path(path).is_relative_to(installed.parent)
    said = run(*python, installed / "fastdpo", "--version", cwd=tmp_path)
    assert said == f"fastdpo {PROJECT['version']}\n"
    said = run(*python, installed / "fastdpo", "demo", cwd=tmp_path)
    helpful, likelier = re.findall(r"(\d+)%\s+->\s+(\d+)%", said)
    assert int(helpful[0]) < 25 and int(helpful[1]) > 75
    assert int(likelier[0]) < 25 and int(likelier[1]) > 95
    report = (tmp_path / "runs/demo/dpo/report.html").read_text(encoding="utf-8")
    assert "5 of 5 completions changed." in report and "user: How do I make curry?" in report
    assert str(tmp_path) not in report
    assert "<svg" in report and (tmp_path / "runs/demo/dpo/model/README.md").is_file()
