"""The table of chips that have a tile of the head's GEMM."""

import json

from fastdpo_kernels.tiles import TILES

from benchmarks.results import RESULTS
from benchmarks.tables.markdown import markdown

CARDS = {
    (8, 0): "A100",
    (8, 6): "RTX 3090, A10",
    (8, 9): "RTX 4090, L4, L40S",
    (9, 0): "H100, H200",
    (10, 0): "B200",
    (10, 3): "B300",
    (12, 0): "RTX 5090",
}


def tiles_table() -> str:
    """Each chip's tile; what the pass that leaves E needs there, by the newest Triton's table of kernels
    compiled ahead of time; and whether there are a GPU's timings."""
    tables = [json.loads(path.read_text()) for path in RESULTS.glob("aot_triton_*.json")]
    newest = max(tables, key=lambda table: tuple(map(int, table["triton"].split("."))))
    tuned = {tuple(json.loads(path.read_text())["capability"]) for path in RESULTS.glob("tuning_*.json")}
    rows = []
    for (chip, _), tile in sorted(TILES.items(), key=lambda item: item[0][0]):
        name, size = ".".join(map(str, chip)), f"{tile.rows}x{tile.columns}x{tile.depth}"
        needs = newest["kernels"].get(f"sm_{chip[0]}{chip[1]} bfloat16", {}).get("E", {})
        numbers = (f"{needs[key]:,}" if needs else "" for key in ("registers", "shared"))
        rows.append([f"{name} ({CARDS[chip]})", size, *numbers, "measured" if chip in tuned else "compiled"])
    return markdown(("compute capability", "tile", "registers", "bytes of shared memory", "known by"), rows)
