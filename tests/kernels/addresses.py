"""Products of 32 bits in a kernel's addresses, read from its types. Imported where the interpreter is off
(test_addresses.py)."""

import torch
import triton
import triton.language as tl
from fastdpo_kernels import tiles
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from benchmarks.head import aot


@triton.jit
def wrong(out_ptr, M, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    tl.store(out_ptr + BLOCK * row, 0.0)
    tl.store(out_ptr + row.to(tl.int64) * M, 1.0)
    tl.store(out_ptr + (row * M + BLOCK + tl.arange(0, 2)).to(tl.int64), 2.0)


def of_all_kernels():
    """{kernel: its addresses from such products}, for tiles with descriptors and without; and `wrong`'s."""
    tile = tiles.TILES[(9, 0), torch.bfloat16]
    specs = {
        (name, kind): spec
        for kind in (tile, tile.plain())
        for name, spec in aot.launches(kind, torch.bfloat16).items()
    }
    found = {
        f"{name}, descriptors {kind.descriptors}": of_kernel(spec.kernel, *aot.known(spec))
        for (name, kind), spec in specs.items()
    }
    return found, of_kernel(wrong, dict(out_ptr="*fp32", M="i32", BLOCK="constexpr"), dict(BLOCK=64), {})


def of_kernel(kernel, signature, constants, attributes):
    backend = make_backend(GPUTarget("cuda", 90, 32))
    options, context, stages = backend.parse_options({}), ir.context(), {}
    ir.load_dialects(context)
    backend.load_dialects(context)
    backend.add_stages(stages, options, Language.TRITON)
    source = ASTSource(kernel, signature, constants, attributes)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    return short_products(
        str(stages["ttir"](source.make_ir(backend.target, options, *functions, context), {}))
    )


def short_products(ttir):
    """The lines that make addresses of what comes from a product of two variables in 32 bits."""
    constants, short, found = set(), set(), []
    for line in map(str.strip, ttir.splitlines()):
        left, _, right = line.partition(" = ")
        name, (kind, *words) = left.partition(":")[0], right.split() or [""]
        operands = [word.strip(",") for word in words if word.startswith("%")]
        short.discard(name)  # a name may come again in another region
        constants.discard(name)
        if kind == "arith.constant" or (kind == "tt.splat" and operands[0] in constants):
            constants.add(name)
        if kind == "arith.muli" and right.partition(" loc(")[0].endswith(("i32", "xi32>")):
            short |= {name} - ({name} if constants.intersection(operands) else set())
        elif kind == "tt.addptr" and operands[1] in short:
            found.append(line)
        elif short.intersection(operands):
            short.add(name)
    return found
