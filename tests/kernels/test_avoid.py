"""Rungs that are left out of the head are not taken."""

from types import SimpleNamespace

import fastdpo_kernels
import pytest
import torch
from fastdpo_kernels import tiles


def backends(monkeypatch, lora=False):
    """What a bf16 head takes on a chip with a tile."""
    monkeypatch.setattr(tiles, "tile", lambda device, dtype: tiles.Tile(64, 64, 16, 2, 4, 1, True))
    monkeypatch.setattr(tiles, "row_kernels", lambda device: True)
    x, weight = torch.ones(2, 8, dtype=torch.bfloat16), torch.ones(5, 8, dtype=torch.bfloat16)
    taken = fastdpo_kernels.backend("cuda", torch.bfloat16, lora=lora)
    assert tiles.backend_of(x, weight, lora) == taken
    return taken


def test_the_head_without_some_rungs(monkeypatch):
    now = lambda: (backends(monkeypatch), backends(monkeypatch, lora=True))
    assert now() == ("triton", "cublas")
    fastdpo_kernels.avoid("triton")
    assert now() == ("triton", "cublas")  # without descriptors
    fastdpo_kernels.avoid("plain_triton")
    assert now() == ("cublas", "cublas")
    fastdpo_kernels.avoid("cublas")
    assert now() == ("triton", "torch")
    fastdpo_kernels.avoid("triton", "plain_triton", "cublas")
    assert now() == ("torch", "torch")
    fastdpo_kernels.avoid()
    assert now() == ("triton", "cublas")
    for name in ("torch", "cuda"):
        with pytest.raises(ValueError, match=f"triton, plain_triton, cublas, got {name}"):
            fastdpo_kernels.avoid(name)


def test_plain_tiles_where_descriptors_are_left_out(monkeypatch):
    triton_head = pytest.importorskip("fastdpo_kernels.triton_head")
    monkeypatch.setattr(tiles, "tile", lambda device, dtype: tiles.TILES[(9, 0), torch.bfloat16])
    x = torch.ones(2, 64, dtype=torch.bfloat16)
    head = SimpleNamespace(weight=torch.ones(5, 64, dtype=torch.bfloat16))
    assert triton_head.tile_for(head, x).descriptors
    fastdpo_kernels.avoid("triton")
    assert triton_head.tile_for(head, x) == tiles.TILES[(9, 0), torch.bfloat16].plain()


def test_chunks_by_torch_where_the_row_kernels_are_left_out(monkeypatch):
    from fastdpo_kernels.chunk import RowKernels, TorchChunk, chunk_of

    monkeypatch.setattr(tiles, "row_kernels", lambda device: True)
    monkeypatch.setattr(RowKernels, "__init__", lambda *args: None)
    made = lambda: type(chunk_of(None, torch.ones(2, 8), torch.zeros(2, dtype=torch.int64), torch.float32))
    assert made() is RowKernels
    fastdpo_kernels.avoid("cublas")
    assert made() is TorchChunk


def test_what_is_compiled_is_compiled_again(monkeypatch):
    monkeypatch.setattr(tiles, "row_kernels", lambda device: True)
    weight = torch.ones(5, 8)
    times = lambda x: x * (2 if tiles.backend_of(x, weight, False) == "cublas" else 3)
    compiled = torch.compile(times, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2, 8)).max() == 2
    fastdpo_kernels.avoid("cublas")
    assert compiled(torch.ones(2, 8)).max() == 3


def test_the_compiler_keeps_its_code_where_nothing_changes(monkeypatch):
    import torch._dynamo

    resets = []
    monkeypatch.setattr(torch._dynamo, "reset", lambda: resets.append(tiles._avoided))
    fastdpo_kernels.avoid()
    fastdpo_kernels.avoid("cublas")
    fastdpo_kernels.avoid("cublas")
    assert resets == [{"cublas"}]
