"""Rungs that are left out, and the doctor's check of those that are not, by Triton's interpreter."""

import pytest
import torch
from fastdpo_kernels import avoid, backend, launch, linear_logp

from fastdpo.doctor import head_checks
from fastdpo.doctor.head_problem import head_case
from fastdpo.doctor.measuring import NotHere

from .interpreted import SMALL, assert_right, interpreted, small_tiles  # noqa: F401
from .interpreted import head_case as small_head

if not interpreted:
    pytest.skip("test_interpreter.py runs this", allow_module_level=True)

ALL = ("hidden", "weight", "bias")


@pytest.fixture
def ran(monkeypatch):
    """The tiles that ran."""
    seen, real = [], launch.tile_pass
    monkeypatch.setattr(launch, "tile_pass", lambda tile, *a, **k: seen.append(tile) or real(tile, *a, **k))
    return seen


def test_descriptors_are_left_out(ran):
    c = small_head(70)
    assert_right(c, ALL)
    assert any(tile.descriptors for tile in ran)
    ran.clear()
    avoid("triton")
    assert backend("cpu", torch.float32) == "triton"
    assert_right(c, ALL)
    assert ran and not any(tile.descriptors for tile in ran)


def test_triton_is_left_out(ran):
    avoid("plain_triton")
    assert backend("cpu", torch.float32) == "torch"
    assert_right(small_head(70), ALL)
    assert not ran


def check(rung, **options):
    """The doctor's check of a rung, in fp32: bf16 is not the interpreter's."""
    cases = {"": head_case("cpu", torch.float32, [9, 1, 30], 130, 36, **options)}
    return head_checks._check(rung, cases, torch.float32)


@pytest.mark.parametrize("rung", ("triton", "plain_triton"))
def test_the_doctors_check_is_of_the_rung_it_names(ran, rung):
    results = check(rung, softcap=4.0, bias=True)
    assert len(results) == 20 and all(m.right for m in results), [m for m in results if not m.right]
    assert any(tile.descriptors for tile in ran) == (rung == "triton")
    assert linear_logp and backend("cpu", torch.float32) == "triton"  # all is allowed again


def test_the_doctors_check_of_the_row_kernels(monkeypatch):
    launched, real = [], launch.run
    seen = lambda kernel, *a, **k: launched.append(kernel.__name__) or real(kernel, *a, **k)
    monkeypatch.setattr(launch, "run", seen)
    monkeypatch.setattr("fastdpo_kernels.tiles.tile", lambda device, dtype: None)
    monkeypatch.setattr("fastdpo_kernels.tiles.row_kernels", lambda device: True)
    results = check("cublas", softcap=4.0, bias=True, lora=True)
    assert all(m.right for m in results), [m for m in results if not m.right]
    assert "chunk_sums" in launched and any("d b " in m.what for m in results)
    launched.clear()
    assert check("torch") and not launched


def test_what_does_not_take_the_rung_is_not_here(monkeypatch):
    monkeypatch.setattr("fastdpo_kernels.tiles.tile", lambda device, dtype: SMALL.plain())
    with pytest.raises(NotHere, match="no tensor descriptors"):
        check("triton")
    assert check("plain_triton")
    with pytest.raises(NotHere, match="no kernel of this kind for fp32"):
        check("plain_triton", lora=True)


def no_target(monkeypatch):
    monkeypatch.setattr(launch, "put_target", lambda *args: None)


def one_tile_less(monkeypatch):
    """Of every pass that computes logits again: its last tile stays as it was, poisoned."""
    real = launch.tile_pass

    def tile_pass(tile, head, x, target, span, state, *, factor=None, **options):
        if factor is not None:
            span = (span[0], span[1] - 1)
        return real(tile, head, x, target, span, state, factor=factor, **options)

    monkeypatch.setattr(launch, "tile_pass", tile_pass)


@pytest.mark.parametrize("fault", (no_target, one_tile_less), ids=lambda f: f.__name__)
def test_a_wrong_kernel_is_found(monkeypatch, fault):
    fault(monkeypatch)
    found = [m.what for m in check("triton") if not m.right]
    assert any("d weight" in what for what in found), found
