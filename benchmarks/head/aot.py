"""Compiles every kernel for chips that are not here, at every row of the tile table, and tells what
each needs: registers, stack, shared memory, and whether its GEMM runs on the tensor cores and, on sm_90,
keeps them busy from one K step to the next.

python -m benchmarks.head.aot          writes results/aot_<triton>.json, and fails where a kernel has a fault
                                  (4 minutes, no GPU: Triton's wheel has ptxas and cuobjdump)
"""

import hashlib
import inspect
import json
import re
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from fastdpo_kernels import chunk, launch, tiles, triton_head
from fastdpo_kernels.head import Head
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

# whose tables are committed: what torch 2.11, 2.13 and 2.14 pin, and the newest
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
# what one program may have, from the CUDA programming guide's table of compute capabilities
SHARED_BYTES = {(8, 0): 163 << 10, (9, 0): 227 << 10, (10, 0): 227 << 10}
# the instruction that a GEMM over all rows must run on; listed rows are too few to matter
MATRIX = {(8, 0): "HMMA", (9, 0): "HGMMA", (10, 0): "UTCHMMA"}
WHOLE_PASSES = ("E", "E, bias, softcap", "E, statistics, softcap", "sums only", "sums and statistics", "dZ")
WHOLE_PASSES += ("dZ, entropy, softcap",)
ASYNCHRONOUS = (9, 0)  # the chip of wgmma; before it and after it the tensor cores are fed otherwise
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
M, D, V = 8192, 4096, 128256
launch.processors = lambda device: 132


def launches(tile, dtype):
    """{name: Launch} of everything that runs, on tensors without memory."""
    new = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")
    x, w = new(M, D, dtype=dtype), new(V, D, dtype=dtype)
    plain = Head(w, None, None, None, 1.0, 1.0, None)
    capped = replace(plain, bias=new(V, dtype=dtype), softcap=30.0)
    target, rows, ints = new(M, dtype=torch.int64), new(M), new(M, dtype=torch.int32)
    state = triton_head.State(rows, rows, rows)
    out, sums = triton_head.buffer(M, V, x), new(M, D)
    partial, listed = new(launch.SLOTS, -(-V // 128), M), (ints, new(1, dtype=torch.int32))
    stats = ("entropy", "log_sum_sq_probs", "mean_logit", "is_top1")
    on = lambda head, t, **options: launch.tile_pass(t, head, x, target, (0, V), state, **options)
    low = tile.plain()
    every = dict(sums=True, profile=True, stats=stats, partial=partial)
    return {
        "E": on(plain, tile, out=out, sums=True, partial=partial),
        "E, bias, softcap": on(capped, tile, out=out, sums=True, partial=partial),
        "E, statistics, softcap": on(capped, tile, out=out, **every),
        "sums only": on(plain, tile, sums=True, partial=partial),
        "sums and statistics": on(plain, tile, **every),
        "dZ": on(plain, tile, out=out, factor=rows),
        "dZ, entropy, softcap": on(capped, tile, out=out, factor=rows, by_logit=rows),
        "listed rows, profile": on(capped, low, profile=True, partial=partial, listed=listed),
        "listed rows, E": on(capped, low, out=out, listed=listed),
        "start_rows": launch.start_rows(capped, x, target, state),
        "merge_sums": launch.merge_sums(partial, partial.shape[1], state, ints),
        "gather": launch.gather(ints, listed),
        "settle": launch.settle(listed, partial, partial.shape[1], state, rows),
        "rescale": launch.rescale(listed, rows, sums),
        "finish_rows": launch.finish_rows(state, rows, rows),
        "finish_stats": launch.finish_stats(partial, partial.shape[1], V, rows, dict.fromkeys(stats, rows)),
        "put_target": launch.put_target(out, target, rows, (0, V)),
        "hidden_gradient": launch.hidden_gradient(sums, w, target, rows, rows, x),
    } | chunk_launches(new, target, rows)


def chunk_launches(new, target, rows):
    """Those that reduce chunks of logits. In float16, which has no tile and comes here on every chip; and
    in float32, where E and dZ take the logits' place."""
    out, span = {}, (4096, 8192)
    few, every = chunk.Sums(rows, rows, rows, None, None, None), chunk.Sums(*(rows,) * 6)
    for dtype in (torch.float16, torch.float32):
        name = str(dtype).split(".")[1]
        z, e = new(M, 4096), new(M, 4096, dtype=dtype)
        plain = Head(new(V, D, dtype=dtype), None, None, None, 1.0, 1.0, None)
        capped = replace(plain, bias=new(V, dtype=dtype), softcap=30.0)
        sums = lambda head, s, e=None, z=z: launch.chunk_sums(head, z, target, span, s, rows, rows, e)
        dz = lambda head, by, e=e, z=z: launch.chunk_gradient(head, z, target, span, rows, rows, by, e)
        out |= {
            f"chunk sums, {name}": sums(plain, few),
            f"chunk sums, statistics, softcap, {name}": sums(capped, every),
            f"chunk E, {name}": sums(plain, few, e),
            f"chunk E, statistics, softcap, {name}": sums(capped, every, e),
            f"chunk dZ, {name}": dz(plain, None),
            f"chunk dZ, entropy, softcap, {name}": dz(capped, rows),
        }
    return out


def source(spec):
    """What the launch would compile: types, and what it knows of its arguments, as triton's runtime
    finds them out."""
    pointers = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
    pointers |= {torch.int32: "*i32", torch.int64: "*i64"}
    signature, constants, attributes = {}, dict(spec.constants), {}
    for i, name in enumerate(spec.kernel.arg_names):
        value = spec.arguments.get(name)
        if name in constants or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants.setdefault(name, value)
            continue
        if isinstance(value, torch.Tensor):
            signature[name], divisible = pointers[value.dtype], True
        elif isinstance(value, float):
            signature[name], divisible = "fp32", False
        else:
            signature[name], divisible = "i32" if value < 2**31 else "i64", value % 16 == 0
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(spec.kernel, signature, constants, attributes)


def resources(spec, capability):
    """Registers, stack, local and shared bytes, and the matrix instructions of the compiled kernel."""
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    done = compile(source(spec), target=target, options=spec.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(done.asm["cubin"])
        dump = lambda *options: (
            subprocess.run(
                [TOOLS / "cuobjdump", *options, file.name], capture_output=True, text=True, check=True
            ).stdout
        )
        usage, sass = dump("-res-usage"), dump("-sass")
    number = lambda key: int(re.search(rf"{key}:(\d+)", usage).group(1))
    found = [name for name in ("HGMMA", "UTCHMMA", "HMMA") if re.search(rf"\b{name}\b", sass)]
    return {
        "registers": number("REG"),
        "stack": number("STACK"),
        "local": number("LOCAL"),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": done.metadata.shared,
        "warps": spec.warps,
        "matrix": found[0] if found else None,
        "k_steps": k_steps(sass),
    }


def k_steps(sass):
    """[products, arrivals, commits, steps left in flight by the wait] of each K step of wgmma.

    A step ends where the program waits. One that overlaps the next is [8, 1, 1, 1], however many products
    it has. ptxas may find that it has to serialise them, for instance where accumulators pass a branch:
    then each product arrives, commits and waits for itself, and all are [1, 1, 1, 0].
    """
    steps, products, arrivals, commits = [], 0, 0, 0
    for line in sass.splitlines():
        product = "HGMMA" in line
        products += product
        commits += product and "gsb" in line
        arrivals += "WARPGROUP.ARRIVE" in line
        wait = re.search(r"WARPGROUP\.DEPBAR\.LE gsb\d+, 0x([0-9a-f]+)", line)
        if wait and products:
            steps.append([products, arrivals, commits, int(wait[1], 16)])
            products = arrivals = commits = 0
    return steps + ([[products, arrivals, commits, None]] if products else [])


def faults(row, capability, name):
    """What would make this kernel slow, or impossible to launch."""
    out = [f"{key} {row[key]}" for key in ("stack", "local", "spills") if row[key]]
    if row["shared"] > SHARED_BYTES[capability]:
        out.append(f"shared {row['shared']} of {SHARED_BYTES[capability]}")
    if row["registers"] * 32 * row["warps"] > launch.REGISTERS:
        out.append(f"registers {row['registers']} of each of {32 * row['warps']} threads")
    if name in WHOLE_PASSES and row["matrix"] != MATRIX[capability]:
        out.append(f"matrix {row['matrix']}")
    if name in WHOLE_PASSES and capability == ASYNCHRONOUS:
        if not row["k_steps"] or any(step[1:] != [1, 1, 1] for step in row["k_steps"]):
            out.append(f"wgmma does not overlap: K steps {row['k_steps']}")
    return out


def faults_of(table):
    """Of every kernel of a table that `main` wrote."""
    return [
        f"{chip(capability)} {name}: {fault}"
        for capability, dtype in tiles.TILES
        for name, row in table["kernels"][of(capability, dtype)].items()
        for fault in faults(row, capability, name)
    ]


def of_sources():
    """Tells a table of these kernels from one of older kernels or other tiles."""
    names = ("triton_tile", "triton_rows", "triton_finish", "triton_chunk", "launch")
    texts = [(Path(launch.__file__).parent / f"{name}.py").read_text() for name in names]
    texts += [inspect.getsource(tiles.Tile), repr(tiles.TILES)]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def chip(capability):
    return f"sm_{capability[0]}{capability[1]}"


def of(capability, dtype):
    return f"{chip(capability)} {str(dtype).split('.')[1]}"


def main():
    result = {"triton": triton.__version__, "sources": of_sources(), "kernels": {}}
    for (capability, dtype), tile in tiles.TILES.items():
        rows = result["kernels"][of(capability, dtype)] = {}
        print(f"\n{chip(capability):42} registers  stack  local  spills  shared  warps  matrix  K steps")
        for name, spec in launches(tile, dtype).items():
            row = rows[name] = resources(spec, capability)
            print(f"{name:42}", *(f"{row[key]!s:>7}" for key in row), flush=True)
    path = Path(__file__).parents[1] / "results" / f"aot_triton_{triton.__version__}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    bad = faults_of(result)
    print("\n".join(bad or ["no faults"]))
    return bool(bad)


if __name__ == "__main__":
    raise SystemExit(main())
