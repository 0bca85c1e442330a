"""What the head should take on a GPU, by a stated model: nothing of it is measured.

A pass over the logits is the product at RATE and, for each tile, the epilogue that the tensor cores wait
for: so many instructions an element (of the newest table of compiled kernels), and FILL until products run
again. A product over E takes as long as its FLOPs and as reading E. Sums and rows in fp32 are moved at
BANDWIDTH, and a launch that finds nothing to do takes LAUNCH. Chunks and parts are fastdpo_kernels.plan's.

Letters: M scored rows, D hidden, V vocab.
"""

import itertools
import json
import re
from math import ceil
from pathlib import Path

import torch
from fastdpo_kernels import Plan, plan, tiles

from benchmarks.results import RESULTS

SHAPES = ((8192, 4096, 128256), (4096, 896, 151936), (4096, 1536, 151936), (4096, 2048, 151936))  # M, D, V
# An H100: what dense bf16 GEMMs may reach (the data sheet's 989 TFLOP/s need a clock that its power does not
# allow), bytes/s of its memory, multiprocessors, the clock under such a load
RATE, BANDWIDTH, PROCESSORS, CLOCK = 750e12, 3.35e12, 132, 1.65e9
FILL, LAUNCH = 1.0e-6, 3.5e-6  # seconds: assumptions
SMALL_LAUNCHES = 5  # of a span, beside its tiles and its product
CHIP = (9, 0)
# instructions an element where the table does not tell: as read in the kernels' disassembly
EPILOGUE = {"E": 12.8, "sums only": 12.3, "dZ": 9.8}
MODES = {"forward": 1, "frozen": 2, "trained": 3}  # and the products of 2MVD that are its floor
TRL = {"forward": 2, "frozen": 6, "trained": 8}  # MVD of TRL 1.16's chunked head, see docs/comparison.md


def epilogue(name: str, folder: Path = RESULTS) -> float:
    """Instructions an element of a pass, as launch.tile_pass names it in the newest Triton's table."""
    version = lambda path: tuple(map(int, re.findall(r"\d+", path.stem)))
    path = max(folder.glob("aot_triton_*.json"), key=version)
    kernels = json.loads(path.read_text())["kernels"]["sm_90 bfloat16"]
    return kernels.get(name, {}).get("epilogue", EPILOGUE[name])


def tile_pass(M: int, D: int, V: int, name: str) -> float:
    """Seconds of the GEMM whose epilogue leaves E, sums or dZ."""
    tile = tiles.TILES[CHIP, torch.bfloat16]
    of_a_program = ceil(M / tile.rows) * ceil(V / tile.columns) / PROCESSORS
    issued = tile.rows * tile.columns / 32 * epilogue(name) / 4  # slots of each of the 4 schedulers
    return 2 * M * V * D / RATE + of_a_program * (issued / CLOCK + FILL)


def product(M: int, D: int, V: int) -> float:
    """Seconds of a product over E or dZ [M, V], by cuBLAS."""
    return 2 * M * V * D / RATE + 2 * M * V / BANDWIDTH


def moved(size: int) -> float:
    return size / BANDWIDTH


def spans(M: int, D: int, chunks: int) -> float:
    """Seconds of what each span costs again: its launches, and the sums f32[M, D] read and written."""
    return chunks * (SMALL_LAUNCHES * LAUNCH + moved(8 * M * D))


def seconds(how: Plan, D: int, V: int) -> float:
    """Of a forward and backward by this plan."""
    if how.parts:
        dw = moved(8 * V * D) * len(how.parts) + moved(6 * V * D) if len(how.parts) > 1 else 0.0
        return sum(seconds(part, D, V) for part in how.parts) + dw
    size, rows = (how.rows, D, V), moved(16 * how.rows * D)
    if how.name == "forward":
        return tile_pass(*size, "sums only") + SMALL_LAUNCHES * LAUNCH
    if how.name == "frozen":
        return tile_pass(*size, "E") + product(*size) + rows + spans(how.rows, D, how.chunks)
    if how.name == "keep":
        return tile_pass(*size, "E") + 2 * product(*size) + rows + spans(how.rows, D, 1)
    passes = tile_pass(*size, "sums only") + tile_pass(*size, "dZ") + 2 * product(*size)
    return passes + rows + 2 * spans(how.rows, D, how.chunks)


def planned(M: int, D: int, V: int, mode: str, groups: list[int] | None = None) -> Plan:
    kind = dict(train_weight=mode == "trained", need_grad=mode != "forward", groups=groups)
    return plan(M, V, D, dtype=torch.bfloat16, backend="triton", **kind)


def predicted() -> list[tuple[tuple[int, int, int], str, float, dict[str, tuple[float, Plan]]]]:
    """[(M, D, V), mode, seconds of its floor, {contender: (seconds, plan)}] of every shape and mode."""
    out = []
    for (M, D, V), (mode, gemms) in itertools.product(SHAPES, MODES.items()):
        pairs = [512] * (M // 512)
        plans = {"linear_logp": planned(M, D, V, mode), "linear_dpo": planned(M, D, V, mode, pairs)}
        ours = {name: (seconds(how, D, V), how) for name, how in plans.items()}
        out.append(((M, D, V), mode, gemms * 2 * M * V * D / RATE, ours))
    return out
