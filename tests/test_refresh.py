"""When a basis is renewed, what becomes of the moments, and what if it fails."""

import warnings
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim import GaLore, GaLoreAdamW, RuleOptimizer
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.build import build_rules
from galore_pretrain.optim.execution import Skips
from galore_pretrain.optim.methods import ROWS
from galore_pretrain.optim.moments import Blockwise8bit, Dense
from galore_pretrain.optim.natural import Natural
from galore_pretrain.optim.projector import BASES, random_basis
from galore_pretrain.optim.sgd import SGD
from galore_pretrain.optim.update import Step
from prescribed import parameters, train


@pytest.mark.parametrize(
    ("refresh", "phase", "due"),
    [("together", 0.5, {1, 21, 41}), ("staggered", 0.5, {2, 22, 42}), ("staggered", 0.0, {1, 21, 41})],
)
def test_refresh_schedule(refresh: str, phase: float, due: set[int]) -> None:
    calls: list[int] = []
    current = [0]

    def spy(grad: Tensor, rank: int, side: str, previous: Tensor) -> Tensor:
        calls.append(current[0])
        return (
            random_basis((8, rank), "left", 0, grad.device)
            if side == "left"
            else random_basis((rank, 8), "right", 0, grad.device)
        )

    rule = GaLore(SGD(), rank=2, update_proj_gap=20, basis=spy, refresh=refresh)
    state = rule.init(torch.zeros(8, 8))
    for current[0] in range(1, 45):
        rule.full_update(torch.ones(8, 8), state, Step(current[0], phase=phase))
    assert set(calls) == due


def rotation(n: int, seed: int) -> Tensor:
    return random_basis((n, n), "left", seed, torch.device("cpu"))


@pytest.mark.parametrize("proj_type", ["left", "right", "full"])
@pytest.mark.parametrize("permuted", [False, True])
def test_projected_moments_follow_the_basis(proj_type: str, permuted: bool) -> None:
    """Of full rank, a new basis is a rotation: Pm, the first moment in the weight's coordinates, stays what it was.

    A permutation of the basis permutes the second moment too.
    """
    n = 8
    first = rotation(n, 3)
    permutation = torch.eye(n)[torch.randperm(n, generator=torch.Generator().manual_seed(5))]
    second = permutation.T @ first if permuted else rotation(n, 4)
    sides = 2 if proj_type == "full" else 1
    bases = iter([first] * sides + [second] * sides)

    def scripted(grad: Tensor, rank: int, side: str, previous: Tensor) -> Tensor:
        basis = next(bases)
        return basis if side == "right" else basis.T

    rule = GaLore(
        Adam(), rank=n, proj_type=proj_type, basis=scripted, refresh="together", update_proj_gap=3, moments="project"
    )
    state = rule.init(torch.zeros(n, n))
    grads = [torch.randn(n, n, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    for count in (1, 2, 3):
        rule.full_update(grads[count - 1], state, Step(count))

    def in_full(name: str) -> Tensor:
        x = state[name]
        x = x if "left_basis" not in state else state["left_basis"] @ x
        return x if "right_basis" not in state else x @ state["right_basis"]

    mean = in_full("exp_avg")
    # A mean square is at least the square of the mean; bias-corrected moments can say otherwise.
    least = (state["exp_avg"] / (1 - 0.9**3)).square() * (1 - 0.999**3)
    square = torch.maximum(state["exp_avg_sq"], least)
    rule.set_bases(rule.find_bases(grads[3], state, Step(4)), state, Step(4))
    assert torch.allclose(in_full("exp_avg"), mean, atol=5e-6)  # of three rotations in fp32
    assert (state["exp_avg_sq"] >= 0).all()
    if permuted:  # mean and spread are taken apart and put together again, hence the tolerance
        square = square if "left_basis" not in state else permutation.T @ square
        square = square if "right_basis" not in state else square @ permutation
        assert torch.allclose(state["exp_avg_sq"], square, rtol=1e-3)


def test_reset_begins_anew_with_every_basis() -> None:
    """After a refresh, an update is the one that a new optimizer with that basis would make."""
    options: dict[str, Any] = {"rank": 4, "refresh": "together", "basis": "svd"}
    grads = [torch.randn(12, 10, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    long = GaLore(Adam(), update_proj_gap=5, moments="reset", **options)
    state = long.init(torch.zeros(12, 10))
    for count, grad in enumerate(grads, 1):
        direction = long.full_update(grad, state, Step(count))
        if count % 5 == 1:
            fresh = GaLore(Adam(), update_proj_gap=5, **options)
            other = fresh.init(torch.zeros(12, 10))
        expected = fresh.full_update(grad, other, Step((count - 1) % 5 + 1))
        assert torch.equal(direction.whole() * direction.factor, expected.whole() * expected.factor)


@pytest.mark.parametrize("store", [Dense(), Blockwise8bit()], ids=["dense", "8bit"])
@pytest.mark.parametrize(("is_valid", "is_found"), [(True, True), (True, False), (False, True), (False, False)])
def test_reset_begins_anew_where_the_update_counts(store: Any, is_valid: bool, is_found: bool) -> None:
    """Also where the refresh fails, but not where the update is skipped, which a device alone may know."""
    rule = GaLore(Adam(store=store), rank=64, refresh="together", update_proj_gap=2, moments="reset")
    state = rule.init(torch.zeros(64, 96))
    grads = [torch.randn(64, 96, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    for count in (1, 2):
        rule.full_update(grads[count - 1], state, Step(count))
    before = {name: value.clone() for name, value in state.items()}
    step = Step(3, valid=torch.tensor(is_valid))
    found = rule.find_bases(grads[2], state, step)
    rule.set_bases(found._replace(found=torch.tensor(is_found)), state, step)
    for name, value in state.items():
        if name == "left_basis":
            assert torch.equal(value, before[name]) != (is_valid and is_found)
        elif is_valid:
            assert not value.any(), name
        else:
            assert torch.equal(value, before[name]), name
    assert [bool(failure) for failure in step.failures] == ([] if is_found else [is_valid])


@pytest.mark.parametrize("row", [row for row in ROWS if "galore" in row])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_a_gradient_that_is_not_finite_changes_no_moments_at_a_refresh(row: str, bad: float) -> None:
    """Under ``reset``. They begin anew with the next refresh."""
    rule, _ = build_rules(row, "sound", rank=64, update_proj_gap=3, moments="reset", refresh="together")
    (p,) = parameters([(64, 96)])
    optimizer = RuleOptimizer([{"params": [p], "rule": rule}], lr=0.01)
    for count in range(1, 8):
        p.grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(count))
        if count == 4:
            p.grad[5, 7] = bad
        before = {name: value.clone() for name, value in optimizer.tensors(p).items()}
        weight = p.detach().clone()
        optimizer.step()
        is_same = all(torch.equal(value, before[name]) for name, value in optimizer.tensors(p).items())
        assert is_same == torch.equal(p, weight) == (count == 4)
    assert optimizer.read_skips() == Skips(skipped=1)


def test_products_of_a_history_that_a_skipped_refresh_left_are_those_of_its_gradients() -> None:
    """Though updates are counted anew, as if the history had been begun anew."""
    rule = GaLore(
        Natural(Adam(), history=4), rank=4, refresh="together", update_proj_gap=8, moments="reset", basis="svd"
    )
    (p,) = parameters([(8, 12)])
    optimizer = RuleOptimizer([{"params": [p], "rule": rule}], lr=0.01)
    for count in range(1, 12):
        p.grad = torch.randn(8, 12, generator=torch.Generator().manual_seed(count)) + 3
        if count == 9:
            p.grad[5, 7] = torch.inf
        optimizer.step()
    state = optimizer.tensors(p)
    history = state["history"].double()
    assert (history != 0).any(1).all()
    assert torch.allclose(state["gram"], history @ history.T, rtol=1e-6)


@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
@pytest.mark.parametrize("row", [row for row in ROWS if "galore" in row])
def test_every_row_takes_every_way_of_carrying_moments(row: str, moments: str) -> None:
    rule, _ = build_rules(row, "sound", rank=40, update_proj_gap=4, moments=moments, refresh="staggered")
    for shape, proj_type in product([(96, 128), (128, 96)], ("std", "full")):
        params = parameters([shape])
        train(RuleOptimizer([{"params": params, "rule": replace(rule, proj_type=proj_type)}]), params, 13)
        assert params[0].isfinite().all()


def test_a_failed_decomposition_keeps_the_basis_and_counts() -> None:
    fail = [False]

    def sometimes(grad: Tensor, rank: int, side: str, previous: Tensor) -> Tensor:
        if fail[0]:
            raise torch.linalg.LinAlgError("the algorithm failed to converge")
        return BASES["svd"](grad, rank, "right", previous)

    def nothing(grad: Tensor, rank: int, side: str, previous: Tensor) -> Tensor:
        return torch.full_like(previous, torch.nan) if fail[0] else BASES["svd"](grad, rank, "right", previous)

    for basis in (sometimes, nothing):
        fail[0] = False
        p = torch.zeros(12, 8, requires_grad=True)
        rule = GaLore(Adam(), rank=3, basis=basis, refresh="together", update_proj_gap=2, moments="project")
        optimizer = RuleOptimizer([{"params": [p], "rule": rule}])
        for i in range(5):
            p.grad = torch.randn(12, 8, generator=torch.Generator().manual_seed(i))
            fail[0] = i == 2
            before = optimizer.state[p]["right_basis"].clone()
            optimizer.step()
            faults = optimizer.read_skips()
            assert (faults.skipped, faults.failed_refreshes) == (0, int(i == 2))
            assert torch.equal(before, optimizer.state[p]["right_basis"]) == (i in (1, 2, 3))


@pytest.mark.parametrize("basis", ["svd", "randomized"])
def test_a_gradient_of_zeros_leaves_the_basis(basis: str) -> None:
    p = torch.ones(12, 8, requires_grad=True)
    rule = GaLore(Adam(), rank=3, basis=basis, refresh="together", update_proj_gap=2)
    optimizer = RuleOptimizer([{"params": [p], "rule": rule}])
    before = None
    for grad in (torch.randn(12, 8), torch.randn(12, 8), torch.zeros(12, 8)):
        before = optimizer.state[p]["right_basis"].clone()
        p.grad = grad
        optimizer.step()
    assert torch.equal(optimizer.state[p]["right_basis"], before)
    assert optimizer.read_skips().failed_refreshes == 1


def test_one_warning_for_a_rank_above_the_dimensions() -> None:
    shapes = [(8, 6), (6, 8), (5, 5)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        RuleOptimizer([{"params": parameters(shapes), "rule": GaLore(Adam(), rank=99)}])
    assert len(caught) == 1
    assert "rank 99" in str(caught[0].message)


def test_an_optimizer_says_which_matrix_is_due() -> None:
    """As clients that hold one optimizer for each parameter ask. A vector never is."""
    matrix, vector = torch.nn.Parameter(torch.ones(6, 8)), torch.nn.Parameter(torch.ones(6))
    groups: list[dict[str, Any]] = [{"params": [matrix], "rank": 2, "update_proj_gap": 4}, {"params": [vector]}]
    optimizer = GaLoreAdamW(groups, lr=0.01)
    said, found = [], []
    for count in range(1, 12):
        if optimizer.is_due(matrix):
            said.append(count)
        assert not optimizer.is_due(vector)
        matrix.grad, vector.grad = torch.randn(6, 8), torch.ones(6)
        before = {name: value.clone() for name, value in optimizer.tensors(matrix).items() if "basis" in name}
        optimizer.step()
        if any(not torch.equal(value, optimizer.tensors(matrix)[name]) for name, value in before.items()):
            found.append(count)
    assert said == found
    assert len(said) == 3
