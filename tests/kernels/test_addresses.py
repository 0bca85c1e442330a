"""No kernel makes an address of a product in 32 bits: a row's or a tile's number times a size passes 2^31
with heads and batches that are only large, and then another tensor is read or written. Nothing as large as
that fits a test, so the kernels' types are read."""

import pytest

from .test_aot import answer

pytest.importorskip("triton")
SCRIPT = "import json; from tests.kernels import addresses; print(json.dumps(addresses.of_all_kernels()))"


def test_no_address_comes_from_a_product_in_32_bits():
    kernels, control = answer(SCRIPT)
    assert len(kernels) > 50 and {name: lines for name, lines in kernels.items() if lines} == {}
    assert len(control) == 1
