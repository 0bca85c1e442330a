"""Steps on several ranks beside the definition: the same gradients, loss and memory, however they are
dealt."""

import pytest

from tests.distributed import steps
from tests.distributed.processes import Ranks

OBJECTIVES = {
    "decomposable": ("sigmoid", {"label_smoothing": 0.1}),
    "of tokens": ("sft", {}),
    "of responses": ({"rloo": 1.0, "sft": 0.1}, {}),
    "a mixture": ({"sigmoid": 0.8, "sft": 0.2}, {}),
    "rescaled": ("drdpo", {"beta_prime": 0.2}),
    "coupled": ("aot", {}),
    "coupled within": ("drdpo", {"scope": 2}),
    "z0": ("kto", {}),
    "memory": ("bco", {}),
    "statistics": ("wpo", {}),
}


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("mode", ["replicate", "shard"])
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_step_of_two_ranks_is_the_definition(two, kind, mode):
    for cap in (70, 10**6):  # several rounds, one
        for apart, loss, memory, wanted, _ in two(steps.one_step, *OBJECTIVES[kind], mode, cap):
            assert apart < 1e-9 and loss < 1e-9
            assert memory == pytest.approx(wanted)


@pytest.mark.parametrize("mode", ["replicate", "shard"])
@pytest.mark.parametrize("tied, lora", [(False, False), (True, True), (False, True)])
def test_heads_of_their_own_and_loras(two, mode, tied, lora):
    for kind in ("decomposable", "rescaled", "coupled"):
        for apart, loss in two(steps.beside_one, *OBJECTIVES[kind], mode, tied, lora):
            assert apart < 1e-6 and loss < 1e-6


@pytest.mark.parametrize("mode", ["replicate", "shard"])
@pytest.mark.parametrize("cap", [40, 10**6])
def test_a_mixtures_balance_loss_is_a_mean_over_all_microbatches(two, mode, cap):
    for found in two(steps.balanced_step, mode, cap):
        assert max(found) < 1e-9


@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_a_rank_without_work_computes_as_often_and_counts_nothing(two, mode):
    for kind in ("decomposable", "rescaled", "coupled"):
        found = two(steps.one_step, *OBJECTIVES[kind], mode, 70, n_groups=1)
        assert [parts for *_, parts in found] == [1, 0]
        assert all(apart < 1e-9 and loss < 1e-9 for apart, loss, *_ in found)


@pytest.mark.slow
@pytest.mark.parametrize("size", [3, 4])
def test_three_and_four_ranks(size):
    ranks = Ranks(size, per_node=2 if size == 4 else None)
    for mode in ("replicate", "shard", "hybrid")[: size - 1]:
        for kind in OBJECTIVES:
            for apart, loss, memory, wanted, _ in ranks(steps.one_step, *OBJECTIVES[kind], mode, 70):
                assert apart < 1e-9 and loss < 1e-9, (mode, kind)
                assert memory == pytest.approx(wanted)
    ranks.close()
