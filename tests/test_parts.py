"""Processes that share a matrix out round the state of their parts with the random bits of the places they have."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim import Direction, GaLore, Scope, Step, UpdateRule
from galore_pretrain.optim.adafactor import Adafactor
from galore_pretrain.optim.moments import Blockwise8bit, State
from galore_pretrain.optim.scale import Scale
from galore_pretrain.optim.wrapped import Wrapped
from galore_pretrain.tensors.rounding import RandomBits
from galore_pretrain.tensors.shards import Shard
from parts import updates, updates_in_parts

BITS = RandomBits(RandomBits.table(0, torch.device("cpu")), 5)


@dataclass(frozen=True)
class Average(UpdateRule):
    """An average of gradients, kept in the parameter's dtype, of a rule that says how it is updated in parts."""

    said: Scope = Scope.PARTS

    @property
    def scope(self) -> Scope:
        return self.said

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return {"average": torch.zeros_like(like)}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        average = step.working_copy(state["average"], torch.float32).lerp_(grad.float(), 0.1)
        direction = average.clone()
        step.store(state["average"], average, stream="average")
        return Direction(direction)


RULES: list[UpdateRule] = [
    Average(), Average(Scope.ROWS), Average(Scope.ELEMENTS), Wrapped(torch.optim.RMSprop), Adafactor(beta1=0.9),
    Scale("rows", 0.9),
]  # fmt: skip
NAMES = ["parts", "rows", "elements", "wrapped", "adafactor", "scale"]


def draw(count: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def in_galore(rule: UpdateRule, side: str) -> GaLore:
    return GaLore(rule, rank=8, refresh="together", update_proj_gap=100, basis="random", proj_type=side)


def kept_in_bf16(state: State) -> State:
    kept = {name: value for name, value in state.items() if value.dtype == torch.bfloat16 and "basis" not in name}
    assert kept
    return kept


@pytest.mark.parametrize("projects", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_state_of_parts_is_rounded_as_that_of_the_whole(rule: UpdateRule, projects: bool) -> None:
    """Of a matrix that is cut by rows, as is its low-rank gradient by a right basis.

    Sums over the parts may differ in their last bits, so one number in a hundred may be rounded otherwise.
    """
    if projects:
        rule = in_galore(rule, "right")
    grads = [grad.bfloat16() for grad in draw(3, 24, 16)]
    step = Step(1, bits=BITS)
    _, whole = updates(rule, grads, step)
    _, parts = updates_in_parts(rule, grads, step, 0, 11)
    for name, value in kept_in_bf16(whole).items():
        together = torch.cat([state[name] for state in parts])
        assert (together != value).float().mean() < 0.01, name


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_state_that_every_process_has_is_rounded_alike(rule: UpdateRule) -> None:
    """As is that of a low-rank gradient which is a sum over the rows that are shared out."""
    grads = [grad.bfloat16() for grad in draw(3, 24, 16)]
    _, (first, second) = updates_in_parts(in_galore(rule, "left"), grads, Step(1, bits=BITS), 0, 11)
    for name, value in kept_in_bf16(first).items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(
    ("rule", "dim"), [(rule, dim) for rule in RULES for dim in (0, 1) if (rule.scope, dim) != (Scope.ROWS, 1)]
)
def test_equal_parts_of_a_matrix_are_rounded_with_different_bits(rule: UpdateRule, dim: int) -> None:
    """Cut either way: of equal gradients in two parts, other numbers are kept in each."""
    (grad,) = draw(1, 12, 12)
    grads = [torch.cat([grad, grad], dim).bfloat16()] * 3
    _, (first, second) = updates_in_parts(rule, grads, Step(1, bits=BITS), dim, 12)
    for name, value in kept_in_bf16(first).items():
        assert (value != second[name]).float().mean() > 0.1, name


@pytest.mark.parametrize("dim", [0, 1])
def test_adafactor_with_a_first_moment_in_parts_is_the_whole(dim: int) -> None:
    """To 1e-6, where nothing is rounded at random."""
    grads = draw(5, 24, 16)
    expected, _ = updates(Adafactor(beta1=0.9), grads, Step(1))
    found, _ = updates_in_parts(Adafactor(beta1=0.9), grads, Step(1), dim, 11)
    for one, other in zip(expected, found, strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("width", [24, 100, 256])
def test_adafactor_with_a_first_moment_in_8_bits_is_that_of_a_dense_one(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every vector within the code's 2 %, however many rows are worked on: blocks may end in the midst of one."""
    grads = draw(3, 200, width)
    expected, _ = updates(Adafactor(beta1=0.9), grads, Step(1))
    rule = Adafactor(beta1=0.9, store=Blockwise8bit())
    at_once, state = updates(rule, grads, Step(1))
    monkeypatch.setattr("galore_pretrain.optim.adafactor.chunk_elements", lambda device: 7 * width)
    in_pieces, other = updates(rule, grads, Step(1))
    for one, two, three in zip(expected, at_once, in_pieces, strict=True):
        assert (two - one).norm() <= 0.02 * one.norm()
        assert torch.allclose(two, three, rtol=1e-5, atol=1e-6)
    for name, value in state.items():
        assert (value.float() - other[name].float()).abs().max() <= 1, name
