"""benchmarks/gpu_all.sh: stages and visits, with something else in the interpreter's place."""

import os
import re
import subprocess
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks import process, results
from benchmarks.gpu import parity as gpu_parity
from benchmarks.head import tune_tiles
from benchmarks.learning import parity

# in the interpreter's place: says what it was to run
FAKE = """#!/usr/bin/env bash
case "$*" in
*machine*) echo "${MACHINE:-h200}" ;;
*find_spec*) exit "${NO_DOCTOR:-0}" ;;
*pip*) exit "${NO_WHEELS:-0}" ;;
*DPOTrainer*) exit "${NO_TRL:-0}" ;;
*) echo "ran $*" ;;
esac
[ "$2" = benchmarks.gpu.head ] && exit 3
exit 0
"""
# the steps write a number, start a process, and hang deaf to every word
DEAF = """#!/usr/bin/env bash
case "$*" in *machine*) echo h200; exit ;; *gpu.steps*) ;; *) echo "ran $*"; exit ;; esac
trap '' TERM
while [ $# -gt 0 ]; do [ "$1" = --out ] && echo 1 > "$2/steps_h200_2026-01-02.json"; shift; done
sleep inf &
echo "child $!"
sleep inf
"""


OWN = ("OUT", "SEED", "MINUTES", "WHEELS", "VISIT_SECONDS")
# bash's clock stands still, so that what is left of a visit is the same on every machine
CLOCK = "unset SECONDS; SECONDS=${TAKEN:-0}\n"


@pytest.fixture
def gpu_all(tmp_path):
    """run(arguments, fake=, environment): the script, with $OUT tmp_path/out."""

    def run(*arguments, fake=FAKE, **environment):
        script = (process.ROOT / "benchmarks/gpu_all.sh").read_text()
        if int(environment.get("VISIT_SECONDS", 570)) < 60:
            script, n = re.subn(r"(?m)^LEAST_SECONDS=30\b", "LEAST_SECONDS=2", script)
            assert n == 1
        (tmp_path / "tree/benchmarks").mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree/benchmarks/gpu_all.sh").write_text(CLOCK + script)
        (tmp_path / "python").write_text(fake)
        (tmp_path / "python").chmod(0o755)
        command = ["bash", tmp_path / "tree/benchmarks/gpu_all.sh", *arguments]
        given = {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out"), **environment}
        around = {name: value for name, value in os.environ.items() if name not in OWN}
        return subprocess.run(command, env=around | given, capture_output=True, text=True)

    return run


def ran(done):
    """[(stage or module, its arguments)]"""
    return re.findall(r"(?m)^ran -m (?:benchmarks\.gpu\.|fastdpo )(\w+)(.*)", done.stdout)


def test_stages_go_on_after_a_failure(gpu_all, tmp_path):
    done = gpu_all()
    order = [stage for stage, _ in ran(done)]
    assert order == [
        *("gate", "head", "steps", "dropin", "parity", "memory"),
        *("fit", "tricks", "attention", "images", "rounds", "growth", "tuning", "learning"),
    ]
    assert all((process.ROOT / f"benchmarks/gpu/{stage}.py").exists() for stage in order)
    assert done.returncode == 1 and re.search(r"^head +failed with 3", done.stdout, re.M)
    assert re.search(r"^steps +done", done.stdout, re.M)
    assert f"--out {tmp_path}/out" in done.stdout and "--dry-run" not in done.stdout
    assert (tmp_path / "out/stages.log").read_text() == done.stdout  # the whole of it


def test_stages_by_name_and_dry(gpu_all, tmp_path):
    done = gpu_all("--dry-run", "growth", "gate", MACHINE="cpu")
    assert done.returncode == 0
    assert [stage for stage, _ in ran(done)] == ["growth", "gate"]
    assert all("--dry-run" in arguments for _, arguments in ran(done))
    assert gpu_all("tunning").returncode == 2
    nowhere = gpu_all("gate", MACHINE="cpu")
    assert nowhere.returncode == 2 and "no GPU here" in nowhere.stdout
    assert gpu_all("visit-1", "gate").returncode == 2


def test_what_a_visit_does(gpu_all, tmp_path):
    visits = {n: ran(gpu_all(f"visit-{n}")) for n in range(1, 7)}
    stages = {n: [stage for stage, _ in found] for n, found in visits.items()}
    assert stages == {
        1: ["gate", "doctor", "head"],
        2: ["steps"],
        3: ["steps", "memory"],
        4: ["tuning", "dropin", "parity"],
        5: ["images"],
        6: ["rounds"],
    }
    assert "--short Qwen2.5-0.5B" in visits[2][0][1] and "--short Qwen2.5-1.5B" in visits[3][0][1]
    minutes = [float(re.search(r"--minutes (\S+)", found[-1][1])[1]) for found in visits.values()]
    assert minutes == [8.53] * 6  # the last one has what is left: all of it, but for 8 and 50 seconds
    assert {path.name for path in (tmp_path / "out").iterdir()} == {f"visit-{n}.log" for n in visits}
    assert [stage for stage, _ in ran(gpu_all("visit-1", NO_DOCTOR="1"))] == ["gate", "head"]
    assert all("--dry-run" in arguments for _, arguments in ran(gpu_all("--dry-run", "visit-4")))


def test_a_shorter_visit_has_shorter_stages(gpu_all):
    told = lambda visit, n: [
        float(re.search(r"--minutes (\S+)", arguments)[1]) * 60 + 50
        for _, arguments in ran(gpu_all(visit, VISIT_SECONDS=str(n)))
        if "--minutes" in arguments
    ]
    assert told("visit-4", 570)[:2] == pytest.approx([120, 250], abs=1)
    shares = told("visit-4", 420)
    assert shares[:2] == pytest.approx([120 * 420 / 570, 250 * 420 / 570], abs=1)
    assert shares[2] == pytest.approx(412, abs=1)  # here the others took no time


def test_a_visit_ends_by_its_own_clock(gpu_all):
    done = gpu_all("visit-3", TAKEN="300")
    assert [re.search(r"--minutes (\S+)", arguments)[1] for _, arguments in ran(done)] == ["3.53"] * 2
    done = gpu_all("visit-3", TAKEN="540")
    assert not ran(done) and done.returncode == 1
    assert re.search(r"^steps +no time\nmemory +no time$", done.stdout, re.M), done.stdout


@pytest.mark.parametrize("lacks", ["NO_WHEELS", "NO_TRL"])
def test_a_visit_that_measures_nothing_without_the_wheels_ends_at_once(gpu_all, tmp_path, lacks):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels/trl-1.16.0-py3-none-any.whl").touch()
    given = {"WHEELS": str(tmp_path / "wheels"), lacks: "1"}
    for n in (2, 3, 4, 5, 6):
        done = gpu_all(f"visit-{n}", **given)
        assert done.returncode == 2 and not ran(done)
        assert f"visit-{n} measures nothing without" in done.stdout
        assert done.stdout == (tmp_path / f"out/visit-{n}.log").read_text()
    assert [stage for stage, _ in ran(gpu_all("visit-1", **given))] == ["gate", "doctor", "head"]
    assert ran(gpu_all("steps", **given))


def test_a_deaf_stage_is_killed_with_all_that_it_started(gpu_all, tmp_path):
    done = gpu_all("visit-3", fake=DEAF, VISIT_SECONDS="14")
    assert re.search(r"^steps +stopped after 6 s", done.stdout, re.M), done.stdout  # TERM, and KILL 5 s later
    assert re.search(r"^memory +done", done.stdout, re.M) and done.returncode == 1
    assert (tmp_path / "out/steps_h200_2026-01-02.json").exists()
    assert "memory" in (tmp_path / "out/visit-3.log").read_text()
    (child,) = re.findall(r"child (\d+)", done.stdout)
    assert not psutil.pid_exists(int(child)) or psutil.Process(int(child)).status() == psutil.STATUS_ZOMBIE


def test_a_visit_brings_what_earlier_ones_measured(gpu_all, tmp_path):
    seed = tmp_path / "seed"
    seed.mkdir()
    names = ["gate_h200_2026-11-26.json", "gate_h200_2026-11-27.json", "steps_h200_2026-11-27.json"]
    names += ["steps_h100_2026-11-27.json", "growth_h200_2026-11-27.json", "visit-1.log"]
    for name in names:
        (seed / name).write_text(name)
    gpu_all("visit-2", SEED=str(seed))
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found == {"gate_h200_2026-11-27.json", "steps_h200_2026-11-27.json", "visit-2.log"}
    (tmp_path / "out/steps_h200_2026-11-27.json").write_text("newer")
    gpu_all("visit-2", SEED=str(seed))
    assert (tmp_path / "out/steps_h200_2026-11-27.json").read_text() == "newer"


def test_no_visit_leaves_more_than_eight_files():
    """One JSON a stage and the log of the last."""
    script = (process.ROOT / "benchmarks/gpu_all.sh").read_text()
    visited, *alone = (set(found.split()) for found in re.findall(r"VISITED=\((.*?)\)", script))
    planned = {line.split()[0] for line in re.findall(r'"(\w+ \d+[^"]*)"', script)} - {"doctor"}
    assert alone == [{"gate", "images"}, {"gate", "rounds"}] and len(visited) + 1 <= 8
    assert planned == visited.union(*alone)
    assert all(re.fullmatch(r"[\w.-]+", results.result_path(stage).name) for stage in planned)


def test_what_waits_for_a_gpu_names_what_is_there():
    """GPU_TODO.md: visits and stages that the script has, tests and modules that exist."""
    text = (process.ROOT / "benchmarks/GPU_TODO.md").read_text()
    script = (process.ROOT / "benchmarks/gpu_all.sh").read_text()
    (stages,) = re.findall(r"(?m)^ALL=\((.*)\)$", script)
    asked = set(re.findall(r"gpu_all\.sh (?:--dry-run )?([\w-]+)", text)) - {"STAGE", "visit-N"}
    assert asked <= {*stages.split(), *(f"visit-{n}" for n in range(1, 7))}
    files = {path.name: path.read_text() for path in (process.ROOT / "tests").rglob("*.py")}
    for name in re.findall(r"`(?:tests/(?:kernels/)?)?(test_\w+)(?:\.py|\*)?", text):
        assert f"{name}.py" in files or any(f"def {name}" in source for source in files.values()), name
    by_hand = text.partition("## By hand")[2]  # there is no fastdpo, pytest or python on that machine's path
    assert re.findall(r"`(?:fastdpo|pytest|python) .*?`", by_hand) == []
    for module in re.findall(r"-m (benchmarks(?:\.\w+)+)", text):
        place = process.ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module


# ---- the stages of the fourth visit are written as they go


def test_tuning_is_written_after_every_tile(monkeypatch):
    kept = []
    monkeypatch.setattr(tune_tiles, "passes", lambda *_: (1, 2, 3))
    monkeypatch.setattr(tune_tiles, "measured", lambda spec, dry: float(spec))
    monkeypatch.setattr(tune_tiles, "launch", type("Launch", (), {}))
    record = tune_tiles.tune(8, 16, 32, 1.0, device="cpu", capability=(8, 0), keep=kept.append)
    assert kept == [record] and record["tiles"][0]["ms"]["dZ"] == 3.0 and record["no_time_for"] > 0


@pytest.mark.parametrize("unusable", [False, True])
def test_a_tile_that_fails(monkeypatch, unusable):
    """The others go on, but not on a GPU that takes nothing more from the process."""
    asked = []

    def passes(tile, *_):
        asked.append(tile)
        if len(asked) == 1:
            raise RuntimeError("an illegal memory access")
        return 1, 2, 3

    monkeypatch.setattr(tune_tiles, "passes", passes)
    monkeypatch.setattr(tune_tiles, "measured", lambda spec, dry: float(spec))
    monkeypatch.setattr(tune_tiles, "launch", type("Launch", (), {}))
    monkeypatch.setattr(tune_tiles, "gpu_unusable", lambda: unusable)
    record = tune_tiles.tune(8, 16, 32, 1.0, device="cpu", capability=(8, 0))
    assert len(record["failed"]) == 1 and len(record["tiles"]) == (0 if unusable else 1)
    assert len(asked) == (1 if unusable else 2)


def test_parity_is_written_after_every_order(monkeypatch, tmp_path):
    """Killed in its third comparison, it has said all of the first two."""
    compared = []

    def compare(setting, seed):
        compared.append(seed)
        if len(compared) == 3:
            raise KeyboardInterrupt
        keys = dict(losses=[0.7, 0.6], trl_losses=[0.7, 0.6], first_margin=0.0, trl_first_margin=0.0)
        return keys | dict(largest_difference=0.0)

    setting = parity.Setting(torch.nn.Linear(1, 1), None, torch.float32, 1e-4, 2)
    setting.model.device = torch.device("cpu")
    monkeypatch.setattr(parity, "compare", compare)
    monkeypatch.setattr(gpu_parity, "small_setting", lambda *_: setting)
    monkeypatch.setattr(gpu_parity, "demo_start", lambda folder: (None, None))
    monkeypatch.setattr("sys.argv", ["gpu_parity", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpu_parity.main()
    found = results.result_of_today("parity", tmp_path)["results"]["fp32"]
    assert list(found["seeds"]) == ["0", "1"] and found["no_time_for"] == ["2"]


def test_parity_leaves_time_for_two_orders_in_bf16(monkeypatch, tmp_path):
    until = []
    monkeypatch.setattr(gpu_parity, "time", SimpleNamespace(monotonic=lambda: 1000.0))

    def measure(setting, orders, end, keep):
        until.append(end - 1000.0)
        return {"same": True}

    monkeypatch.setattr(gpu_parity, "measure", measure)
    monkeypatch.setattr(gpu_parity, "small_setting", lambda *_: None)
    monkeypatch.setattr(gpu_parity, "demo_start", lambda folder: (None, None))
    monkeypatch.setattr(gpu_parity, "build", lambda *_: None)
    monkeypatch.setattr(gpu_parity, "write", lambda *_: 0)
    monkeypatch.setattr("sys.argv", ["gpu_parity", "--out", str(tmp_path), "--minutes", "4"])
    gpu_parity.main()
    assert until == [60.0, 240.0]
