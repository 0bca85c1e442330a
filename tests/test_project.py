"""What the project says of itself in several places is the same in all of them."""

import hashlib
import re
import subprocess
import tomllib

import yaml

import fastdpo
from benchmarks.process import ROOT
from fastdpo.cli import app

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Repository"]
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # apache.org's LICENSE-2.0.txt


def from_yaml(name):
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_version_has_an_entry_in_the_changelog():
    headings = re.findall(r"(?m)^## \[(.+)\] - (.+)$", (ROOT / "CHANGELOG.md").read_text())
    assert headings[0][0] == PROJECT["version"]
    assert all(re.fullmatch(r"Unreleased|\d{4}-\d\d-\d\d", date) for _, date in headings)


def test_the_package_says_the_same_version():
    assert fastdpo.__version__ == PROJECT["version"]


def test_a_citation_is_of_this_version():
    cited = from_yaml("CITATION.cff")
    assert cited["version"] == PROJECT["version"] and cited["license"] == PROJECT["license"]
    assert cited["title"] == f"{PROJECT['name']}: {PROJECT['description']}"
    assert cited["authors"] == PROJECT["authors"]


def test_the_licence_is_as_published():
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE


def test_one_address():
    """pyproject.toml's, wherever the project is named; and a file that it is followed by is there."""
    grep = ["git", "grep", "-hoIE", rf"https?://github\.com/[A-Za-z0-9_.-]+/{PROJECT['name']}\b[^]) \">`]*"]
    found = set(subprocess.run(grep, cwd=ROOT, capture_output=True, text=True).stdout.split())
    assert set(PROJECT["urls"].values()) < found
    for link in found:
        assert (link + "/").startswith(ADDRESS + "/"), link
        path = re.search(r"/(?:blob|tree)/main/([^#]+)", link)
        assert path is None or (ROOT / path[1]).exists(), link


def test_the_workflow_calls_make_test_with_every_python_that_is_promised():
    job = from_yaml(".github/workflows/test.yml")["jobs"]["test"]
    assert {"run": "make test"} in job["steps"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert job["strategy"]["matrix"]["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_a_bug_report_brings_what_the_doctor_says():
    fields = {field["id"]: field for field in from_yaml(".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert all(field["validations"]["required"] for field in fields.values())
    assert "`fastdpo doctor`" in fields["doctor"]["attributes"]["label"]
    assert "text for a bug report" in app["doctor"].help


def test_hooks_are_programs_that_make_venv_installs():
    (local,) = from_yaml(".pre-commit-config.yaml")["repos"]
    programs = {hook["entry"].split()[0] for hook in local["hooks"]}
    installed = {re.match(r"[\w-]+", need)[0] for need in PROJECT["optional-dependencies"]["test"]}
    assert programs - {"git"} == {f".venv/bin/{name}" for name in installed & {"ruff", "mypy"}}
    assert {hook["language"] for hook in local["hooks"]} == {"system"}


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
