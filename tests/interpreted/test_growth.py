"""The kernel of channels' factors, against fp64 and by the limiter's rules."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from galore_pretrain.tensors.growth import FactorRule, channel_factors


def in_fp64(low: Tensor, direction: Tensor, grad: Tensor, last: float, rule: FactorRule) -> tuple[Tensor, float]:
    low, direction, grad = (t.double().abs() for t in (low, direction, grad))
    if rule.channelwise:
        factors = rule.multiple * direction / (low + rule.eps)
        square = factors**2 * (grad**2 - rule.share * low**2)
    else:
        factors = (rule.multiple * direction.norm() / (low.norm() + rule.eps)).expand_as(low)
        square = factors**2 * grad**2
    norm = math.sqrt(max(0.0, square.sum().item()))
    limit = 1.0
    if 0 < rule.growth * last < norm:
        limit = rule.growth * last / norm
    return factors * limit, norm * limit


@example(channels=4, channelwise=True, share=0.0, growth=math.inf, last=1e-20, dtype=torch.float32, seed=0)
@settings(max_examples=40)
@given(
    channels=st.integers(1, 3000),
    channelwise=st.booleans(),
    share=st.sampled_from([0.0, 0.4375]),
    growth=st.sampled_from([1.0, 1.01, 3.0, math.inf]),
    last=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e9]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 100),
)
def test_factors_are_those_of_fp64(
    channels: int, channelwise: bool, share: float, growth: float, last: float, dtype: torch.dtype, seed: int
) -> None:
    """Of numbers of either sign, whose magnitudes are the norms."""
    generator = torch.Generator().manual_seed(seed)
    low, direction = (torch.randn(channels, generator=generator).to(dtype) for _ in range(2))
    grad = 2 * low.float().abs() + torch.rand(channels, generator=generator)
    rule = FactorRule(0.7, growth, share if channelwise else 0.0, 1e-8, channelwise)
    kept = torch.tensor(last)
    factors = channel_factors(low, direction, grad, kept, None, rule)
    expected, norm = in_fp64(low, direction, grad, last, rule)
    torch.testing.assert_close(factors.double(), expected, rtol=2e-5, atol=1e-12)
    assert kept.item() == pytest.approx(norm, rel=2e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_faulty_gradient_leaves_the_last_norm_alone(value: float) -> None:
    rule = FactorRule(1.0, 1.01, 0.0, 1e-8, True)
    last = torch.tensor(3.0)
    ones = torch.ones(5)
    channel_factors(ones, ones, torch.tensor([1.0, value, 1, 1, 1]), last, torch.tensor(False), rule)
    assert last.item() == 3
    factors = channel_factors(ones, ones, ones, last, torch.tensor(True), rule)
    assert last.item() == pytest.approx(math.sqrt(5))
    assert torch.equal(factors, ones)


def test_zeros_give_zeros_and_do_not_hold_the_next_update() -> None:
    rule = FactorRule(1.0, 1.01, 0.0, 1e-8, True)
    last = torch.tensor(0.0)
    zeros, ones = torch.zeros(4), torch.ones(4)
    assert torch.equal(channel_factors(zeros, zeros, zeros, last, None, rule), zeros)
    assert last.item() == 0
    assert torch.allclose(channel_factors(ones, ones, ones, last, None, rule), ones)
    assert last.item() == pytest.approx(2.0)
