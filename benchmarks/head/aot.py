"""Compiles every kernel for chips that are not here, at every row of the tile table, and tells what
each needs: registers, stack, shared memory, and whether its GEMM runs on the tensor cores and, on sm_90,
keeps them busy from one K step to the next and has a short epilogue.

python -m benchmarks.head.aot          writes results/aot_<triton>.json, and fails where a kernel has a fault
                                  (4 minutes, no GPU: Triton's wheel has ptxas and cuobjdump)
"""

import hashlib
import json
import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import triton
from fastdpo_kernels import Plan, chunk, launch, tiles, triton_head
from fastdpo_kernels.head import Head
from fastdpo_kernels.head_pass import Gradients
from fastdpo_kernels.linear_logp import STATS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile, make_backend
from triton.runtime.jit import create_function_from_signature

# whose tables are committed: what torch 2.11, 2.13 and 2.14 pin, and the newest
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
# what one program may have, from the CUDA programming guide's table of compute capabilities
SHARED_BYTES = {(8, 0): 163 << 10} | dict.fromkeys(((9, 0), (10, 0), (10, 3)), 227 << 10)
SHARED_BYTES |= dict.fromkeys(((8, 6), (8, 9), (12, 0)), 99 << 10)
# the instruction that a GEMM over all rows must run on; rows out of range are too few to matter
MATRIX = {(9, 0): "HGMMA", (10, 0): "UTCHMMA", (10, 3): "UTCHMMA"}
MATRIX |= dict.fromkeys(((8, 0), (8, 6), (8, 9), (12, 0)), "HMMA")
WHOLE_PASSES = ("E", "E, bias, softcap", "E, statistics, softcap", "sums only", "sums and statistics", "dZ")
WHOLE_PASSES += ("dZ, entropy, softcap",)
GEMMS = (*WHOLE_PASSES, "start_rows")  # the diagonal has the passes' instruction, or other bits
# instructions an element that a pass on sm_90 may have after a tile's last K step, while tensor cores idle
EPILOGUE = {"E": 8, "sums only": 8, "dZ": 8, "E, bias, softcap": 20}
ASYNCHRONOUS = (9, 0)  # the chip of wgmma; before it and after it the tensor cores are fed otherwise
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
M, D, V = 8192, 4096, 128256
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
launch.processors = lambda device: 132


@contextmanager
def recorded():
    """Gives the list of what is launched inside: nothing runs."""
    found = []
    with mock.patch.object(launch.Launch, "run", lambda self: found.append(self)):
        yield found


def launches(tile, dtype):
    """{name: Launch} of everything that runs, as the passes launch it, on tensors without memory."""
    new = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device="meta")
    x, target, rows = new(M, D, dtype=dtype), new(M, dtype=torch.int64), new(M)
    plain = Head(new(V, D, dtype=dtype), None, None, None, 1.0, 1.0, None)
    capped = replace(plain, bias=new(V, dtype=dtype), softcap=30.0)

    def of(head, name, stats=(), d_entropy=None):
        """A plan's tile passes in order: the forward's, of its rows out of range twice, the gradients'. And
        what else it launches, by name."""
        how, need = Plan(name, 0, 0, 1, M, V), Gradients(hidden=True, weight=name != "frozen")
        with recorded() as found:
            state, _ = triton_head.forward(head, x, target, how, stats)
            if name != "forward":
                triton_head.gradients(head, x, target, how, state, need, rows, d_entropy)
        others = {spec.kernel.__name__: spec for spec in found if spec.kernel is not launch.head_tiles}
        return [spec for spec in found if spec.kernel is launch.head_tiles], others

    no_gemm = dict.fromkeys(("matmul", "matmul_add"), lambda *args: None)
    with mock.patch.object(tiles, "tile", lambda *args: tile), mock.patch.multiple(triton_head, **no_gemm):
        (capped_e, profile, settled_e), of_keep = of(capped, "keep")
        passes = {
            "E": of(plain, "keep")[0][0],
            "E, bias, softcap": capped_e,
            "E, statistics, softcap": of(capped, "keep", STATS)[0][0],
            "sums only": of(plain, "forward")[0][0],
            "sums and statistics": of(plain, "forward", STATS)[0][0],
            "dZ": of(plain, "recompute")[0][-1],
            "dZ, entropy, softcap": of(capped, "recompute", ("entropy",), rows)[0][-1],
            "rows out of range, profile": profile,
            "rows out of range, E": settled_e,
        }
        return passes | of_keep | of(capped, "frozen", STATS)[1] | chunk_launches(new, target, rows)


def chunk_launches(new, target, rows):
    """Those that reduce chunks of logits. In float16, which has no tile and comes here on every chip; and
    in float32, where E and dZ take the logits' place."""
    out, span = {}, (4096, 8192)
    for dtype in (torch.float16, torch.float32):
        z, e = new(M, 4096).t(), new(M, 4096, dtype=dtype).t()
        plain = Head(new(V, D, dtype=dtype), None, None, None, 1.0, 1.0, None)
        capped = replace(plain, bias=new(V, dtype=dtype), softcap=30.0)
        for head, value, more, by_logit in (
            (plain, None, "", ""),
            (capped, rows, ", statistics, softcap", ", entropy, softcap"),
        ):
            run = chunk.RowKernels(head, rows, target, torch.float32)
            softmax = chunk.Softmax(rows, rows, rows, value, value, value)
            with recorded() as found:
                run.reduce(z, span, softmax)
                run.reduce(z, span, softmax, e)
                run.gradient(z, span, rows, rows, value, e)
            names = (f"chunk sums{more}", f"chunk E{more}", f"chunk dZ{by_logit}")
            out |= {f"{name}, {str(dtype)[6:]}": spec for name, spec in zip(names, found)}
    return out


def known(spec):
    """(signature, constants, attributes): types, and what triton's runtime makes a part of the kernel's key
    of the launch's arguments. Two launches with the same are compiled once."""
    bind = create_function_from_signature(spec.kernel.signature, spec.kernel.params, BACKEND)
    given, found, _ = bind(**spec.arguments)
    by_name = dict(zip(given, found))
    signature = {name: kind for name, (kind, _) in by_name.items()}
    constants = {name: given[name] for name, kind in signature.items() if kind == "constexpr"}
    hints = [(i, hint) for i, (kind, hint) in enumerate(found) if kind != "constexpr" and hint]
    return signature, constants, {(i,): BACKEND.parse_attr(hint) for i, hint in hints}


def compiled(spec, capability):
    """What triton.compile makes of the launch."""
    source, target = ASTSource, GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    if spec.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as source
    return compile(source(spec.kernel, *known(spec)), target=target, options=spec.options)


def resources(spec, capability):
    """Registers, stack, local and shared bytes, and the matrix instructions of the compiled kernel; and what
    `k_steps`, `epilogue` and `row_sums` say of it."""
    done = compiled(spec, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(done.asm["cubin"])
        dump = lambda *options: (
            subprocess.run(
                [TOOLS / "cuobjdump", *options, file.name], capture_output=True, text=True, check=True
            ).stdout
        )
        usage = dump("-res-usage")
        try:
            sass = dump("-sass")
        except subprocess.CalledProcessError:  # triton 3.6.0's is older than its ptxas, and reads no sm_103
            sass = "UTCHMMA" if "tcgen05.mma" in done.asm["ptx"] else ""
    number = lambda key: int(re.search(rf"{key}:(\d+)", usage).group(1))
    sizes, threads = spec.arguments, 32 * spec.warps
    per_thread = sizes["BM"] * sizes["BN"] / threads if "BN" in sizes else None
    found = [name for name in ("HGMMA", "UTCHMMA", "HMMA") if re.search(rf"\b{name}\b", sass)]
    return {
        "registers": number("REG"),
        "stack": number("STACK"),
        "local": number("LOCAL"),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
        "shared": done.metadata.shared,
        "warps": done.metadata.num_warps,  # with those of partitions
        "matrix": found[0] if found else None,
        "k_steps": k_steps(sass),
        "epilogue": round(epilogue(sass) / per_thread, 2) if per_thread and "HGMMA" in sass else None,
        "row_sums": row_sums(done.asm["ttgir"]),
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


def epilogue(sass):
    """Instructions that run once a tile, after its last K step of wgmma: the longest stretch that a branch
    behind the last product jumps over, as a tile with more steps to go does."""
    places = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    last = max(at for at, text in places if "HGMMA" in text)
    jumps = [(at, re.search(r"\bBRA 0x([0-9a-f]+)", text)) for at, text in places if at > last]
    return max(0, *((int(to[1], 16) - at) // 16 - 1 for at, to in jumps if to))


def row_sums(ttgir):
    """Which of a part's columns `_row_sums` adds within a thread, over the lanes and over the warps: bases of
    the layout. Where they are the same, so are the bits. None without sums."""
    layout = re.search(r"tensor<\d+x[12]x[12]x\d+xf32, (#\w+)>\) ->", ttgir)
    if layout is None:
        return None
    bases = re.search(rf"^{layout[1]} = #ttg.linear<{{(.*)}}>", ttgir, re.M)[1]
    parts = [
        re.search(rf"{part} = (\[.*?\])(?:, \w+ =|$)", bases)[1] for part in ("register", "lane", "warp")
    ]
    return [[basis[3] for basis in json.loads(part) if basis[3]] for part in parts]


def faults(row, capability, name):
    """What would make this kernel slow, or impossible to launch."""
    out = [f"{key} {row[key]}" for key in ("stack", "local", "spills") if row[key]]
    if row["shared"] > SHARED_BYTES[capability]:
        out.append(f"shared {row['shared']} of {SHARED_BYTES[capability]}")
    if row["registers"] * 32 * row["warps"] > launch.REGISTERS:
        out.append(f"registers {row['registers']} of each of {32 * row['warps']} threads")
    if name in GEMMS and row["matrix"] != MATRIX[capability]:
        out.append(f"matrix {row['matrix']}")
    if name in GEMMS and capability == ASYNCHRONOUS:
        if not row["k_steps"] or any(step[1:] != [1, 1, 1] for step in row["k_steps"]):
            out.append(f"wgmma does not overlap: K steps {row['k_steps']}")
    return out


def faults_beside(rows, capability):
    """Of a tile's passes {name: row}: long epilogues; and sums of a row in several orders, by which a pass
    with statistics would give other bits than one without."""
    sums = {name: row["row_sums"] for name, row in rows.items() if name in WHOLE_PASSES and name[:2] != "dZ"}
    one = len(set(map(str, sums.values()))) <= 1 and None not in sums.values()
    out = [] if one else [f"rows are summed in several orders: {sums}"]
    if capability == ASYNCHRONOUS:
        found = [(name, rows[name]["epilogue"], most) for name, most in EPILOGUE.items() if name in rows]
        out += [
            f"{name}: epilogue {is_} of {most} an element" for name, is_, most in found if not 0 < is_ <= most
        ]
    return out


def faults_of(table):
    """Of every kernel of a table that `main` wrote."""
    out = []
    for capability, dtype in tiles.TILES:
        rows = table["kernels"][of(capability, dtype)]
        found = [f"{name}: {fault}" for name, row in rows.items() for fault in faults(row, capability, name)]
        out += [f"{chip(capability)} {fault}" for fault in found + faults_beside(rows, capability)]
    return out


def of_sources():
    """Tells a table of these kernels, as they are launched, from one of older kernels or other tiles."""
    names = ("triton_tile", "triton_rows", "triton_finish", "triton_chunk")
    texts = [(Path(launch.__file__).parent / f"{name}.py").read_text() for name in names]
    for (capability, dtype), tile in tiles.TILES.items():
        specs = sorted(launches(tile, dtype).items())
        texts += [repr((of(capability, dtype), name, *known(spec), spec.options)) for name, spec in specs]
    return hashlib.sha256("".join(texts).encode()).hexdigest()[:16]


def chip(capability):
    return f"sm_{capability[0]}{capability[1]}"


def of(capability, dtype):
    return f"{chip(capability)} {str(dtype).split('.')[1]}"


def main():
    result = {"triton": triton.__version__, "sources": of_sources(), "kernels": {}}
    for (capability, dtype), tile in tiles.TILES.items():
        rows = result["kernels"][of(capability, dtype)] = {}
        print(f"\n{chip(capability):42} registers  stack  local  spills  shared  warps  matrix", end="")
        print("  K steps  epilogue  row sums")
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
