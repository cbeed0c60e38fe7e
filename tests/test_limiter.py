"""The norm-growth limiter: what it lets through, what it keeps, and what an update of zeros does to it."""

import math

import pytest
import torch

from galore_pretrain.optim.limiter import LAST_NORM, last_norm, limit_growth
from galore_pretrain.optim.update import Step


def _limited(norms: list[float], growth: float = 1.01) -> list[float]:
    """Return the norms that updates of these ``norms``, one after another, have behind the limiter."""
    state = last_norm(torch.empty(2))
    limited: list[float] = []
    for count, norm in enumerate(norms, 1):
        factor = limit_growth(torch.tensor(norm), state, Step(count), growth)
        limited.append(float(factor) * norm)
    return limited


def test_growth_is_limited_to_the_factor_and_compounds() -> None:
    expected = [1.0, 1.01, 1.01**2, 0.5, 0.505]
    assert _limited([1.0, 9.0, 9.0, 0.5, 0.6]) == pytest.approx(expected, rel=1e-6)


def test_a_limiter_of_infinite_growth_lets_all_through() -> None:
    norms = [1.0, 100.0, 0.0, 1e6]
    assert _limited(norms, math.inf) == norms


def test_an_update_of_zeros_does_not_hold_those_after_it_at_zero() -> None:
    assert _limited([1.0, 0.0, 3.0, 3.0]) == [1.0, 0.0, 3.0, 3.0]


def test_an_update_that_is_dropped_leaves_the_norm_as_it_was() -> None:
    state = last_norm(torch.empty(2))
    limit_growth(torch.tensor(2.0), state, Step(1), 1.01)
    limit_growth(torch.tensor(math.nan), state, Step(2, valid=torch.tensor(False)), 1.01)
    assert float(state[LAST_NORM]) == 2.0
