"""The learning rate as a function of the step, and when a run is over."""

import math
from dataclasses import replace

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


def test_wsd_stays_and_falls_at_the_end() -> None:
    schedule = Schedule(lr=2.0, steps=20, warmup_steps=4, decay_steps=5, min_lr_ratio=0.0, scheduler="wsd")
    rates = [schedule.lr_at(s) for s in range(20)]
    assert rates == pytest.approx([0.5, 1.0, 1.5, *[2.0] * 12, 1.6, 1.2, 0.8, 0.4, 0.0])
    floor = replace(schedule, min_lr_ratio=0.1)
    assert floor.lr_at(19) == pytest.approx(0.2)
    assert [step for step in range(21) if schedule.is_stable(step)] == list(range(4, 16))
    assert not replace(schedule, scheduler="cosine").is_stable(10)


def test_wsd_by_tokens() -> None:
    """The same with equal tokens in each update; without --decay-steps, over the last tenth."""
    by_steps = Schedule(lr=1.0, steps=40, warmup_steps=4, decay_steps=8, min_lr_ratio=0.1, scheduler="wsd")
    by_tokens = replace(by_steps, steps=None, max_tokens=40 * 1000)
    for s in range(40):
        assert by_tokens.lr_at(s, s * 1000, 1000) == pytest.approx(by_steps.lr_at(s), abs=1e-6)
    tenth = replace(by_tokens, decay_steps=None)
    assert tenth.lr_at(35, 35000, 1000) == pytest.approx(1.0)
    assert tenth.lr_at(37, 37000, 1000) == pytest.approx(0.1 + 0.9 / 2)
    assert not by_tokens.is_stable(10)


@pytest.mark.parametrize("numerics", ["sound", "reference"])
@given(step=st.integers(0, 60), lengths=st.tuples(*[st.integers(1, 30)] * 6))
def test_what_is_stable_has_had_the_same_rates(numerics: str, step: int, lengths: tuple[int, ...]) -> None:
    """Two runs by wsd, each before its decay: no rate so far but those of the warm-up tells them apart."""
    runs = []
    for warmup, stable, decay in (lengths[:3], lengths[3:]):
        steps = warmup + stable + decay
        runs.append(
            Schedule(lr=1.0, steps=steps, warmup_steps=warmup, decay_steps=decay, scheduler="wsd", numerics=numerics)
        )
    if all(run.is_stable(step) for run in runs):
        after_warmup = range(max(lengths[0], lengths[3]), step)
        assert all(run.lr_at(s) == 1.0 for run in runs for s in after_warmup)


@given(
    st.integers(1, 50),
    st.integers(100, 10**6),
    st.integers(1, 1000),
    st.integers(0, 40),
    st.sampled_from(["cosine", "linear", "wsd"]),
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
