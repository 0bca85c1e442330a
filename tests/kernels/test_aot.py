"""Every kernel compiled for chips that are not here: nothing spills, and the GEMMs keep the tensor cores
busy.

`python -m benchmarks.head.aot` compiles all of them (4 minutes) and commits the table; here it is held
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
STATISTICS = "E, statistics, softcap"
AGAIN = {chip: ["E"] for chip in ((8, 0), (8, 9), (10, 0), (12, 0))}  # 8.6 is 8.9's code, 10.3 is 10.0's
AGAIN[9, 0] = ["E", "E, bias, softcap", STATISTICS, "dZ", "sums only", "rows out of range, E", "start_rows"]

SCRIPT = """
import json, sys
import torch
from benchmarks.head import aot
from fastdpo_kernels import tiles

out = []
for capability, names, changes in json.loads(sys.argv[1]):
    capability = tuple(capability)
    tile = tiles.TILES[capability, torch.bfloat16]._replace(**changes)
    specs = aot.launches(tile, torch.bfloat16)
    rows = {name: aot.resources(specs[name], capability) for name in names}
    out.append([aot.faults(row, capability, name) for name, row in rows.items()])
    out[-1].append(aot.faults_beside(rows, capability))
print(json.dumps(out))
"""

WARPS = """
import json
from dataclasses import replace
import torch
from benchmarks.head import aot
from fastdpo_kernels import tiles

tile = tiles.TILES[(9, 0), torch.bfloat16]._replace(warps=16)
spec = aot.launches(tile, torch.bfloat16)["sums only"]
specs = (spec, replace(spec, registers=255))
print(json.dumps([aot.faults(aot.resources(s, (9, 0)), (9, 0), "sums only") for s in specs]))
"""

ONE_GEMM = """
import json
from benchmarks.head import aot
from tests.kernels import one_gemm

rows = [aot.resources(one_gemm.launch(branch), (9, 0)) for branch in (False, True)]
print(json.dumps([[row, aot.faults(row, (9, 0), "E")] for row in rows]))
"""

TABLES = """
import json, sys
from pathlib import Path
from benchmarks.head import aot

tables = {path: json.loads(Path(path).read_text()) for path in json.loads(sys.argv[1])}
faults = {path: aot.faults_of(table) for path, table in tables.items()}
sources = {path: table["sources"] for path, table in tables.items()}
print(json.dumps([aot.of_sources(), sources, faults, aot.VERSIONS]))
"""


def answer(script, argument=None):
    """The last line that the script prints, from JSON."""
    command = [sys.executable, "-c", script, json.dumps(argument)]
    environment = {"TRITON_INTERPRET": "0", "PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_kernels_compile_without_faults():
    found = answer(SCRIPT, [(capability, names, {}) for capability, names in AGAIN.items()])
    assert found == [[[] for _ in [*names, "beside"]] for names in AGAIN.values()]


def test_faults_of_passes_beside_each_other():
    """Where a half of the rows gives a row to more threads, sums in one part differ; without a diagonal the
    epilogue finds the target's logit."""
    questions = [((10, 0), ["E", STATISTICS], {"parts": 1}), ((9, 0), ["E"], {"diagonal": False})]
    (*fine, orders), (good, long) = answer(SCRIPT, questions)
    assert [*fine, good] == [[], [], []], "the present way compiles too"
    assert "several orders" in orders[0] and len(long) == 1 and long[0].startswith("E: epilogue")


def test_a_tile_too_large_is_a_fault():
    questions = [((9, 0), ["dZ"], {"stages": 4}), ((9, 0), ["sums only"], {"columns": 256})]
    (shared, _), (spilled, _) = answer(SCRIPT, questions)
    assert any("shared" in fault for fault in shared)
    assert any("stack" in fault for fault in spilled)


def test_a_program_has_no_more_registers_than_there_are():
    """Of 16 warps with 255 registers each the compiler has no complaint, and the launch fails."""
    ours, too_many = answer(WARPS)
    assert not any("registers" in fault for fault in ours)
    assert any("registers" in fault for fault in too_many)


def test_serialised_products_are_a_fault():
    (good, none), (bad, faults) = answer(ONE_GEMM)
    assert good["k_steps"] == [[8, 1, 1, 1]] and none == []
    # by everything else that is asked, the slow one is as good
    assert all(bad[key] == good[key] for key in ("stack", "local", "spills", "matrix"))
    assert bad["k_steps"] == 8 * [[1, 1, 1, 0]]
    assert len(faults) == 1 and "wgmma does not overlap" in faults[0]


def test_the_committed_tables_are_of_these_kernels_and_have_no_faults():
    paths = sorted(map(str, (ROOT / "benchmarks" / "results").glob("aot_triton_*.json")))
    now, sources, faults, versions = answer(TABLES, paths)
    names = {Path(path).stem.removeprefix("aot_triton_") for path in paths}
    assert names >= set(versions), "run `make aot`"
    for path in paths:
        assert sources[path] == now, f"{path} is of other kernels: run `make aot`"
        assert faults[path] == []
