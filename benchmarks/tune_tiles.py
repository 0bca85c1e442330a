"""Finds the row of fastdpo_kernels.tiles.TILES for the GPU at hand: times the passes over the head with
every tile that compiles without spills, and prints the fastest.

python -m benchmarks.tune_tiles [--rows 8192] [--hidden 4096] [--vocab 128256]
python -m benchmarks.tune_tiles --dry-run      (no GPU: which tiles would be tried, for each chip)
"""

import argparse
import itertools

import torch
from fastdpo_kernels import launch, triton_head
from fastdpo_kernels.head import Head
from fastdpo_kernels.tiles import Tile

from . import aot

DTYPE = torch.bfloat16
NAMES = ("E", "sums only", "dZ")  # what every plan spends its time in, beside cuBLAS


def candidates(capability):
    """Tiles whose operands fit into shared memory; registers are for the compiler to tell."""
    shapes = ((128, 128), (256, 128), (128, 256), (64, 256))
    for (rows, columns), depth, warps, stages, group in itertools.product(
        shapes, (32, 64, 128), (4, 8), (3, 4, 5), (4, 8, 16)
    ):
        bytes_needed = (rows + columns) * depth * DTYPE.itemsize * stages
        per_thread = rows * columns / (32 * warps)  # of the accumulator: more never fits 255 registers
        if bytes_needed <= aot.SHARED_BYTES[capability] and per_thread <= 128:
            yield Tile(rows, columns, depth, group, warps, stages, capability >= (9, 0))


def compiles(tile, capability):
    """Whether the passes have no fault with this tile. The group changes nothing about that."""
    specs = aot.launches(tile, DTYPE)
    return not any(aot.faults(aot.resources(specs[n], capability), capability, n) for n in NAMES)


def passes(tile, head, x, target):
    """The Launches of NAMES, on real tensors."""
    M, V = len(x), len(head.weight)
    new = lambda *shape: torch.zeros(*shape, device=x.device)
    state = triton_head.State(new(M), new(M), new(M))
    launch.start_rows(head, x, target, state).run()
    out, partial = triton_head.buffer(M, V, x)[:, :V], new(1, -(-V // tile.columns), M)
    on = lambda **options: launch.tile_pass(tile, head, x, target, (0, V), state, **options)
    return (
        on(out=out, sums=True, partial=partial),
        on(sums=True, partial=partial),
        on(out=out, factor=new(M)),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    if args.dry_run:
        for capability in aot.SHARED_BYTES:
            tried = list(candidates(capability))
            print(f"{aot.chip(capability)}: {len(tried)} tiles, the first {tried[0]}")
        return
    from triton.testing import do_bench

    capability = torch.cuda.get_device_capability()
    real = torch.cuda.get_device_properties(0).multi_processor_count
    launch.processors = lambda device: real
    x = torch.randn(args.rows, args.hidden, device="cuda", dtype=DTYPE)
    weight = torch.randn(args.vocab, args.hidden, device="cuda", dtype=DTYPE) / args.hidden**0.5
    target = torch.randint(0, args.vocab, (args.rows,), device="cuda")
    head = Head(weight, None, None, None, 1.0, 1.0, None)
    flops = 2 * args.rows * args.hidden * args.vocab
    sound, found = {}, []
    for tile in candidates(capability):
        kind = tile._replace(group=0)
        if kind not in sound:
            sound[kind] = compiles(tile, capability)
        if sound[kind]:
            times = [do_bench(spec.run, return_mode="median") for spec in passes(tile, head, x, target)]
            found.append((sum(times), tile))
            rates = ", ".join(f"{name} {flops / ms / 1e9:.0f}" for name, ms in zip(NAMES, times))
            print(f"{tile}: TFLOP/s of {rates}", flush=True)
    print(f"\n    ({capability}, {DTYPE}): {min(found)[1]},")


if __name__ == "__main__":
    main()
