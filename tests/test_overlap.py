"""How far a refresh turns a basis, and how far the noise of one gradient would: what is measured, and what is told."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from galore_pretrain.optim import GaLore, GaLoreAdamW, RuleOptimizer, execution
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.build import build_rules
from galore_pretrain.optim.execution import GlobalStep, Layerwise, Outcome
from galore_pretrain.optim.methods import PROJ_TYPES, ROWS
from galore_pretrain.optim.overlap import Bases, OverlapMeans, subspace_overlap
from galore_pretrain.optim.projector import random_basis, svd_basis
from prescribed import meant_for, parameters
from runs import lines, run

CPU = torch.device("cpu")
TURNING = [row for row in ROWS if isinstance(build_rules(row, "sound", **meant_for(row, rank=4))[0], GaLore)]
ALL_KEYS = {"subspace_overlap", "subspace_overlap_noise", "subspace_overlap_paired"}


def basis(m: int, r: int, seed: int) -> Tensor:
    return random_basis((m, r), "left", seed, CPU)


def as_bases(p: Tensor, proj_type: str) -> Bases:
    """A left basis (m × r) as one of the sides that are projected."""
    return {"left": (p, None), "right": (None, p.T), "full": (p, p.T)}[proj_type]


@settings(deadline=None, max_examples=60)
@given(
    r=st.integers(1, 8),
    more=st.integers(1, 20),
    angle=st.floats(0, math.pi),
    proj_type=st.sampled_from(["left", "right", "full"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_a_turn_in_one_plane_costs_its_squared_sine(
    r: int, more: int, angle: float, proj_type: str, dtype: torch.dtype, seed: int
) -> None:
    """Of r directions one turns by the angle, and the new basis may be any of the turned subspace."""
    columns = basis(r + more, r + 1, seed)
    old, outside = columns[:, :r], columns[:, r]
    turned = old.clone()
    turned[:, 0] = old[:, 0] * math.cos(angle) + outside * math.sin(angle)
    turned = turned @ basis(r, r, seed + 1)
    overlap = subspace_overlap(as_bases(old.to(dtype), proj_type), as_bases(turned, proj_type))
    assert overlap.dtype == torch.float32
    assert 0 <= overlap <= 1
    expected = 1 - math.sin(angle) ** 2 / r
    assert overlap.item() == pytest.approx(expected, abs=1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_subspace_overlaps_itself_wholly_however_its_basis_is_rounded(dtype: torch.dtype) -> None:
    p = basis(200, 50, 1)
    assert subspace_overlap((p.to(dtype), None), (p, None)).item() == pytest.approx(1, abs=1e-5)


def test_two_sides_are_averaged() -> None:
    old, orthogonal = torch.eye(6)[:, :2], torch.eye(6)[:, 2:4]
    assert subspace_overlap((old, old.T), (old, orthogonal.T)).item() == pytest.approx(0.5)


def test_means_are_of_what_is_known() -> None:
    means = OverlapMeans()
    for value in (0.25, math.nan, 0.75):
        means.add({"a": torch.tensor(value), "b": torch.tensor(math.nan)})
    assert means.take() == {"a": 0.5}
    assert means.take() == {}


def updates(
    rule: Any,
    number: int,
    *,
    micro_batches: int = 1,
    mode: Any = GlobalStep,
    shapes: tuple[tuple[int, ...], ...] = ((24, 40),),
    noise: float = 1.0,
    dtype: torch.dtype = torch.float32,
    broken: int | None = None,
) -> tuple[list[Outcome], RuleOptimizer]:
    """The outcomes of updates by one gradient and the noise of each micro-batch; one, ``broken``, is not finite."""
    params = parameters(list(shapes), dtype)
    optimizer = RuleOptimizer([{"params": params, "rule": rule}], lr=0.01)
    updater = mode(optimizer, 0.0)
    generator = torch.Generator().manual_seed(7)
    signals = [torch.randn(p.shape, generator=generator) for p in params]
    outcomes = []
    for count in range(1, number + 1):
        for i in range(micro_batches):
            grads = [s + noise * torch.randn(s.shape, generator=generator) for s in signals]
            if count == broken:
                grads[0][0, 0] = math.nan
            updater.begin(i, micro_batches)
            torch.autograd.backward(params, [grad.to(dtype) for grad in grads])
        updater.complete()
        outcomes.append(updater.outcome())
    return outcomes, optimizer


def galore(**options: Any) -> GaLore:
    return GaLore(Adam(), **{"rank": 4, "update_proj_gap": 3, "basis": "svd", "refresh": "together"} | options)


@pytest.mark.parametrize("mode", [GlobalStep, Layerwise])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_the_same_gradient_has_the_same_subspace(proj_type: str, mode: Any) -> None:
    """It is told where a refresh is due, but not of the first, which replaces a random basis."""
    outcomes, _ = updates(galore(proj_type=proj_type), 8, noise=0.0, mode=mode)
    told = {count: outcome.overlaps for count, outcome in enumerate(outcomes, 1) if outcome.overlaps}
    assert told.keys() == {4, 7}
    for overlaps in told.values():
        assert overlaps == {"subspace_overlap": pytest.approx(1, abs=1e-4)}


def test_the_first_refresh_of_a_staggered_matrix_is_not_told() -> None:
    """Of two matrices with a gap of 20, one is due first at update 1 and one at 2."""
    rule = galore(refresh="staggered", update_proj_gap=20)
    outcomes, optimizer = updates(rule, 23, shapes=((24, 40), (40, 24)))
    firsts = {optimizer.next_due(p, 1) for p in optimizer.state}
    assert {count for count, outcome in enumerate(outcomes, 1) if outcome.overlaps} == {f + 20 for f in firsts if f}
    assert min(f for f in firsts if f) < 3


def test_random_subspaces_overlap_by_their_share_of_the_dimensions() -> None:
    """And no noise of a gradient is told of bases that have nothing of it."""
    outcomes, _ = updates(galore(basis="random", update_proj_gap=1), 200, micro_batches=2)
    assert all(outcome.overlaps.keys() == {"subspace_overlap"} for outcome in outcomes[1:])
    overlaps = [outcome.overlaps["subspace_overlap"] for outcome in outcomes[1:]]
    assert sum(overlaps) / len(overlaps) == pytest.approx(4 / 24, rel=0.1)


@pytest.mark.parametrize("broken", [None, 4])
def test_an_overlap_is_the_mean_over_the_matrices_that_were_renewed(broken: int | None) -> None:
    """One whose gradient is not finite keeps its basis, and is left out."""
    shapes = ((24, 40), (30, 20))
    outcomes, _ = updates(galore(), 4, shapes=shapes, broken=broken)
    alone = []
    for kept in range(2):

        def subspace(grad: Tensor, rank: int, side: Any, previous: Tensor, kept: int = kept) -> Tensor:
            if tuple(grad.shape) != shapes[kept]:
                return torch.full_like(previous, math.nan)
            return svd_basis(grad, rank, side, previous)

        one, _ = updates(galore(basis=subspace), 4, shapes=shapes)
        alone.append(one[3].overlaps["subspace_overlap"])
    expected = alone[1] if broken else sum(alone) / 2
    assert outcomes[3].overlaps == {"subspace_overlap": pytest.approx(expected, rel=1e-5)}


def test_nothing_is_told_where_every_refresh_fails() -> None:
    outcomes, _ = updates(galore(), 4, micro_batches=2, broken=4)
    assert outcomes[3].skipped == 1
    assert outcomes[3].overlaps == {}


@pytest.mark.parametrize("mode", [GlobalStep, Layerwise])
@pytest.mark.parametrize("micro_batches", [2, 3, 8])
@pytest.mark.parametrize("row", TURNING)
def test_noise_is_told_beside_the_overlap_of_the_same_matrix(row: str, micro_batches: int, mode: Any) -> None:
    rule, _ = build_rules(row, "sound", **meant_for(row, rank=4, update_proj_gap=3, refresh="together"))
    outcomes, _ = updates(rule, 5, micro_batches=micro_batches, mode=mode, shapes=((24, 40), (64, 64)))
    assert [outcome.overlaps.keys() for outcome in outcomes] == [set(), set(), set(), ALL_KEYS, set()]
    assert all(0 < value <= 1 for value in outcomes[3].overlaps.values())


def test_noise_is_of_the_halves() -> None:
    """Equal micro-batches have one subspace; those of independent noise overlap like random subspaces."""
    equal, _ = updates(galore(), 4, micro_batches=4, noise=0.0)
    assert equal[3].overlaps["subspace_overlap_noise"] == pytest.approx(1, abs=1e-4)
    little, _ = updates(galore(), 4, micro_batches=4, noise=1.0)
    much, _ = updates(galore(update_proj_gap=1), 100, micro_batches=4, noise=1e4)
    mean = sum(outcome.overlaps["subspace_overlap_noise"] for outcome in much[1:]) / 99
    assert mean == pytest.approx(4 / 24, rel=0.1)
    assert mean < little[3].overlaps["subspace_overlap_noise"] < 1


def test_a_steady_gradient_turns_no_more_than_its_noise() -> None:
    """At the same weights all that turns a basis is noise, and halves have more of it than the whole."""
    outcomes, _ = updates(galore(update_proj_gap=1), 40, micro_batches=4, noise=2.0)
    told = [outcome.overlaps for outcome in outcomes[1:]]
    noise, paired = (sum(o[f"subspace_overlap_{name}"] for o in told) for name in ("noise", "paired"))
    assert paired > noise
    assert [o["subspace_overlap"] for o in told] == [o["subspace_overlap_paired"] for o in told]


def test_all_matrices_of_the_smallest_shape_come_by() -> None:
    chosen = set()
    params = parameters([(24, 40), (24, 40), (24, 40), (40, 50)])
    optimizer = RuleOptimizer([{"params": params, "rule": galore(update_proj_gap=1)}])
    updater = GlobalStep(optimizer, 0.0)
    for _ in range(30):
        for i in range(2):
            updater.begin(i, 2)
            torch.autograd.backward(params, [torch.randn_like(p) for p in params])
        chosen |= {i for i, p in enumerate(params) if optimizer.pending.gradients[p].first_half is not None}
        updater.complete()
    assert chosen == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", TURNING)
def test_the_measure_changes_no_bit(row: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of what is trained nor of torch's generator."""
    results = []
    for is_measured in (True, False):
        if not is_measured:
            monkeypatch.setattr(execution, "_keep_first_half", lambda due, gradients: None)
            monkeypatch.setattr(execution, "overlaps_of_refresh", lambda overlap, noise: None)
        rule, _ = build_rules(row, "sound", **meant_for(row, rank=4, update_proj_gap=2))
        torch.manual_seed(0)
        outcomes, optimizer = updates(
            rule, 7, micro_batches=3, mode=Layerwise, dtype=dtype, shapes=((24, 40), (64, 64))
        )
        told = [outcome.overlaps.keys() == ALL_KEYS for outcome in outcomes]
        assert any(told) == is_measured
        state = [value for p in optimizer.state for value in (p, *optimizer.tensors(p).values())]
        results.append([*state, torch.get_rng_state()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_a_dropped_update_tells_nothing_later() -> None:
    params = parameters([(24, 40)])
    optimizer = RuleOptimizer([{"params": params, "rule": galore(update_proj_gap=1)}])
    updater = Layerwise(optimizer, 0.0)
    for goes_on in (True, True, False):
        for i in range(2):
            updater.begin(i, 2)
            torch.autograd.backward(params, [torch.randn_like(p) for p in params])
        if goes_on:
            updater.complete()
        else:
            updater.discard()
    assert updater.outcome().overlaps == {}


def test_a_training_that_reads_no_overlaps_gathers_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another's trainer nobody reads them: the last ones are kept."""
    monkeypatch.setattr("galore_pretrain.optim.overlap._MOST_UNREAD", 7)
    p = torch.nn.Parameter(torch.randn(12, 8))
    optimizer = GaLoreAdamW([{"params": [p], "rank": 2, "update_proj_gap": 1}], lr=0.01)
    for _ in range(20):
        p.grad = torch.randn(12, 8)
        optimizer.step()
    assert [len(kept) for kept in optimizer.overlaps.overlaps.values()] == [7]
    assert 0 < optimizer.overlaps.take()["subspace_overlap"] < 1


@pytest.mark.parametrize("layerwise", ["--layerwise", "--no-layerwise"])
def test_a_run_logs_them_at_the_updates_that_refresh(tmp_path: Path, tiny_config: str, layerwise: str) -> None:
    flags = ("--optim", "galore_adamw", "--batch-size", "2", "--refresh", "together", layerwise)
    done = run(tiny_config, tmp_path / "run", *flags)
    assert done.returncode == 0, done.stderr
    told = {row["step"]: row.keys() & ALL_KEYS for row in lines(tmp_path / "run")}
    assert {step for step, keys in told.items() if keys} == {6, 11}
    assert told[6] == told[11] == ALL_KEYS
