"""triton_gluon.py: what it compiles to, what its source computes with stand-ins for Gluon's functions, and
that nothing takes it unasked. Its values on a GPU: test_gpu_gluon.py."""

from types import SimpleNamespace

import pytest
import torch
from fastdpo_kernels import tiles

from .test_aot import answer

pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper")

SCRIPT = """
import json, re
import torch
from benchmarks.head import aot
from benchmarks.head.tune_tiles import NAMES, passes
from fastdpo_kernels import launch, tiles, triton_gluon
from fastdpo_kernels.head import Head

tiles.allow("gluon")
tiles._capability = lambda device: (9, 0)
tile, found = tiles.TILES[(9, 0), torch.bfloat16], {}
new = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="meta")
for V, scale in ((128256, 1.0), (50257, 0.5)):  # without and with a tail
    head = Head(new(V, 4096), None, None, None, 1.0, scale, None)
    with aot.recorded():
        e, sums, dz = passes(tile, head, new(8192, 4096), new(8192, dtype=torch.int64))
    assert e.kernel is sums.kernel is triton_gluon.e_tiles and dz.kernel is launch.head_tiles
    for name, spec in zip(NAMES, (e, sums)):
        row, ptx = aot.resources(spec, (9, 0)), aot.compiled(spec, (9, 0)).asm["ptx"]
        registers = re.findall(r"setmaxnreg[.]\\w+[.]sync[.]aligned[.]u32\\s+(\\d+)", ptx)
        faults = aot.faults(row, (9, 0), name)
        found[f"{name}, {V}"] = [faults, row["k_steps"], row["warps"], sorted(map(int, registers))]
print(json.dumps(found))
"""


def test_it_compiles_to_three_partitions_without_faults():
    found = answer(SCRIPT)
    assert len(found) == 4
    for name, (faults, k_steps, warps, registers) in found.items():
        # two halves of 128 rows, whose steps overlap; their registers, and those of the loads
        assert (faults, k_steps, warps) == ([], [[8, 1, 1, 1]] * 2, 12), name
        assert registers[0] == 24 and 240 in registers, name


@pytest.mark.parametrize("shape", ((70, 90, 40), (33, 64, 8), (16, 31, 100), (9, 20, 8)), ids=str)
@pytest.mark.parametrize("stores", (True, False), ids=("E", "sums only"))
@pytest.mark.parametrize("scale", (None, 0.7))
def test_its_source_computes_the_tiles(shape, stores, scale):
    from . import interpreted_gluon

    (M, N, D), v0, BN = shape, 20, 32
    torch.manual_seed(0)
    x, w = torch.randn(M, D).bfloat16(), torch.randn(N, D).bfloat16()
    target, reference = torch.randint(0, N + 2 * v0, (M,)), 9 * torch.randn(M)
    out = torch.full((M, N + 5), torch.nan, dtype=torch.bfloat16) if stores else None
    partial = torch.full((-(-N // BN), M), torch.nan)
    z = x.float() @ w.float().T * (scale or 1)
    z[target[:, None] - v0 == torch.arange(N)] = -torch.inf
    e = torch.exp2(z * triton_bits() - reference[:, None])
    for seed in range(5):
        interpreted_gluon.run(
            2 if M > 33 else 1, seed, x_ptr=x, w_ptr=w, out_ptr=out, target_ptr=target,
            reference_ptr=reference, partial_ptr=partial, M=M, N=N, D=D, v0=v0, stride_x=D, stride_w=D,
            stride_out=N + 5, scale=scale, BM=32, BN=BN, BK=8, GROUP=2, STAGES=4, LAG=2, TAIL=N % BN != 0,
        )  # fmt: skip
        sums = torch.stack([part.sum(1) for part in e.split(BN, 1)])
        torch.testing.assert_close(partial, sums, rtol=1e-5, atol=0)
        partial.fill_(torch.nan)
        if stores:
            torch.testing.assert_close(out[:, :N].float(), e, rtol=5e-3, atol=0)
            assert out[:, N:].isnan().all()
            out.fill_(torch.nan)


def triton_bits():
    from fastdpo_kernels.triton_tile import BITS

    return BITS.value


def test_nothing_takes_it_unasked(monkeypatch):
    monkeypatch.setattr(tiles, "_capability", lambda device: (9, 0))
    tile, x = tiles.TILES[(9, 0), torch.bfloat16], torch.ones(2, 8)
    plain = SimpleNamespace(bias=None, softcap=None)
    assert not tiles.takes_gluon(tile, plain, x)
    try:
        tiles.allow("gluon")
        assert tiles.takes_gluon(tile, plain, x)
        assert not tiles.takes_gluon(tile.plain(), plain, x)
        assert not tiles.takes_gluon(tile, SimpleNamespace(bias=x, softcap=None), x)
        assert not tiles.takes_gluon(tile, SimpleNamespace(bias=None, softcap=3.0), x)
        tiles.avoid()
        assert tiles.takes_gluon(tile, plain, x)
        with pytest.raises(ValueError, match="allow knows gluon, got triton"):
            tiles.allow("triton")
        monkeypatch.setattr(tiles, "_capability", lambda device: (10, 0))
        assert not tiles.takes_gluon(tile, plain, x)
    finally:
        tiles.allow()
    monkeypatch.setattr(tiles, "_capability", lambda device: (9, 0))
    assert not tiles.takes_gluon(tile, plain, x)
