"""Nothing in the tests may reach a network, and every test starts from the same random state."""

import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are too small for threads
# The `deterministic` tests ask for it, and cuBLAS reads it once. It is what torch takes on Hopper anyway.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

pytest_plugins = "tests.named"
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR"):  # whose terminal this is changes no output
    os.environ.pop(name, None)


@pytest.fixture(autouse=True)
def all_allowed_again():
    """What a test had its process avoid is no business of the next one."""
    yield
    for name in ("fastdpo_kernels", "fastdpo.model.attention"):
        if name in sys.modules:
            sys.modules[name].avoid()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def own_cache_of_fixtures(tmp_path_factory):
    """Fixtures of a whole module run before the one below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """No test meets the reference cache of another test, or of the person who runs them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def deterministic():
    """Flash attention sums dq by atomics, in any order, unless torch is told to be deterministic: where a
    test asks for the same bits behind an attention's backward."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """After an illegal memory access every CUDA call of the process fails: it ends with the test that made
    it. Under xdist that test is told as crashed, and another process takes the others."""
    done = yield
    if "gpu" in item.keywords and (why := poisoned()):
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"{item.nodeid} left the GPU unusable for this process: {why}", returncode=1)
    return done


def poisoned() -> str | None:
    """What CUDA says where this process can no longer use it."""
    if not torch.cuda.is_available():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return None


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
