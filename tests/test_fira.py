"""Fira against an fp64 oracle and at its limits: GaLore, plain SGD, no residual at all, and SubTrack++'s basis."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim import GaLore, GlobalStep, Layerwise, RuleOptimizer, UpdateRule, galore
from galore_pretrain.optim import rule as rule_module
from galore_pretrain.optim import weights as weights_module
from galore_pretrain.optim.adafactor import Adafactor
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.fira import Fira
from galore_pretrain.optim.limiter import LAST_NORM
from galore_pretrain.optim.moments import Blockwise8bit
from galore_pretrain.optim.natural import Natural
from galore_pretrain.optim.projector import Tracked
from galore_pretrain.optim.rule import Direction
from galore_pretrain.optim.sgd import SGD
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors import products, values
from prescribed import gradients, parameters, train

SHAPES = [(24, 40), (40, 24), (24, 24)]
PROJ_TYPES = ["std", "reverse_std", "left", "right"]
pytestmark = pytest.mark.filterwarnings("ignore:GaLore rank")


def draw(shape: tuple[int, int], count: int) -> Tensor:
    """The gradient of an update, of a size that changes from one to the next."""
    sizes = [1.0, 3.0, 0.2, 0.5, 5.0, 5.0]
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(count))
    return grad * sizes[count % len(sizes)]


def multiplied_out(direction: Direction) -> Tensor:
    """A direction as one matrix, in fp64."""
    total = torch.zeros(1, dtype=torch.float64)
    for term in direction.terms():
        value = term.left.double()
        if term.right is not None:
            value = value @ term.right.double()
        if term.row is not None:
            value = value * term.row.double()[:, None]
        if term.column is not None:
            value = value * term.column.double()
        total = total + value * term.factor
    return total


class Oracle:
    """Fira of Adam in fp64, S made as it is written; bases are taken from the rule's state."""

    def __init__(self, alpha: float, growth: float) -> None:
        self.alpha, self.growth = alpha, growth
        self.m: Any = 0.0
        self.v: Any = 0.0
        self.last = 0.0
        self.count = 0

    def update(self, grad: Tensor, state: dict[str, Tensor]) -> Tensor:
        if "right_basis" in state:
            return self._left(grad.double().T, state["right_basis"].double().T).T
        return self._left(grad.double(), state["left_basis"].double())

    def _left(self, grad: Tensor, p: Tensor) -> Tensor:
        self.count += 1
        r = p.T @ grad
        self.m = 0.9 * self.m + 0.1 * r
        self.v = 0.999 * self.v + 0.001 * r.square()
        n = self.m / (1 - 0.9**self.count) / ((self.v / (1 - 0.999**self.count)).sqrt() + 1e-8)
        phi = n.norm(dim=0) / (r.norm(dim=0) + 1e-8)
        s = phi * (grad - self.alpha * p @ r)
        if self.last and s.norm() > self.growth * self.last:
            s *= self.growth * self.last / s.norm()
        self.last = float(s.norm())
        return self.alpha * p @ n + s


@pytest.mark.parametrize("alpha", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.04)])
def test_updates_are_those_of_the_formula(
    shape: tuple[int, int], proj_type: str, alpha: float, dtype: torch.dtype, tolerance: float
) -> None:
    """Of 25 updates with 4 refreshes; limited, and measured in the way that never makes S."""
    rule = Fira(Adam(), rank=5, scale=alpha, update_proj_gap=7, refresh="together", proj_type=proj_type)
    state = rule.init(torch.zeros(shape, dtype=dtype))
    oracle = Oracle(alpha, 1.01)
    for count in range(1, 26):
        grad = draw(shape, count).to(dtype)
        found = multiplied_out(rule.full_update(grad.clone(), state, Step(count)))
        expected = oracle.update(grad, state)
        assert (found - expected).norm() <= tolerance * expected.norm()
        assert float(state[LAST_NORM]) == pytest.approx(oracle.last, rel=tolerance)


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_matrices_of_one_row_or_column_are_no_exception(shape: tuple[int, int], proj_type: str, alpha: float) -> None:
    """Without a limit: a subspace of rank one may be all of a gradient, and S no more than rounding."""
    rule = Fira(Adam(), rank=5, scale=alpha, update_proj_gap=7, proj_type=proj_type, growth=math.inf)
    state = rule.init(torch.zeros(shape))
    oracle = Oracle(alpha, math.inf)
    for count in range(1, 26):
        grad = draw(shape, count)
        found = multiplied_out(rule.full_update(grad.clone(), state, Step(count)))
        expected = oracle.update(grad, state)
        assert (found - expected).norm() <= 1e-3 * expected.norm()


@dataclass(frozen=True)
class WithoutResidual(Fira):
    """Fira with φ = 0."""

    def _scales(self, low_direction: Tensor, low_norms: Tensor, across: int) -> Tensor:
        return torch.zeros_like(low_norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
def test_without_the_residual_it_is_galore_bit_for_bit(
    dtype: torch.dtype, proj_type: str, moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 too, from the same random bits, where GaLore's products are taken in fp32 as those of a sum always are.

    Where bf16 products are fast, GaLore's are rounded to bf16 before they meet the weight.
    """
    monkeypatch.setattr(weights_module, "has_fast_bf16", lambda device: False)
    monkeypatch.setattr(products, "has_fast_bf16", lambda device: False)
    options: dict[str, Any] = {"rank": 5, "update_proj_gap": 4, "proj_type": proj_type, "moments": moments}
    finished = []
    for rule in (GaLore(Adam(), **options), WithoutResidual(Adam(), **options)):
        params = parameters([(24, 40), (40, 24), (24, 24)], dtype)
        train(RuleOptimizer([{"params": params, "rule": rule}], lr=0.01), params, 12)
        finished.append(params)
    assert all(map(torch.equal, *finished))


@pytest.mark.parametrize("inner", [Adam(), Adafactor(), SGD(momentum=0.9)], ids=["adam", "adafactor", "sgd"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_subspace_of_full_rank_leaves_no_residual(inner: UpdateRule, shape: tuple[int, int]) -> None:
    """With α = 1. What rounding leaves of ‖S‖² is √ε of the rest."""
    options: dict[str, Any] = {"rank": 24, "scale": 1.0, "update_proj_gap": 5}
    rule, twin = Fira(inner, **options), GaLore(inner, **options)
    state, other = rule.init(torch.zeros(shape)), twin.init(torch.zeros(shape))
    for count in range(1, 21):
        grad = draw(shape, count)
        found = multiplied_out(rule.full_update(grad.clone(), state, Step(count)))
        expected = multiplied_out(twin.full_update(grad, other, Step(count)))
        assert (found - expected).norm() <= 1e-4 * expected.norm()
        assert state[LAST_NORM] <= 3e-3 * expected.norm()


@pytest.mark.parametrize("basis", ["svd", "randomized", "tracked", "random"])
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0, 3.0])
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_of_plain_sgd_it_is_plain_sgd(alpha: float, basis: str, proj_type: str) -> None:
    """Whatever the subspace and α: N = R, so φ = 1, and the residual is what the low-rank term lacks."""
    rule = Fira(SGD(), rank=5, scale=alpha, basis=basis, proj_type=proj_type, update_proj_gap=4, growth=math.inf)
    shapes = [(24, 40), (40, 24), (24, 24)]
    params, others = parameters(shapes), parameters(shapes)
    train(RuleOptimizer([{"params": params, "rule": rule}], lr=0.01, weight_decay=0.1), params, 12)
    train(torch.optim.SGD(others, lr=0.01, weight_decay=0.1), others, 12)
    for p, q, start in zip(params, others, parameters(shapes), strict=True):
        assert (p - q).norm() <= 1e-5 * (q - start).norm()


def test_decay_in_the_gradient_of_a_bf16_weight() -> None:
    """The gradient is then fp32, and the bases are bf16."""
    shapes = [(24, 40), (40, 24)]
    params, others = parameters(shapes, torch.bfloat16), parameters(shapes)
    rule = Fira(SGD(), rank=5, update_proj_gap=4, growth=math.inf)
    train(RuleOptimizer([{"params": params, "rule": rule}], lr=0.1, weight_decay=0.1), params, 12)
    train(torch.optim.SGD(others, lr=0.1, weight_decay=0.1), others, 12)
    for p, q, start in zip(params, others, parameters(shapes), strict=True):
        assert (p.float() - q).norm() <= 0.04 * (q - start).norm()


@pytest.mark.parametrize(("alpha", "tolerance"), [(0.0625, 1e-4), (0.25, 2e-4), (1.0, 0.05)])
def test_the_norm_that_is_limited_is_that_of_the_residual_in_bf16(alpha: float, tolerance: float) -> None:
    """Of gradients that lie in the subspace but for a tenth."""
    rule = Fira(Adam(), rank=16, scale=alpha, update_proj_gap=4)
    state = rule.init(torch.zeros(96, 160, dtype=torch.bfloat16))
    for count in range(1, 13):
        generator = torch.Generator().manual_seed(count)
        core = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
        grad = core @ torch.randn(16, 160, generator=generator) + 0.4 * torch.randn(96, 160, generator=generator)
        grad = grad.bfloat16()
        *_, residual = rule.full_update(grad.clone(), state, Step(count)).terms()
        assert residual.column is not None
        p = state["left_basis"].double()
        expected = residual.column.double() * (grad.double() - alpha * p @ (p.T @ grad.double()))
        assert float(state[LAST_NORM]) == pytest.approx(float(expected.norm()), rel=tolerance)


@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_the_residual_never_grows_faster_than_the_limit(shape: tuple[int, int], alpha: float, moments: str) -> None:
    """Not at a refresh either. S is what Fira's direction has beside GaLore's, whose moments are the same."""
    options: dict[str, Any] = {"rank": 5, "scale": alpha, "update_proj_gap": 6, "moments": moments}
    rule, twin = Fira(Adam(), **options), GaLore(Adam(), **options)
    state, other = rule.init(torch.zeros(shape)), twin.init(torch.zeros(shape))
    last = math.inf
    limited = 0
    for count in range(1, 31):
        grad = draw(shape, count)
        both = multiplied_out(rule.full_update(grad.clone(), state, Step(count)))
        residual = both - multiplied_out(twin.full_update(grad, other, Step(count)))
        norm = float(residual.norm())
        assert norm == pytest.approx(float(state[LAST_NORM]), rel=1e-3)
        assert norm <= 1.01 * last * (1 + 1e-3)
        limited += norm > 1.009 * last
        last = norm
    assert limited >= 5


def test_gradients_of_zeros_move_nothing_but_by_momentum() -> None:
    rule, twin = Fira(Adam(), rank=5), GaLore(Adam(), rank=5)
    zeros = torch.zeros(24, 40)
    state, other = rule.init(zeros), twin.init(zeros)
    for count, grad in enumerate([zeros, draw((24, 40), 1), zeros], 1):
        found = multiplied_out(rule.full_update(grad.clone(), state, Step(count)))
        expected = multiplied_out(twin.full_update(grad.clone(), other, Step(count)))
        assert found.isfinite().all()
        assert torch.equal(found, expected) == (count != 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("refreshes", [False, True])
def test_a_dropped_update_leaves_the_state_as_it_was(dtype: torch.dtype, refreshes: bool) -> None:
    rule = Fira(Adam(), rank=5, update_proj_gap=3, refresh="together", moments="project")
    state = rule.init(torch.zeros(24, 40, dtype=dtype))
    last = 3 if refreshes else 2
    for count in range(1, last + 1):
        rule.full_update(draw((24, 40), count).to(dtype), state, Step(count))
    before = {name: value.clone() for name, value in state.items()}
    step = Step(last + 1, valid=torch.tensor(False))
    rule.full_update(torch.full((24, 40), math.nan, dtype=dtype), state, step)
    assert state.keys() == {"left_basis", "exp_avg", "exp_avg_sq", LAST_NORM}
    for name, value in state.items():
        assert torch.equal(value, before[name]), name


def test_the_state_is_galores_and_a_number() -> None:
    """Of m × n = 24 × 40 at rank 5: mr + 2nr, and four bytes."""
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        state = Fira(Adam(), rank=5).init(torch.zeros(24, 40, dtype=dtype))
        assert sum(value.nbytes for value in state.values()) == size * (24 * 5 + 2 * 40 * 5) + 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"proj_type": "full"}, "projects both"),
        ({"published": True}, "published"),
        ({"growth": 0.9}, "growth 0.9"),
        ({"growth": math.nan}, "growth nan"),
        ({"basis": "qr"}, "basis 'qr'"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Fira(Adam(), **options)


INNER = {
    "adam": Adam(),
    "adam, 8 bits": Adam(store=Blockwise8bit()),
    "adafactor": Adafactor(),
    "natural": Natural(Adam()),
}


@pytest.mark.parametrize("clip", [0.0, 0.1])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner", list(INNER))
def test_layerwise_is_global(inner: str, dtype: torch.dtype, parts: int, clip: float) -> None:
    """Also of several micro-batches, clipped by the norm of full gradients, which is always known here."""
    rule = Fira(INNER[inner], rank=8, update_proj_gap=3, moments="reset", basis="tracked")
    finished = []
    for mode in (GlobalStep, Layerwise):
        params = parameters([(16, 600), (600, 16), (24, 24)], dtype)
        optimizer = RuleOptimizer([{"params": params, "rule": rule}], lr=0.01, weight_decay=0.1)
        execution = mode(optimizer, clip)
        drawn = gradients(params, 7 * parts)
        for _ in range(7):
            for part in range(parts):
                execution.begin(part, parts)
                torch.autograd.backward(params, next(drawn))
            execution.complete()
        assert all(p.isfinite().all() for p in params)
        finished.append(params)
    assert all(map(torch.equal, *finished))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_large_matrices_are_those_of_small_ones(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where norms are taken by blocks, and the inner rule's direction is written over the low-rank gradient."""
    rule = Fira(Adam(), rank=16, update_proj_gap=3)
    results = []
    for is_large in (False, True):
        if is_large:
            monkeypatch.setattr(values, "chunk_elements", lambda device: 100)
            monkeypatch.setattr(galore, "SMALL_CHUNK", 256)
            monkeypatch.setattr(rule_module, "chunk_elements", lambda device: 256)
        state = rule.init(torch.zeros(shape, dtype=dtype))
        results.append(
            [multiplied_out(rule.full_update(draw(shape, i).to(dtype), state, Step(i))) for i in range(1, 8)]
        )
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm()


def directions(rule: UpdateRule, updates: int) -> list[Tensor]:
    state = rule.init(torch.zeros(24, 40))
    return [multiplied_out(rule.full_update(draw((24, 40), i), state, Step(i))) for i in range(1, updates + 1)]


def test_subtrack_of_a_step_of_zero_is_fira_of_a_fixed_basis() -> None:
    """Bit for bit where moments are kept; projecting them into the same basis rounds."""
    fixed = directions(Fira(Adam(), rank=5, basis="svd", refresh="together", update_proj_gap=1000), 20)
    options: dict[str, Any] = {"rank": 5, "refresh": "together", "update_proj_gap": 4}
    kept = directions(Fira(Adam(), basis=Tracked(0.0), moments="keep", **options), 20)
    assert all(map(torch.equal, kept, fixed))
    projected = directions(Fira(Adam(), basis=Tracked(0.0), moments="project", **options), 20)
    moved = directions(Fira(Adam(), basis=Tracked(1e-2), moments="project", **options), 20)
    for count, (a, b, c) in enumerate(zip(projected, moved, fixed, strict=True), 1):
        assert (a - c).norm() <= 1e-3 * c.norm()
        if count >= 5:
            assert (b - c).norm() > 1e-2 * c.norm()
