"""Lazy refreshes: a subspace that stays is renewed ever more rarely, one that turns in every period, nothing waits."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from galore_pretrain.optim import GaLore, RuleOptimizer
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.execution import GlobalStep
from galore_pretrain.optim.lazy import LONGEST, Schedule, after_probe, after_refresh, empty_schedule, random_overlap
from galore_pretrain.optim.projector import Random, random_basis
from galore_pretrain.optim.update import Step

CPU = torch.device("cpu")
T = 20


def trained(
    gradient_of: Any, updates: int, failed: int = 0, **options: Any
) -> tuple[list[int], list[int], RuleOptimizer, Tensor]:
    """Train one matrix and return the updates whose basis was taken, those that probed, the optimizer, the matrix."""
    p = torch.nn.Parameter(torch.zeros(24, 60))
    settings = {"rank": 4, "update_proj_gap": T, "basis": "svd", "refresh": "lazy"} | options
    rule = GaLore(Adam(), **settings)
    optimizer = RuleOptimizer([{"params": [p], "rule": rule}], lr=0.01)
    execution = GlobalStep(optimizer)
    taken, probed = [], []
    saved = 0
    for number in range(1, updates + 1):
        before = [value.clone() for value in rule.held_bases(optimizer.tensors(p))]
        schedule = optimizer.tensors(p)["schedule"].clone()
        p.grad = gradient_of(number)
        execution.begin(0, 1)
        execution.complete()
        saved += execution.outcome().refreshes_saved
        after = rule.held_bases(optimizer.tensors(p))
        if number > 1 and any(not torch.equal(a, b) for a, b in zip(after, before, strict=True)):
            taken.append(number)
        if not torch.equal(schedule, optimizer.tensors(p)["schedule"]) and rule.probes(Step(number)):
            probed.append(number)
    due = (updates - 1) // T + 1
    assert saved == due - (len(taken) + 1) - failed - len(probed)
    return taken, probed, optimizer, p


def in_subspace(columns: Tensor, seed: int) -> Tensor:
    """A gradient of 24 × 60 in the span of ``columns`` (24 × 4), with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(24, 60, generator=generator) * 0.01
    return columns @ torch.randn(4, 60, generator=generator) + noise


def test_a_subspace_that_stays_is_renewed_ever_more_rarely() -> None:
    """Gaps of 1, 2, 4, 8 and then 16 periods; the noise is measured after the first refresh, and after four more."""
    columns = random_basis((24, 4), "left", 0, CPU)
    taken, probed, _, _ = trained(lambda number: in_subspace(columns, number), 33 * T)
    assert [(number - 1) // T for number in taken] == [1, 3, 7, 15, 31]
    assert probed == [1 + T // 10, 15 * T + 1 + T // 10]


def test_a_subspace_that_turns_is_renewed_in_every_period() -> None:
    """Within a period it stays; each period has another one."""

    def gradient(number: int) -> Tensor:
        return in_subspace(random_basis((24, 4), "left", (number - 1) // T, CPU), number)

    taken, probed, _, _ = trained(gradient, 9 * T)
    assert [(number - 1) // T for number in taken] == list(range(1, 9))
    assert len(probed) == 3


def test_pure_noise_has_no_subspace_to_follow() -> None:
    """Two gradients of the same weights are as far apart as those of many updates: refreshes tell nothing new."""
    taken, _, _, _ = trained(
        lambda number: torch.randn(24, 60, generator=torch.Generator().manual_seed(number)), 33 * T
    )
    assert len(taken) <= 12


@settings(deadline=None, max_examples=100)
@given(overlaps=st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 1)), min_size=1, max_size=30))
def test_a_schedule_goes_on_whatever_it_measures(overlaps: list[tuple[float, float]]) -> None:
    """The next refresh is 1 to 16 periods ahead, and a gap doubles or is halved."""
    values = empty_schedule(torch.empty(0))
    period = 0
    gap = 1.0
    for overlap, noise in overlaps:
        assert Schedule.of(values.tolist()).refreshes(period)
        values = after_refresh(values, period, torch.tensor(overlap), 0.2)
        schedule = Schedule.of(values.tolist())
        assert not schedule.refreshes(period)
        assert 1 <= schedule.gap <= LONGEST
        assert schedule.gap in (gap, 2 * gap, gap / 2)
        gap = schedule.gap
        if schedule.probes(period):
            values = after_probe(values, torch.tensor(noise))
            assert not Schedule.of(values.tolist()).probes(period)
        assert not Schedule.of(values.tolist()).probes(period + 1)
        period = int(schedule.next)


def test_a_saved_schedule_goes_on() -> None:
    columns = random_basis((24, 4), "left", 0, CPU)
    _, _, optimizer, p = trained(lambda number: in_subspace(columns, number), 5 * T)
    other = torch.nn.Parameter(torch.zeros(24, 60))
    rule = optimizer.rule_of(p)
    resumed = RuleOptimizer([{"params": [other], "rule": rule}], lr=0.01)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.tensors(other)["schedule"], optimizer.tensors(p)["schedule"])
    due = []
    for number in range(5 * T + 1, 10 * T):
        resumed.state[other]["step"] = number - 1
        if resumed.is_due(other):
            due.append(number)
    assert due[0] == 7 * T + 1


def test_a_refresh_that_fails_is_tried_again_a_period_later() -> None:
    """A gradient of zeros has no subspace, and leaves basis and schedule as they are."""
    columns = random_basis((24, 4), "left", 0, CPU)

    def gradient(number: int) -> Tensor:
        return torch.zeros(24, 60) if number == T + 1 else in_subspace(columns, number)

    taken, _, _, _ = trained(gradient, 4 * T, failed=1)
    assert [(number - 1) // T for number in taken][:1] == [2]


def test_the_overlap_of_random_subspaces() -> None:
    overlaps = []
    for seed in range(50):
        p, q = (random_basis((30, 6), "left", 2 * seed + i, CPU) for i in range(2))
        overlaps.append(float((p.T @ q).square().sum() / 6))
    assert sum(overlaps) / 50 == pytest.approx(random_overlap([(30, 6), None]), rel=0.1)
    assert random_overlap([(30, 6), (5, 50)]) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"basis": "random"}, "is no answer to where a gradient's subspace is"),
        ({"basis": Random()}, "is no answer"),
        ({"basis": "tracked"}, "is no answer"),
        ({"moments": "reset"}, "nobody knows in advance when"),
        ({"update_proj_gap": 1}, "no update between two refreshes"),
    ],
)
def test_what_cannot_be_lazy_is_refused(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        GaLore(Adam(), refresh="lazy", **options)
