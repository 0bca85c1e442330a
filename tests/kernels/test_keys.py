"""Each kernel is compiled once, however the rows of a step change: a compilation takes seconds, and would
come at any step. In a process of its own: other tests may have set the interpreter."""

import pytest

pytest.importorskip("triton")
from tests.kernels.test_aot import answer

SCRIPT = """
import json, sys
from tests.kernels import keys

print(json.dumps(keys.late(json.loads(sys.argv[1]))))
"""
ROWS = {"finish_rows", "finish_stats", "hidden_gradient", "merge_sums", "put_target", "start_rows"}
KERNELS = {"triton": {"head_tiles", *ROWS}, "cublas": {"chunk_sums", "chunk_gradient"}}


@pytest.mark.parametrize("backend", KERNELS)
def test_steps_of_ten_sizes_compile_each_kernel_once(backend):
    names, late = answer(SCRIPT, backend)
    assert set(names) >= KERNELS[backend]
    assert not late, "\n".join(late)
