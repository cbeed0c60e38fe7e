"""Bases that know which refresh it is: one that is turned a little each time, and one that is drawn."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.galore import GaLore
from galore_pretrain.optim.methods import PROJ_TYPES
from galore_pretrain.optim.projector import Basis, Random, Side, Tracked, random_basis, svd_basis
from galore_pretrain.optim.sgd import SGD
from galore_pretrain.optim.update import Step

SHAPES = [(24, 40), (40, 24), (24, 24), (1, 9), (9, 1)]
CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def started(m: int, n: int, rank: int, side: Side) -> Tensor:
    return random_basis((m, rank) if side == "left" else (rank, n), side, 1, CPU)


def turned(grad: Tensor, basis: Tensor, side: Side, step_size: float = 10.0) -> Tensor:
    rank = basis.shape[1] if side == "left" else basis.shape[0]
    return Tracked(step_size).at(2, seed=0)(grad, rank, side, basis)


def residual(grad: Tensor, basis: Tensor, side: Side) -> float:
    """How much of the gradient lies outside of the subspace, in fp64."""
    g, s = grad.double(), basis.double()
    inside = s @ (s.T @ g) if side == "left" else g @ s.T @ s
    return float((g - inside).norm())


def off_orthonormal(basis: Tensor, side: Side) -> float:
    s = basis.double() if side == "left" else basis.double().T
    return float((s.T @ s - torch.eye(s.shape[1], dtype=torch.float64)).abs().max())


def by_the_formula(grad: Tensor, basis: Tensor, step_size: float) -> Tensor:
    """SubTrack++'s step of a left basis, in fp64 and with the full SVD of the tangent."""
    g, s = grad.double(), basis.double()
    a = s.T @ g
    descent = 2 * (g - s @ a) @ a.T
    left, values, right = torch.linalg.svd(descent, full_matrices=False)
    u, sigma, v = left[:, :1], values[0], right[:1].T
    return (s @ v * torch.cos(step_size * sigma) + u * torch.sin(step_size * sigma)) @ v.T + s - s @ v @ v.T


@pytest.mark.parametrize("size", [1e-4, 0.03, 1.0])
def test_a_turn_is_that_of_the_formula(size: float) -> None:
    """Of a gradient with a leading direction, so that power iteration finds it; both sides."""
    grad = random(24, 2) @ random(2, 40, seed=1) + 0.05 * random(24, 40, seed=2)
    grad *= size / grad.norm()
    basis = started(24, 40, 5, "left")
    expected = by_the_formula(grad, basis, 10.0)
    way = (expected - basis).norm()
    assert way > 0
    found = turned(grad, basis, "left")
    assert (found - expected).norm() <= 1e-3 * way + 2e-6
    assert torch.allclose(turned(grad.T, basis.T, "right").T, found, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("step_size", [1e-3, 10.0, 1e4])
def test_a_turn_descends_where_the_gradient_is_small_enough(side: Side, step_size: float) -> None:
    """Up to ‖G‖² = 1/(2η): what lies outside of the subspace becomes less, never more."""
    for seed, share in itertools.product(range(5), (0.1, 1.0)):
        grad = random(24, 40, seed=seed) * torch.logspace(0, -2, 40)
        grad *= math.sqrt(share / (2 * step_size)) / grad.norm()
        basis = started(24, 40, 5, side)
        assert residual(grad, turned(grad, basis, side, step_size), side) < residual(grad, basis, side)


@pytest.mark.parametrize("side", ["left", "right"])
def test_turns_by_one_gradient_arrive_where_it_lies(side: Side) -> None:
    grad = random(24, 5) @ random(5, 40, seed=1)
    grad /= grad.norm() * math.sqrt(20)
    basis = started(24, 40, 5, side)
    before = residual(grad, basis, side)
    for _ in range(300):
        basis = turned(grad, basis, side)
    assert residual(grad, basis, side) < 0.05 * before


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_a_basis_stays_orthonormal(side: Side, size: float) -> None:
    """After 1000 turns, also by angles of many times a circle."""
    basis = started(24, 40, 6, side)
    first = basis
    for seed in range(1000):
        grad = random(24, 40, seed=seed)
        basis = turned(grad * (size / grad.norm()), basis, side)
    assert off_orthonormal(basis, side) < 1e-5
    assert (basis - first).norm() > 0.1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_basis_kept_in_bf16_is_made_orthonormal_again(side: Side) -> None:
    """It is rounded 300 times, and no further from orthonormal than by the last rounding."""
    basis = started(24, 40, 6, side).bfloat16()
    for seed in range(300):
        grad = random(24, 40, seed=seed)
        basis = turned(grad / grad.norm(), basis, side).bfloat16()
    assert off_orthonormal(basis, side) < 2**-7
    grad = random(24, 40) / random(24, 40).norm()
    assert off_orthonormal(turned(grad, basis, side), side) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_gives_no_direction_leaves_the_basis_bit_for_bit(side: Side, dtype: torch.dtype) -> None:
    """A step of 0, a gradient of zeros, and one in the subspace, of any size."""
    basis = started(24, 40, 5, side).to(dtype)
    grad = random(24, 40)
    assert not torch.equal(turned(grad, basis, side), basis.float())
    assert torch.equal(turned(grad, basis, side, step_size=0.0), basis.float())
    assert torch.equal(turned(torch.zeros(24, 40), basis, side), basis.float())
    s = torch.linalg.qr((basis if side == "left" else basis.T).double())[0]
    inside = s @ (s.T @ grad.double()) if side == "left" else grad.double() @ s @ s.T
    for size in (1e-25, 1e-3, 1.0, 1e3):
        assert torch.equal(turned((inside * size).float(), basis, side), basis.float())


def test_a_step_size_that_is_none_is_refused() -> None:
    for step_size in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="step_size"):
            Tracked(step_size)


def bases_of(basis: str | Basis, shape: tuple[int, int], seed: int = 3, **options: Any) -> list[list[Tensor]]:
    """The bases in use after each of 9 updates, of which 1, 4 and 7 begin with a refresh."""
    rule = GaLore(SGD(), rank=5, basis=basis, refresh="together", update_proj_gap=3, **options)
    state = rule.init(torch.zeros(shape))
    found = []
    for count in range(1, 10):
        rule.full_update(random(*shape, seed=count), state, Step(count, seed=seed))
        found.append([value.clone() for name, value in state.items() if name.endswith("basis")])
    return found


@pytest.mark.filterwarnings("ignore:GaLore rank")
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tracking_begins_by_svd_and_goes_on_by_turns(shape: tuple[int, int], proj_type: str) -> None:
    by_svd = bases_of("svd", shape, proj_type=proj_type)
    tracked = bases_of("tracked", shape, proj_type=proj_type)
    fixed = bases_of(Tracked(0.0), shape, proj_type=proj_type)
    for count in range(1, 10):
        for one, other in zip(tracked[count - 1], fixed[count - 1], strict=True):
            assert one.isfinite().all()
            assert torch.equal(other, fixed[0][0]) or len(fixed[0]) == 2
            if count < 4:
                assert torch.equal(one, other)
    assert all(map(torch.equal, tracked[0], by_svd[0]))
    assert all(map(torch.equal, fixed[8], fixed[0]))
    if min(shape) > 5:  # else the basis spans all that there is, and stays
        assert not any(map(torch.equal, tracked[3], tracked[2]))


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_a_random_basis_depends_on_seed_and_refresh_alone(proj_type: str) -> None:
    found = bases_of("random", (12, 12), proj_type=proj_type)
    again = bases_of(Random(), (12, 12), proj_type=proj_type)
    others = bases_of("random", (12, 12), seed=4, proj_type=proj_type)
    for bases, same, different in zip(found, again, others, strict=True):
        assert all(map(torch.equal, bases, same))
        assert not any(map(torch.equal, bases, different))
    for i, j in itertools.combinations((0, 3, 6), 2):
        assert not any(map(torch.equal, found[i], found[j]))
        assert all(map(torch.equal, found[i], found[i + 2]))
    for name in found[0]:
        assert off_orthonormal(name, "left" if name.shape[1] == 5 else "right") < 1e-5
    if proj_type == "full":
        left, right = found[0]
        assert not torch.equal(left, right.T)
    draw = Random().at(2, seed=3)
    start = started(12, 12, 5, "left")
    assert torch.equal(draw(random(12, 12), 5, "left", start), draw(random(12, 12, seed=1), 5, "left", start * 2))


def test_the_first_refresh_is_the_first_also_where_refreshes_are_staggered() -> None:
    """A matrix of phase 0.5 is due at updates 6, 106, 206 where T is 100."""
    rule = GaLore(Adam(), rank=4, basis="tracked", refresh="staggered", update_proj_gap=100)
    grad = random(12, 10) / 100
    state = rule.init(grad)
    rule.start(state, Step(1, phase=0.5))
    first = rule.find_bases(grad, state, Step(6, phase=0.5))
    assert first.right is not None
    assert torch.equal(first.right, svd_basis(grad, 4, "right", state["right_basis"]))
    for count in (106, 206):
        later = rule.find_bases(grad, state, Step(count, phase=0.5))
        assert later.right is not None
        assert torch.equal(later.right, turned(grad, state["right_basis"], "right"))
