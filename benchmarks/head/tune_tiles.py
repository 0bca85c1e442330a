"""Finds the row of fastdpo_kernels.tiles.TILES for the GPU at hand: times the passes over the head with
every tile that compiles without spills, and prints the fastest.

python -m benchmarks.head.tune_tiles [--rows 8192] [--hidden 4096] [--vocab 128256] [--minutes 60] [--gluon]
"""

import argparse
import itertools
import time
from collections.abc import Callable

import torch
from fastdpo_kernels import launch, triton_head
from fastdpo_kernels.head import Head
from fastdpo_kernels.ops import aligned_rows
from fastdpo_kernels.tiles import TILES, Tile, allow

from benchmarks.head import aot
from benchmarks.process import gpu_unusable

DTYPE = torch.bfloat16
HEAD = (8192, 4096, 128256)  # M, D, V
NAMES = ("E", "sums only", "dZ")  # what every plan spends its time in, beside cuBLAS


def candidates(capability):
    """Tiles whose operands fit into shared memory; registers are for the compiler to tell."""
    used = TILES.get((capability, DTYPE))
    parts = used.parts if used else 1
    shapes = ((128, 128), (256, 128), (128, 256), (64, 256))
    for (rows, columns), depth, warps, stages, group in itertools.product(
        shapes, (32, 64, 128), (4, 8), (3, 4, 5), (4, 8, 16)
    ):
        bytes_needed = (rows + columns) * depth * DTYPE.itemsize * stages
        per_thread = rows * columns / (32 * warps)  # of the accumulator: more never fits 255 registers
        if bytes_needed <= aot.SHARED_BYTES[capability] and per_thread <= 128:
            yield Tile(rows, columns, depth, group, warps, stages, capability >= (9, 0), parts)


def compiles(tile, capability):
    """Whether the passes have no fault with this tile. The group changes nothing about that."""
    specs = aot.launches(tile, DTYPE)
    return not any(aot.faults(aot.resources(specs[n], capability), capability, n) for n in NAMES)


def passes(tile, head, x, target):
    """The Launches of NAMES, on real tensors."""
    M, V = len(x), len(head.weight)
    new = lambda *shape: torch.zeros(*shape, device=x.device)
    state, _ = triton_head.start(head, x, target)
    out, partial = aligned_rows(M, V, x)[:, :V], new(1, -(-V // tile.columns), M)
    on = lambda **options: launch.tile_pass(tile, head, x, target, (0, V), state, **options)
    with aot.recorded() as found:
        on(out=out, sums=True, partial=partial)
        on(sums=True, partial=partial)
        on(out=out, factor=new(M))
    return found


def tune(
    rows: int,
    hidden: int,
    vocab: int,
    minutes: float,
    device="cuda",
    capability=None,
    keep: Callable[[dict], None] = lambda record: None,
) -> dict:
    """{"capability", "shape", "flops" of a pass, "tiles": [{"tile", "ms" of each of NAMES}] fastest first,
    "failed": tiles that did not run, "faulty": those with a fault, "no_time_for": how many were not tried},
    the tile in use before others. `keep` is given the same, as far as it goes, after every tile."""
    begun, dry = time.monotonic(), device == "cpu"
    capability = capability or torch.cuda.get_device_capability()
    real = 1 if dry else torch.cuda.get_device_properties(0).multi_processor_count
    launch.processors = lambda device: real  # aot, which is of no device, says 132
    x = torch.randn(rows, hidden, device=device, dtype=DTYPE)
    weight = torch.randn(vocab, hidden, device=device, dtype=DTYPE) / hidden**0.5
    target = torch.randint(0, vocab, (rows,), device=device)
    head = Head(weight, None, None, None, 1.0, 1.0, None)
    used = TILES.get((capability, DTYPE))
    todo = sorted(candidates(capability), key=lambda tile: tile != used)
    sound, found, failed = {}, [], []
    record = lambda: {
        "capability": capability,
        "shape": {"rows": rows, "hidden": hidden, "vocab": vocab, "dtype": str(DTYPE)},
        "flops": 2 * rows * hidden * vocab,
        "tiles": sorted(found, key=lambda row: sum(row["ms"].values())),
        "failed": failed,
        "faulty": [kind._asdict() for kind, good in sound.items() if not good],
        "no_time_for": len(todo),
    }
    while todo and time.monotonic() - begun < 60 * minutes and not (dry and found):
        tile = todo.pop(0)
        kind = tile._replace(group=0)
        if kind not in sound:
            sound[kind] = dry or compiles(tile, capability)
        if sound[kind]:
            try:
                ms = {name: measured(spec, dry) for name, spec in zip(NAMES, passes(tile, head, x, target))}
            except Exception as error:  # of a tile that this chip does not take: the others go on
                failed.append({"tile": tile._asdict(), "why": f"{type(error).__name__}: {str(error)[:200]}"})
                if gpu_unusable():
                    print(f"{tile} made the GPU unusable for this process: it ends here", flush=True)
                    break
                continue
            found.append({"tile": tile._asdict(), "ms": ms})
            print(tile, ", ".join(f"{name} {t:.2f} ms" for name, t in ms.items()), flush=True)
            keep(record())
    return record()


def measured(spec, dry: bool) -> float:
    """Milliseconds of a launch, the median; of one run on a CPU, where Triton's interpreter has it."""
    if dry:
        begun = time.perf_counter()
        spec.run()
        return 1e3 * (time.perf_counter() - begun)
    from triton.testing import do_bench

    return do_bench(spec.run, return_mode="median")


def tell(record: dict) -> None:
    """The fastest tile as a row of tiles.TILES, and what it reaches."""
    if not record["tiles"]:
        print("no tile was tried")
        return
    best = record["tiles"][0]
    rates = ", ".join(f"{name} {record['flops'] / ms / 1e9:.0f}" for name, ms in best["ms"].items())
    print(f"\n    ({tuple(record['capability'])}, {DTYPE}): {Tile(**best['tile'])},\nTFLOP/s of {rates}")
    if record["no_time_for"]:
        print(f"no time for {record['no_time_for']} tiles")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=HEAD[0])
    parser.add_argument("--hidden", type=int, default=HEAD[1])
    parser.add_argument("--vocab", type=int, default=HEAD[2])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument(
        "--gluon", action="store_true", help="where a pass can go by triton_gluon.py, it does"
    )
    args = parser.parse_args()
    allow(*["gluon"] * args.gluon)
    tell(tune(args.rows, args.hidden, args.vocab, args.minutes))


if __name__ == "__main__":
    main()
