"""What a run says on the terminal where a number, or a limit, says nothing."""

import io
import random
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastdpo.data.packing import places, split_step
from fastdpo.training.log import RunLog, _may_end
from fastdpo.training.metrics import Sums
from tests import tiny


def said(tmp_path, margin, accuracy):
    console, sums = Console(file=io.StringIO(), width=200), Sums()
    for name, value in (("loss", 0.69), ("rewards/accuracies", accuracy), ("rewards/margins", margin)):
        sums.add(name, value)
    log = RunLog(tmp_path, console, SimpleNamespace(log=lambda step, record: None))
    log.held_out(0, sums, {})
    return console.file.getvalue()


def test_pairs_that_tie_have_no_accuracy(tmp_path):
    assert "accuracy all ties margin 0\n" in said(tmp_path, -5.39e-14, 0.0)
    assert "accuracy 0.000 margin -0.2500" in said(tmp_path, -0.25, 0.0)
    assert '"eval_rewards/margins": -5.39e-14' in (tmp_path / "metrics.jsonl").read_text()  # as it is


@pytest.mark.parametrize("share", [True, False])
def test_a_limit_that_is_not_told_changes_nothing(share):
    """Where the scored tokens' limit is said to be out of reach, steps are cut as without it."""
    rng, told = random.Random(0), 0
    for _ in range(200):
        lengths = [(rng.randint(1, 12), [rng.randint(1, 9) for _ in range(2)]) for _ in range(6)]
        groups = [tiny.group(row, *sizes) for row, sizes in enumerate(lengths)]
        scored, job = rng.randint(1, 120), SimpleNamespace(max_tokens=rng.randint(2, 90), batch_size=3)
        stage = SimpleNamespace(groups=groups, job=job)
        if _may_end(stage, scored, [places(group, share) for group in groups]):
            told += 1
            continue
        for step in (groups[:3], groups[3:], groups[::2], groups[2:5]):
            cut, whole = (split_step(step, job.max_tokens, most, share) for most in (scored, None))
            assert cut == whole
    assert 20 < told < 180
