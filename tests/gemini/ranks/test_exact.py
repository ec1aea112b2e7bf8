"""The number of ranks never changes numbers: losses, weights and states are those of one process, bit for bit."""

import pytest
from rank_training import TIERS, Training, Where, check_exact


class Lazy(Training):
    lazy = True


class InBf16(Training):
    precision = "bf16"


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("kind", [Training, Lazy])
def test_two_ranks_train_as_one_process(worlds, kind, tiers):
    check_exact(worlds(2), kind, **TIERS[tiers])


@pytest.mark.parametrize("tiers", TIERS)
def test_in_bf16_too(worlds, tiers):
    check_exact(worlds(2), InBf16, Where.ALONE, **TIERS[tiers])


def test_clipped_by_the_norm_of_all_gradients(worlds):
    check_exact(worlds(2), Training, max_norm=0.05)
