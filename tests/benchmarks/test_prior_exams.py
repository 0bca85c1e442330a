"""benchmarks.learning.prior_exams: each arm's own keys, and the table of what was found."""

import pytest

from benchmarks.learning import prior_exams
from benchmarks.tables import learning_blocks
from fastdpo.convert.convert import config_of


@pytest.mark.parametrize("arm", prior_exams.ARMS)
def test_an_arm_is_the_example_but_for_its_own_keys(arm, tmp_path):
    config = config_of(prior_exams.keys(tmp_path, arm, 2), {})
    assert (config.learning_rate, config.num_epochs, config.seed) == (3e-5, 3, 2)
    assert config.objective == ("sft" if arm.startswith("SFT") else "sigmoid")
    gamma = config.objective_args.get("gamma") if config.objective_args else None
    assert gamma == prior_exams.ARMS[arm].get("objective_args", {}).get("gamma")
    assert config.model == str(tmp_path / "start")


def test_the_table_has_an_arm_a_line():
    wrote = lambda lines: {
        how: {"lines": lines, "reports": 0.5, "findings": 0.9} for how in ("greedy", "sampled")
    }
    arms = {"start": {"1": wrote(2.0), "2": wrote(1.0)}, "gamma 0.5": {"1": wrote(0.5)}, "gamma 0": {}}
    record = {"arms": arms, "sizes": {"pairs": 4, "held_out": 8}, "config": {"num_epochs": 3}, "tuned": "so"}
    text = learning_blocks.prior_exams(record | {"threads": 1, "cpu": "CPU", "gpu": None}, "[results](x)")
    start, half, none = text.splitlines()[-3:]
    assert start.startswith("| start | 1.500 ± 0.707 (2) | |") and start.endswith("| 1.34 in 51.6% |")
    assert half.startswith("| gamma 0.5 | 0.500 ± 0.000 (1) | 4.0x |") and "4.8x" in half
    assert none.startswith("| gamma 0 | - | | - |")
