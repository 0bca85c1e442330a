"""What the project says of itself in several places is the same in all of them."""

import hashlib
import re
import subprocess
import tomllib

import yaml

from benchmarks.process import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ADDRESS = PROJECT["urls"]["Repository"]
APACHE = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # apache.org's LICENSE-2.0.txt


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_title_and_licence():
    cited = yaml.safe_load(read("CITATION.cff"))
    newest, *_ = re.findall(r"(?m)^## (\S+) \((?:unreleased|\d{4}-\d\d-\d\d)\)$", read("CHANGELOG.md"))
    assert cited["version"] == PROJECT["version"] == newest
    assert cited["title"] == f"{PROJECT['name']}: {PROJECT['description']}"
    assert cited["authors"] == PROJECT["authors"] and cited["repository-code"] == ADDRESS
    assert cited["license"] == PROJECT["license"] == "Apache-2.0"
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE


def test_one_address():
    """Wherever the project is named, and its files are there."""
    named = rf"https?://github\.com/[A-Za-z0-9_.-]+/{PROJECT['name']}\b[^]) \">]*"
    command = ["git", "grep", "-hoIE", named]
    links = set(subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split())
    assert links > set(PROJECT["urls"].values())
    for link in links:
        assert f"{link}/".startswith(f"{ADDRESS}/"), link
        file = re.search(r"/(?:blob|tree)/main/([^#]+)", link)
        assert not file or (ROOT / file[1]).exists(), link


def test_the_readme_is_a_page():
    assert len(read("README.md").splitlines()) <= 150


def test_a_bug_report_has_what_the_doctor_says():
    fields = yaml.safe_load(read(".github/ISSUE_TEMPLATE/bug.yml"))["body"]
    asked = [f for f in fields if "fastdpo doctor" in f["attributes"]["label"]]
    assert [f["validations"]["required"] for f in asked] == [True]


def test_the_workflow_is_make_test_on_the_pythons_that_are_promised():
    job = yaml.safe_load(read(".github/workflows/test.yml"))["jobs"]["test"]
    assert job["steps"][-1]["run"] == "make test"
    promised = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d", c)]
    assert job["strategy"]["matrix"]["python"] == promised
    assert PROJECT["requires-python"] == f">={promised[0]}"


def test_hooks_are_what_make_lint_runs():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    lint = re.search(r"(?m)^lint:.*\n((?:\t.*\n)+)", read("Makefile"))[1].replace("$(BIN)", ".venv/bin")
    ours = [hook["entry"] for hook in hooks if hook["entry"].startswith(".venv/")]
    assert len(ours) == 3 and all(entry in lint for entry in ours)


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
