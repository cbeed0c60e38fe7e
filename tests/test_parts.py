"""Processes that share a matrix out: with which random bits each rounds the state of its part, and what is no part."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as Cut
from torch.testing._internal.distributed.fake_pg import FakeStore

from galore_pretrain.optim import Direction, GaLore, Layout, RuleOptimizer, Scope, Step, UpdateRule
from galore_pretrain.optim.adafactor import Adafactor
from galore_pretrain.optim.build import build_rules
from galore_pretrain.optim.checkpointing import saved_state
from galore_pretrain.optim.methods import ROWS
from galore_pretrain.optim.moments import Blockwise8bit, State
from galore_pretrain.optim.scale import Scale
from galore_pretrain.optim.wrapped import Wrapped
from galore_pretrain.tensors.shards import Shard
from parts import updates, updates_in_parts
from prescribed import meant_for, random_bits

BITS = random_bits(5)


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


@contextmanager
def one_of_two(rank: int) -> Iterator[Any]:
    """The mesh of two processes, of which the other one does not exist."""
    distributed.init_process_group("fake", rank=rank, world_size=2, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        distributed.destroy_process_group()


def part_of(mesh: Any, rows: int, columns: int, dim: int) -> DTensor:
    """This process's half of a matrix of ones, cut by rows or columns."""
    whole = torch.ones(rows, columns)
    local = whole.chunk(2, dim)[distributed.get_rank()].contiguous()
    part = DTensor.from_local(local, mesh, [Cut(dim)], shape=whole.shape, stride=whole.stride())
    return part.requires_grad_()


@dataclass(frozen=True)
class WithTable(Average):
    """Keeps a table of one shape beside its average, whatever the parameter."""

    shape: tuple[int, int] = (3, 8)

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return super().init(like) | {"table": like.new_zeros(self.shape)}


@dataclass(frozen=True)
class WithTableEverywhere(WithTable):
    layouts = {"table": Layout.EVERYWHERE}  # noqa: RUF012


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("scope", [Scope.PARTS, Scope.ROWS, Scope.ELEMENTS, Scope.WHOLE])
@pytest.mark.parametrize("shape", [(3, 8), (6, 8)], ids=["of a part", "of the whole"])
def test_a_state_tensor_that_has_a_parts_shape_by_accident_is_none(
    shape: tuple[int, int], scope: Scope, rank: int
) -> None:
    """It is to be said where it lies. What is gathered is cut from the whole, whatever it means."""
    with one_of_two(rank) as mesh:
        p = part_of(mesh, 6, 8, 0)
        if scope is Scope.WHOLE and shape == (6, 8):
            RuleOptimizer([{"params": [p], "rule": WithTable(scope, shape)}])
        else:
            with pytest.raises(ValueError, match=r"table of WithTable .* say in layouts how it is shared out"):
                RuleOptimizer([{"params": [p], "rule": WithTable(scope, shape)}])
        optimizer = RuleOptimizer([{"params": [p], "rule": WithTableEverywhere(scope, shape)}])
        saved = saved_state(optimizer, p)
        assert not isinstance(saved["table"], DTensor)
        assert tuple(saved["table"].shape) == shape
        assert isinstance(saved["average"], DTensor)
        assert tuple(saved["average"].shape) == (6, 8)


class OfRows(torch.optim.SGD):
    """Keeps, whatever the parameter, a buffer of 3 × 8."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            buffer = self.state[p].setdefault("buffer", torch.zeros(3, 8))
            self.state[p].setdefault("mean", torch.zeros_like(p)).lerp_(p.grad, 0.1)
            buffer += 1
            p.data -= self.param_groups[0]["lr"] * self.state[p]["mean"]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_a_class_keeps_in_one_shape_is_whole_everywhere(rank: int) -> None:
    """And its matrices are gathered."""
    rule = Wrapped(OfRows)
    assert rule.scope is Scope.WHOLE
    with one_of_two(rank) as mesh:
        p = part_of(mesh, 6, 8, 0)
        state = RuleOptimizer([{"params": [p], "rule": rule}]).tensors(p)
        shapes = {name: tuple(value.shape) for name, value in state.items()}
        assert shapes == {"updates": (), "buffer": (3, 8), "mean": (3, 8)}
        shard = Shard(0, 3 * rank, 3 * rank + 3, (6, 8), 2, None)
        assert [rule.layout(name, state, shard) for name in shapes] == [None, None, shard]


@pytest.mark.parametrize("row", ROWS)
def test_every_shipped_row_says_how_its_state_lies(row: str) -> None:
    """Also of parts that come out uneven, and of ones that are as long as the rank."""
    rules = build_rules(row, "sound", **meant_for(row, rank=8))
    with one_of_two(1) as mesh:
        for rule in rules:
            for rows, columns in ((16, 24), (24, 16), (16, 16), (25, 16), (8, 64), (80, 96)):
                for dim in (0, 1):
                    p = part_of(mesh, rows, columns, dim)
                    RuleOptimizer([{"params": [p], "rule": rule}]).tensors(p)
