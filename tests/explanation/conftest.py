import pytest

from tests.explanation.runs import Place


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return Place(tmp_path_factory.mktemp("explained"))
