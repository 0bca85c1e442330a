"""What the project says of itself in several places is the same in all of them."""

import re
import tomllib

import yaml

from benchmarks.process import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_version_licence_and_address():
    cited = yaml.safe_load(read("CITATION.cff"))
    assert (
        str(cited["version"]) == PROJECT["version"] == re.findall(r"(?m)^## (\S+)", read("CHANGELOG.md"))[0]
    )
    assert cited["title"] == f"{PROJECT['name']}: {PROJECT['description']}"
    assert cited["license"] == PROJECT["license"] == "Apache-2.0" and "Apache License" in read("LICENSE")
    address = PROJECT["urls"]["Repository"]
    assert cited["repository-code"] == address
    links = [
        link["url"] for link in yaml.safe_load(read(".github/ISSUE_TEMPLATE/config.yml"))["contact_links"]
    ]
    for link in (*links, *PROJECT["urls"].values()):
        assert link.startswith(address), link
        file = re.fullmatch(r"/(?:blob|tree)/main/(.+)", link.removeprefix(address))
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


def test_hooks_are_what_make_lint_runs():
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    lint = re.search(r"(?m)^lint:.*\n((?:\t.*\n)+)", read("Makefile"))[1].replace("$(BIN)", ".venv/bin")
    ours = [hook["entry"] for hook in hooks if hook["entry"].startswith(".venv/")]
    assert len(ours) == 3 and all(entry in lint for entry in ours)
