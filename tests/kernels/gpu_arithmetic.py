"""A GPU's arithmetic on the CPU: half operands stay half, and products of them are left in float32."""

import pytest
import torch
from fastdpo_kernels import chunked, head


def _product(a, b):
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    return a.float() @ b.float() if a.dtype.itemsize == 2 else a @ b


SAME = {
    "operand": lambda tensor: tensor,
    "matmul": lambda a, b, out: out.copy_(_product(a, b)),
    "matmul_add": lambda a, b, out: out.add_(_product(a, b)),
}


@pytest.fixture
def gpu_arithmetic(monkeypatch):
    for module in (chunked, head):
        for name in SAME.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, SAME[name])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """A GPU, and where there is none its arithmetic, so that a typo shows."""
    if request.param == "cpu":
        request.getfixturevalue("gpu_arithmetic")
    return request.param
