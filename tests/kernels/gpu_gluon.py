"""The warp-specialised pass beside the tiles it takes the place of, on a GPU of sm_90. By hand and not in the
gate, where a fault of what nothing takes would stop what everything takes:

python3 -m pytest tests/kernels/gpu_gluon.py
"""

import pytest
import torch
from fastdpo_kernels import linear_logp, tiles

from .cases import assert_as_good, budget, case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs sm_90"
    ),
]
WANTED = {"forward": (), "frozen": ("hidden",), "keep": ("hidden", "weight")}
# one step and one tile; a tail of columns, of rows, of D; many tiles a program
SHAPES = ((9, 128, 64), (300, 2049, 96), (1000, 32000, 520), (4096, 151936, 896))


@pytest.fixture(autouse=True)
def allowed():
    tiles.allow("gluon")
    yield
    tiles.allow()


def head_case(M, V, D):
    return case(M, V, D, lora=False, bias=False).on("cuda").to(torch.bfloat16)


@pytest.mark.parametrize("plan", WANTED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_as_the_tiles_again_and_again(shape, plan):
    c = head_case(*shape)
    options = {"memory_budget": budget("keep", c)} if plan == "keep" else {}
    runs = [c.run(linear_logp, WANTED[plan], **options) for _ in range(10)]
    tiles.allow()
    tile = c.run(linear_logp, WANTED[plan], **options)
    for run in runs:
        for name, value in tile.items():
            assert value is None or torch.equal(run[name], value), name


def test_rows_out_of_range_and_bounds():
    c = head_case(300, 2049, 96)
    c.hidden[::2] *= 60
    assert_as_good(c, torch.bfloat16, ("hidden", "weight"), memory_budget=budget("keep", c))
    assert_as_good(c, torch.bfloat16, ("hidden",))


def test_it_is_what_ran(monkeypatch):
    from fastdpo_kernels import launch

    ran, real = [], launch.Launch.run
    monkeypatch.setattr(launch.Launch, "run", lambda self: ran.append(self.kernel.__name__) or real(self))
    head_case(300, 2048, 64).run(linear_logp, ("hidden",))
    assert "e_tiles" in ran
