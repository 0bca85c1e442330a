import pytest

from tests.evaluation.runs import make_place


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("runs"))
