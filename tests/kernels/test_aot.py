"""Every kernel compiled for chips that are not here: nothing spills, and the GEMMs are on tensor cores.

`python -m benchmarks.aot` compiles all of them (4 minutes) and commits the table; here it is held
against the kernels' sources, and the kernels that matter most are compiled again. In a process of its
own: other tests may have set the interpreter.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
AGAIN = {(8, 0): ["E"], (9, 0): ["E", "dZ", "sums only", "listed rows, E", "settle"], (10, 0): ["E"]}

SCRIPT = """
import json, sys
import torch
from benchmarks import aot
from fastdpo_kernels import tiles

out = []
for capability, names, changes in json.loads(sys.argv[1]):
    capability = tuple(capability)
    tile = tiles.TILES[capability, torch.bfloat16]._replace(**changes)
    specs = aot.launches(tile, torch.bfloat16)
    rows = {name: aot.resources(specs[name], capability) for name in names}
    out.append([aot.faults(row, capability, name) for name, row in rows.items()])
print(json.dumps({"sources": aot.of_sources(), "out": out}))
"""


def compiled(*questions):
    """Faults by question (capability, names, changes to the tile) and name; and the sources' hash."""
    command = [sys.executable, "-c", SCRIPT, json.dumps(questions)]
    environment = {"TRITON_INTERPRET": "0", "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_compile_without_spills():
    answer = compiled(*([capability, names, {}] for capability, names in AGAIN.items()))
    assert answer["out"] == [[[] for _ in names] for names in AGAIN.values()]


def test_a_tile_too_large_is_a_fault():
    answer = compiled([(9, 0), ["dZ"], {"stages": 4}], [(9, 0), ["sums only"], {"columns": 256}])
    (shared,), (spilled,) = answer["out"]
    assert any("shared" in fault for fault in shared)
    assert any("stack" in fault for fault in spilled)


def test_the_committed_table_is_of_these_kernels():
    tables = sorted((ROOT / "benchmarks" / "results").glob("aot_triton_*.json"))
    assert tables
    sources = compiled()["sources"]
    for path in tables:
        table = json.loads(path.read_text())
        assert table["sources"] == sources, "run python -m benchmarks.aot again"
        assert len(table["kernels"]) == 3
        for rows in table["kernels"].values():
            assert not any(row["stack"] or row["local"] or row["spills"] for row in rows.values())
