"""The demo: what a newcomer runs first must learn what it says it learns."""

from fastdpo.demo import demo


def test_demo_learns(tmp_path):
    result = demo(tmp_path)
    assert result["accuracy_before"] < 0.75
    assert result["accuracy_after"] > 0.95
    assert result["polite_before"] < 0.8 and result["polite_after"] > 0.95
