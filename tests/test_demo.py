"""The demo: what a newcomer runs first must learn what it says it learns."""

import pytest

from fastdpo.demo import demo


@pytest.mark.slow
def test_demo_learns(tmp_path):
    result = demo(tmp_path)
    assert 0.3 < result["accuracy_before"] < 0.7
    assert result["accuracy_after"] > 0.95
    assert result["polite_before"] < 0.8 < 0.95 < result["polite_after"]
    demo_again_replaces = (tmp_path / "dpo/model/model.safetensors").stat().st_mtime
    assert demo_again_replaces > 0
