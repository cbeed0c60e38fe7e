"""SCALE against an fp64 oracle, on which side it normalizes, and what it keeps."""

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim import GlobalStep, Layerwise, RuleOptimizer, Step
from galore_pretrain.optim.moments import Blockwise8bit, Dense
from galore_pretrain.optim.scale import Scale
from galore_pretrain.tensors.chunks import SMALL_CHUNK
from parts import updates, updates_in_parts
from prescribed import gradients, parameters, random_bits, train
from temporaries import largest

Axis = Literal["rows", "columns"]
AXES: tuple[Axis, Axis] = ("rows", "columns")
OVER = {"rows": 1, "columns": 0}
SHAPES = [(24, 10), (10, 24), (16, 16), (1, 12), (12, 1)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def oracle(grads: list[Tensor], axis: str, beta: float) -> list[Tensor]:
    """The formula of the paper in fp64."""
    average = torch.zeros(grads[0].shape, dtype=torch.float64)
    directions = []
    for grad in grads:
        average = beta * average + (1 - beta) * grad.double()
        rms = average.square().mean(OVER[axis], keepdim=True).sqrt()
        directions.append(average / rms.clamp(min=1e-8))
    return directions


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(
    shape: tuple[int, int], axis: Axis, momentum: float, dtype: torch.dtype, tolerance: float
) -> None:
    grads = [draw(*shape, seed=i).to(dtype) for i in range(24)]
    directions, _ = updates(Scale(axis, momentum), grads, Step(1))
    for found, expected in zip(directions, oracle(grads, axis, momentum), strict=True):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("axis", AXES)
def test_weights_follow_the_oracle_and_decay_apart_from_it(axis: Axis) -> None:
    [p] = params = parameters([(24, 10)])
    expected = p.detach().double()
    grads = [grad for [grad] in gradients(params, 20)]
    for direction in oracle(grads, axis, 0.9):
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * direction
    optimizer = RuleOptimizer([{"params": params, "rule": Scale(axis, 0.9)}], lr=0.01, weight_decay=0.1)
    train(optimizer, params, 20)
    assert torch.allclose(p.detach().double(), expected, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("axis", AXES)
def test_every_row_or_column_has_an_rms_of_one(axis: Axis, momentum: float) -> None:
    grads = [draw(24, 10, seed=i) * torch.logspace(-4, 4, 10) * torch.logspace(-3, 3, 24)[:, None] for i in range(3)]
    directions, _ = updates(Scale(axis, momentum), grads, Step(1))
    rms = directions[-1].square().mean(OVER[axis]).sqrt()
    assert torch.allclose(rms, torch.ones_like(rms), rtol=1e-5)
    assert float(directions[-1].norm()) == pytest.approx((24 * 10) ** 0.5, rel=1e-5)


def test_a_rescaled_row_of_the_gradient_changes_nothing_but_a_rescaled_column_does() -> None:
    """So for ``rows``; for ``columns`` it is the other way about."""
    grad = draw(24, 10)
    by_row = grad * torch.logspace(-3, 3, 24)[:, None]
    by_column = grad * torch.logspace(-3, 3, 10)
    for axis, harmless, harmful in (("rows", by_row, by_column), ("columns", by_column, by_row)):
        rule = Scale(axis)  # type: ignore[arg-type]
        [expected], [same], [other] = (updates(rule, [g], Step(1))[0] for g in (grad, harmless, harmful))
        assert torch.allclose(same, expected, rtol=1e-5)
        assert not torch.allclose(other, expected, rtol=0.1)


def test_a_row_of_zeros_stays_as_it_is_and_a_tiny_one_is_divided_by_a_floor() -> None:
    grad = draw(3, 8)
    grad[0] = 0
    grad[1] = 1e-12
    [direction], _ = updates(Scale("rows"), [grad], Step(1))
    assert torch.equal(direction[0], torch.zeros(8))
    assert torch.allclose(direction[1], torch.full((8,), 1e-4))
    assert float(direction[2].square().mean()) == pytest.approx(1.0)


@pytest.mark.parametrize("mode", [GlobalStep, Layerwise])
def test_micro_batches_are_summed_before_they_are_normalized(mode: Any) -> None:
    parts = [draw(24, 10, seed=i) for i in range(3)]
    p = torch.zeros(24, 10, requires_grad=True)
    execution = mode(RuleOptimizer([{"params": [p], "rule": Scale("rows")}], lr=1.0))
    for i, part in enumerate(parts):
        execution.begin(i, 3)
        p.backward(part)
    execution.complete()
    [expected] = oracle([parts[0] + parts[1] + parts[2]], "rows", 0.0)
    assert torch.allclose(p.detach().double(), -expected, atol=1e-5)
    apart = oracle(parts[:1], "rows", 0.0)[0] + oracle(parts[1:2], "rows", 0.0)[0] + oracle(parts[2:], "rows", 0.0)[0]
    assert not torch.allclose(p.detach().double(), -apart, atol=0.1)


@pytest.mark.parametrize("store", [Dense(), Blockwise8bit()], ids=["dense", "8 bits"])
def test_a_dropped_update_leaves_the_state_as_it_was(store: Dense) -> None:
    rule = Scale("rows", 0.9, store)
    _, state = updates(rule, [draw(80, 64)], Step(1))
    before = {name: value.clone() for name, value in state.items()}
    rule.update(draw(80, 64, seed=1), state, Step(2, valid=torch.tensor(False)))
    assert all(torch.equal(state[name], before[name]) for name in before)
    rule.update(draw(80, 64, seed=1), state, Step(2, valid=torch.tensor(True)))
    assert not torch.equal(state["momentum"], before["momentum"])


def test_state_is_a_momentum_or_nothing() -> None:
    like = torch.zeros(80, 64, dtype=torch.bfloat16)
    assert Scale("rows").init(like) == {}
    assert sum(value.nbytes for value in Scale("rows", 0.9).init(like).values()) == 80 * 64 * 2
    in_8_bits = Scale("rows", 0.9, Blockwise8bit()).init(like)
    assert sum(value.nbytes for value in in_8_bits.values()) == 80 * 64 + 80 * 64 // 256 * 4


def test_in_8_bits_the_weight_moves_by_the_momentum_before_it_is_rounded() -> None:
    """So the first update is that of a dense momentum, and what is rounded counts in the next one."""
    grads = [draw(80, 64, seed=i) for i in range(8)]
    dense, _ = updates(Scale("rows", 0.9), grads, Step(1))
    in_8_bits, _ = updates(Scale("rows", 0.9, Blockwise8bit()), grads, Step(1))
    assert torch.allclose(in_8_bits[0], dense[0], rtol=1e-5)
    assert not torch.equal(in_8_bits[1], dense[1])
    assert (in_8_bits[-1] - dense[-1]).norm() <= 0.03 * dense[-1].norm()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize(("dim", "cut"), [(0, 12), (0, 23), (0, 24), (1, 5), (1, 9), (1, 10)])
def test_two_processes_are_one(dim: int, cut: int, axis: Axis, momentum: float) -> None:
    """However many rows or columns each has, also none."""
    grads = [draw(24, 10, seed=i) for i in range(5)]
    rule = Scale(axis, momentum)
    expected, _ = updates(rule, grads, Step(1))
    found, _ = updates_in_parts(rule, grads, Step(1), dim, cut)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


def test_two_processes_that_share_rows_round_as_one() -> None:
    bits = random_bits(1)
    grads = [draw(24, 10, seed=i).bfloat16() for i in range(5)]
    rule = Scale("rows", 0.9)
    expected, whole = updates(rule, grads, Step(1, bits=bits))
    found, parts = updates_in_parts(rule, grads, Step(1, bits=bits), 0, 11)
    assert torch.equal(torch.cat([part["momentum"] for part in parts]), whole["momentum"])
    assert torch.allclose(expected[-1], found[-1], rtol=1e-5)


@pytest.mark.parametrize("store", [Dense(), Blockwise8bit()], ids=["dense", "8 bits"])
@pytest.mark.parametrize("axis", AXES)
def test_no_fp32_copy_of_a_matrix_is_made(axis: Axis, store: Dense) -> None:
    """Nor any copy of a gradient, where there is no momentum."""
    grad = draw(1024, 1024).bfloat16()
    rule = Scale(axis, 0.9, store)
    state = rule.init(grad)
    assert largest(torch.float32, lambda: rule.update(grad, state, Step(1))) <= SMALL_CHUNK
    assert Scale(axis).update(grad, {}, Step(1)).left is grad


def test_what_it_cannot_do_is_refused() -> None:
    for shape in ((8,), (2, 3, 4)):
        with pytest.raises(ValueError, match="put it into a group of Adam's"):
            Scale("rows").init(torch.zeros(shape))
    with pytest.raises(ValueError, match="axis 'diagonal' is unknown; choose from rows, columns"):
        Scale("diagonal")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"momentum 1.0 must be in \[0, 1\)"):
        Scale("rows", momentum=1.0)
