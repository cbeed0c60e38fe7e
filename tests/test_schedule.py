"""The learning rate as a function of the step, and when a run is over."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from galore_pretrain.train.schedule import Schedule


def test_sound_schedule_starts_above_zero_and_ends_at_the_floor() -> None:
    schedule = Schedule(lr=1.0, steps=100, warmup_steps=10, min_lr_ratio=0.1)
    rates = [schedule.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert rates[-1] == pytest.approx(0.1)
    assert rates[54] == pytest.approx(0.1 + 0.9 * 0.5)
    assert rates[9:] == sorted(rates[9:], reverse=True)


def test_reference_schedule_is_the_published_lambda() -> None:
    """peft_pretraining's cosine for update s: s / warmup, then min + (1 − min)·½(1 + cos π(s − w)/(N − w))."""
    schedule = Schedule(lr=1.0, steps=100, warmup_steps=10, min_lr_ratio=0.1, numerics="reference")
    for s in range(100):
        published = s / 10 if s < 10 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (s - 10) / 90))
        assert schedule.lr_at(s) == pytest.approx(published)


def test_linear() -> None:
    schedule = Schedule(lr=2.0, steps=10, warmup_steps=0, min_lr_ratio=0.0, scheduler="linear")
    assert [schedule.lr_at(s) for s in range(10)] == pytest.approx([2 * (9 - s) / 10 for s in range(10)])


@given(
    st.integers(1, 50),
    st.integers(100, 10**6),
    st.integers(1, 1000),
    st.integers(0, 40),
    st.sampled_from(["cosine", "linear"]),
)
def test_max_tokens_is_the_same_curve_over_tokens(
    steps: int, tokens: int, uneven: int, warmup: int, scheduler: str
) -> None:
    """With equal tokens in each update it is the schedule in steps; with any, it stays within its bounds."""
    warmup = min(warmup, steps)
    by_steps = Schedule(lr=1.0, steps=steps, warmup_steps=warmup, scheduler=scheduler)
    by_tokens = Schedule(lr=1.0, max_tokens=steps * tokens, warmup_steps=warmup, scheduler=scheduler)
    for s in range(steps):
        assert by_tokens.lr_at(s, s * tokens, tokens) == pytest.approx(by_steps.lr_at(s), abs=1e-6)
        assert 0 <= by_tokens.lr_at(s, s * tokens, uneven) <= 1


def test_the_end() -> None:
    assert not Schedule(lr=1, steps=3).is_over(2, 10**9)
    assert Schedule(lr=1, steps=3).is_over(3, 0)
    assert not Schedule(lr=1, max_tokens=100).is_over(10**9, 99)
    assert Schedule(lr=1, max_tokens=100).is_over(1, 100)
