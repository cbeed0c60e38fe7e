"""FOAM against an fp64 oracle that knows its blocks one by one, and against Adam where it is Adam."""

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim import RuleOptimizer, Scope, Step
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.foam import Foam
from galore_pretrain.optim.moments import Blockwise8bit, Dense
from galore_pretrain.tensors.chunks import SMALL_CHUNK
from galore_pretrain.tensors.shards import Shard
from parts import updates, updates_in_parts
from prescribed import gradients, parameters, random_bits, train
from temporaries import largest

SHAPES = [(24, 10), (10, 24), (16, 16), (1, 9), (12, 1), (7, 3)]
"""With blocks of four, some rows end in a block of one, two or three elements."""
BITS = random_bits(1)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def oracle(grads: list[Tensor], rule: Foam) -> list[Tensor]:
    """Block by block, in fp64."""
    beta1, beta2 = rule.betas
    rows, n = grads[0].shape
    starts = range(0, n, 2**rule.level)
    m = torch.zeros(rows, len(starts), dtype=torch.float64)
    v = torch.zeros(rows, len(starts), dtype=torch.float64)
    directions = []
    for t, grad in enumerate(grads, 1):
        direction = torch.empty(rows, n, dtype=torch.float64)
        for j, start in enumerate(starts):
            block = grad[:, start : start + 2**rule.level].double()
            mean = block.mean(1)
            m[:, j] = beta1 * m[:, j] + (1 - beta1) * mean
            v[:, j] = beta2 * v[:, j] + (1 - beta2) * block.square().mean(1)
            rest = block - mean[:, None]
            part = (m[:, j, None] + rest) / ((v[:, j, None] + rest.square()).sqrt() + rule.eps)
            direction[:, start : start + 2**rule.level] = part
        directions.append(direction * rule.scale * (1 - beta2**t) ** 0.5 / (1 - beta1**t))
    return directions


def check(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("level", [0, 1, 2, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_oracle(shape: tuple[int, int], level: int, dtype: torch.dtype, tolerance: float) -> None:
    rule = Foam(betas=(0.9, 0.99), level=level)
    grads = [draw(*shape, seed=i).to(dtype) for i in range(24)]
    bits = BITS if dtype == torch.bfloat16 else None
    found, _ = updates(rule, grads, Step(1, bits=bits))
    check(found, oracle(grads, rule), tolerance)


@pytest.mark.parametrize(("store", "tolerance"), [(Dense(), 1e-6), (Blockwise8bit(), 0.02)], ids=["dense", "8 bits"])
@pytest.mark.parametrize("shape", [(700, 1003), (5, 400_000), (3000, 120)])
def test_rows_of_a_matrix_of_several_chunks_are_updated_as_by_themselves(
    shape: tuple[int, int], store: Dense, tolerance: float
) -> None:
    grads = [draw(*shape, seed=i) for i in range(3)]
    found, _ = updates(Foam(store=store), grads, Step(1))
    rows = [0, len(grads[0]) // 2, len(grads[0]) - 1]
    expected, _ = updates(Foam(), [grad[rows] for grad in grads], Step(1))
    check([direction[rows] for direction in found], [direction.double() for direction in expected], tolerance)


def test_weights_follow_the_oracle_and_decay_apart_from_it() -> None:
    [p] = params = parameters([(24, 10)])
    expected = p.detach().double()
    for direction in oracle([grad for [grad] in gradients(params, 20)], Foam()):
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * direction
    train(RuleOptimizer([{"params": params, "rule": Foam()}], lr=0.01, weight_decay=0.1), params, 20)
    assert torch.allclose(p.detach().double(), expected, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_one_element_are_adam(shape: tuple[int, int]) -> None:
    """That of ``formula="transformers"``: ε is large here, so that the other one is told from it."""
    grads = [draw(*shape, seed=i) for i in range(20)]
    found, state = updates(Foam(level=0, scale=0.5, eps=0.01), grads, Step(1))
    adam, adams_state = updates(Adam(formula="transformers", eps=0.01), grads, Step(1))
    others, _ = updates(Adam(formula="torch", eps=0.01), grads, Step(1))
    check(found, [direction.double() * 0.5 for direction in adam], 1e-5)
    assert not torch.allclose(found[0], others[0] * 0.5, rtol=0.1)
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.allclose(state[name], adams_state[name], rtol=1e-5)


@pytest.mark.parametrize("n", [12, 9, 10, 11, 3])
def test_a_gradient_that_is_alike_within_blocks_is_adams_of_one_element_a_block(n: int) -> None:
    """Also in the last block of a row, of however many elements."""
    blocks = -(-n // 4)
    small = [draw(6, blocks, seed=i) for i in range(10)]
    found, _ = updates(Foam(scale=1.0), [g.repeat_interleave(4, 1)[:, :n] for g in small], Step(1))
    adam, _ = updates(Adam(formula="transformers"), small, Step(1))
    check(found, [direction.repeat_interleave(4, 1)[:, :n].double() for direction in adam], 1e-5)


def test_second_moments_are_of_the_elements_and_not_of_their_means() -> None:
    """A block whose mean is zero has one all the same."""
    grad = torch.tensor([[3.0, -3.0, 1.0, -1.0, 2.0, -2.0]])
    _, state = updates(Foam(), [grad], Step(1))
    assert torch.equal(state["exp_avg"], torch.zeros(1, 2))
    assert torch.allclose(state["exp_avg_sq"], 0.001 * torch.tensor([[5.0, 4.0]]))


def test_a_rescaled_gradient_makes_the_same_update() -> None:
    grads = [draw(24, 10, seed=i) for i in range(10)]
    expected, _ = updates(Foam(eps=1e-30), grads, Step(1))
    for factor in (1e-6, 1e6):
        found, _ = updates(Foam(eps=1e-30), [grad * factor for grad in grads], Step(1))
        check(found, [direction.double() for direction in expected], 1e-5)


def test_a_gradient_of_zeros_makes_no_update() -> None:
    [direction], _ = updates(Foam(), [torch.zeros(24, 10)], Step(1))
    assert torch.equal(direction, torch.zeros(24, 10))


@pytest.mark.parametrize("store", [Dense(), Blockwise8bit()], ids=["dense", "8 bits"])
def test_a_dropped_update_leaves_the_state_as_it_was(store: Dense) -> None:
    rule = Foam(store=store)
    _, state = updates(rule, [draw(200, 100)], Step(1))
    before = {name: value.clone() for name, value in state.items()}
    grad = draw(200, 100, seed=1)
    kept = grad.clone()
    rule.update(grad, state, Step(2, valid=torch.tensor(False)))
    assert all(torch.equal(state[name], before[name]) for name in before)
    rule.update(grad, state, Step(2, valid=torch.tensor(True)))
    assert not any(torch.equal(state[name], before[name]) for name in before)
    assert torch.equal(grad, kept)


@pytest.mark.parametrize("cut", [1, 11, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_processes_that_share_rows_are_one_bit_for_bit(dtype: torch.dtype, cut: int) -> None:
    """And each has the rows of the moments that belong to its rows."""
    grads = [draw(25, 10, seed=i).to(dtype) for i in range(5)]
    step = Step(1, bits=BITS if dtype == torch.bfloat16 else None)
    expected, whole = updates(Foam(), grads, step)
    found, parts = updates_in_parts(Foam(), grads, step, 0, cut)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    first = Shard(0, 0, cut, (25, 10), 2, None)
    for name, value in whole.items():
        layout = Foam().layout(name, parts[0], first)
        assert layout is not None
        assert layout.shape == tuple(value.shape)
        assert torch.equal(layout.of(value), parts[0][name])
        assert torch.equal(torch.cat([part[name] for part in parts]), value)


def test_a_matrix_that_is_cut_by_columns_is_gathered_and_its_moments_are_everywhere() -> None:
    """A block may lie across the cut."""
    shard = Shard(1, 0, 5, (24, 10), 2, None)
    assert Foam().scope is Scope.ROWS
    assert not Foam().scope.allows(shard)
    state = Foam().init(torch.zeros(24, 10))
    assert [Foam().layout(name, state, shard) for name in state] == [None, None]


def test_state_is_two_numbers_a_block() -> None:
    like = torch.zeros(80, 510, dtype=torch.bfloat16)
    assert sum(value.nbytes for value in Foam().init(like).values()) == 2 * 80 * 128 * 2
    assert sum(value.nbytes for value in Foam(level=8).init(like).values()) == 2 * 80 * 2 * 2
    in_8_bits = Foam(store=Blockwise8bit()).init(like)
    assert sum(value.nbytes for value in in_8_bits.values()) == 2 * (80 * 128 + 80 * 128 // 256 * 4)


def test_a_part_of_a_small_moment_is_kept_as_the_whole_is() -> None:
    """In 8 bits, whole moments of fewer than 4096 numbers are in fp32; the matrix has more."""
    rule = Foam(store=Blockwise8bit())
    whole = rule.init(torch.zeros(100, 100))
    part = rule.init(torch.zeros(50, 100), Shard(0, 0, 50, (100, 100), 2, None))
    assert [value.dtype for value in whole.values()] == [torch.float32, torch.float32]
    assert [value.dtype for value in part.values()] == [torch.float32, torch.float32]


@pytest.mark.parametrize("n", [1024, 1003])
def test_no_fp32_copy_of_a_matrix_is_made(n: int) -> None:
    grad = draw(1024, n).bfloat16()
    rule = Foam()
    state = rule.init(grad)
    assert largest(torch.float32, lambda: rule.update(grad, state, Step(1))) <= SMALL_CHUNK


def test_what_it_cannot_do_is_refused() -> None:
    for shape in ((8,), (2, 3, 4)):
        with pytest.raises(ValueError, match="put it into a group of Adam's"):
            Foam().init(torch.zeros(shape))
    with pytest.raises(ValueError, match="level -1 must be a whole number of at least 0"):
        Foam(level=-1)
    with pytest.raises(ValueError, match=r"betas \(0.9, 1.0\) must be in"):
        Foam(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"scale -1\.0 must be finite"):
        Foam(scale=-1.0)
