"""Muon against torch's own, and what becomes of singular values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim import RuleOptimizer, Scope, Step
from galore_pretrain.optim.moments import Blockwise8bit, Dense
from galore_pretrain.optim.muon import Muon
from galore_pretrain.optim.slots import Slot, initial_state
from galore_pretrain.tensors.chunks import SMALL_CHUNK
from galore_pretrain.tensors.shards import Shard
from parts import updates
from prescribed import parameters, random_bits, train
from temporaries import largest

SHAPES: list[tuple[int, ...]] = [(24, 10), (10, 24), (16, 16), (1, 12), (12, 1), (600, 500)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def torchs(params: list[Tensor], momentum: float = 0.95) -> Any:
    return torch.optim.Muon(
        params,  # type: ignore[arg-type]
        lr=0.01,
        weight_decay=0.0,
        momentum=momentum,
        nesterov=True,
        ns_steps=5,
        adjust_lr_fn="match_rms_adamw",
    )


@pytest.mark.parametrize(
    ("dtype", "store", "rounding"),
    [(torch.float32, Dense(), "stochastic"), (torch.bfloat16, Dense("nearest"), "nearest")],
    ids=["fp32", "bf16"],
)
@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_weights_are_torchs_bit_for_bit(dtype: torch.dtype, store: Dense, rounding: str, momentum: float) -> None:
    """In fp32, and in bf16 that is rounded to nearest. The largest matrix is more than a chunk."""
    ours = parameters(SHAPES, dtype)
    theirs = parameters(SHAPES, dtype)
    groups = [{"params": ours, "rule": Muon(momentum, store)}]
    train(RuleOptimizer(groups, lr=0.01, rounding=rounding), ours, 6)
    train(torchs(theirs, momentum), theirs, 6)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q), tuple(p.shape)


def test_a_bf16_momentum_that_is_rounded_stochastically_stays_near() -> None:
    grads = [draw(40, 24, seed=i).bfloat16() for i in range(20)]
    bits = random_bits(1)
    found, rounded = updates(Muon(), grads, Step(1, bits=bits))
    expected, exact = updates(Muon(), [grad.float() for grad in grads], Step(1))
    assert rounded["momentum"].dtype == torch.bfloat16
    assert (rounded["momentum"].float() - exact["momentum"]).norm() <= 0.02 * exact["momentum"].norm()
    assert (found[-1] - expected[-1]).norm() <= 0.1 * expected[-1].norm()


def test_weight_decay_is_apart_from_the_update() -> None:
    ours = parameters([(24, 10)])
    theirs = parameters([(24, 10)])
    train(RuleOptimizer([{"params": ours, "rule": Muon()}], lr=0.01, weight_decay=0.5), ours, 10)
    other = torchs(theirs)
    other.param_groups[0]["weight_decay"] = 0.5
    train(other, theirs, 10)
    assert torch.allclose(ours[0], theirs[0], atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 16), (16, 40), (32, 32)])
def test_singular_values_come_near_one(shape: tuple[int, int]) -> None:
    """Between 0.68 and 1.13, but for small ones, and the RMS of the whole near 0.2."""
    left, _, right = torch.linalg.svd(draw(*shape), full_matrices=False)
    values = torch.logspace(0, -1, min(shape))
    direction = Muon(momentum=0.0).update((left * values) @ right, {}, Step(1))
    found = torch.linalg.svdvals(direction.left.float())
    assert found.min() > 0.65
    assert found.max() < 1.16
    scaled = direction.left.float() * direction.factor
    assert float(scaled.square().mean().sqrt()) == pytest.approx(0.2, rel=0.2)


def test_an_orthogonal_matrix_stays_what_it_is_but_for_its_length() -> None:
    left, _, right = torch.linalg.svd(draw(24, 10), full_matrices=False)
    orthogonal = left @ right
    direction = Muon(momentum=0.0).update(orthogonal, {}, Step(1)).left.float()
    cosine = (direction * orthogonal).sum() / direction.norm() / orthogonal.norm()
    assert float(cosine) > 0.999


def test_a_rescaled_gradient_makes_the_same_update() -> None:
    """Without momentum. By a power of two, so that it is rounded alike."""
    grad = draw(24, 10)
    rule = Muon(momentum=0.0)
    expected = rule.update(grad, {}, Step(1)).left
    for factor in (2.0**-15, 2.0**20):
        assert torch.equal(rule.update(grad * factor, {}, Step(1)).left, expected)


@pytest.mark.parametrize("momentum", [0.0, 0.95])
def test_a_gradient_of_zeros_makes_no_update(momentum: float) -> None:
    [direction], _ = updates(Muon(momentum), [torch.zeros(24, 10)], Step(1))
    assert torch.equal(direction, torch.zeros(24, 10))


@pytest.mark.parametrize("store", [Dense(), Blockwise8bit()], ids=["dense", "8 bits"])
def test_a_dropped_update_leaves_the_state_as_it_was(store: Dense) -> None:
    rule = Muon(store=store)
    _, state = updates(rule, [draw(80, 64)], Step(1))
    before = {name: value.clone() for name, value in state.items()}
    rule.update(draw(80, 64, seed=1), state, Step(2, valid=torch.tensor(False)))
    assert all(torch.equal(state[name], before[name]) for name in before)
    rule.update(draw(80, 64, seed=1), state, Step(2, valid=torch.tensor(True)))
    assert not torch.equal(state["momentum"], before["momentum"])


def test_in_8_bits_the_direction_is_of_the_momentum_before_it_is_rounded() -> None:
    grads = [draw(80, 64, seed=i) for i in range(8)]
    dense, _ = updates(Muon(), grads, Step(1))
    in_8_bits, _ = updates(Muon(store=Blockwise8bit()), grads, Step(1))
    assert torch.equal(in_8_bits[0], dense[0])
    assert not torch.equal(in_8_bits[1], dense[1])
    assert (in_8_bits[-1] - dense[-1]).norm() <= 0.1 * dense[-1].norm()


def test_state_is_a_momentum_or_nothing() -> None:
    like = torch.zeros(80, 64, dtype=torch.bfloat16)
    assert sum(value.nbytes for value in Muon().init(like).values()) == 80 * 64 * 2
    in_8_bits = Muon(store=Blockwise8bit()).init(like)
    assert sum(value.nbytes for value in in_8_bits.values()) == 80 * 64 + 80 * 64 // 256 * 4
    assert Muon(momentum=0.0).init(like) == {}


@pytest.mark.parametrize("dim", [0, 1])
def test_processes_share_the_momentum_as_the_matrix(dim: int) -> None:
    """The matrix is gathered, and each keeps its part of the direction and of the momentum."""
    rule = Muon()
    assert rule.scope is Scope.WHOLE
    grads = [draw(24, 10, seed=i) for i in range(3)]
    state = rule.init(grads[0])
    for count, grad in enumerate(grads, 1):
        direction = rule.update(grad, state, Step(count))
        shards = [Shard(dim, start, stop, (24, 10), 2, None) for start, stop in ((0, 4), (4, (24, 10)[dim]))]
        parts = [direction.of(shard).whole() for shard in shards]
        assert torch.equal(torch.cat(parts, dim), direction.whole())
        for shard in shards:
            assert rule.layout("momentum", state, shard) == shard


def test_no_fp32_copy_of_a_matrix_is_made() -> None:
    grad = draw(1024, 1024).bfloat16()
    rule = Muon()
    state = rule.init(grad)
    assert largest(torch.float32, lambda: rule.update(grad, state, Step(1))) <= SMALL_CHUNK


def test_what_it_cannot_do_is_refused() -> None:
    for shape in ((8,), (2, 3, 4)):
        with pytest.raises(ValueError, match="put it into a group of Adam's"):
            Muon().init(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"momentum 1.0 must be in \[0, 1\)"):
        Muon(momentum=1.0)


def test_moments_in_blocks_are_refused_where_processes_share_a_matrix() -> None:
    """It is gathered for each update, and blocks of a part are none of the whole: said in words, with the way out."""
    part = Shard(0, 0, 64, (128, 64), 2, None)
    rule, cpu = Muon(store=Blockwise8bit()), torch.device("cpu")
    slot = Slot(group=0, index=0, seed=0, rule=rule, shard=part, is_shared=True, gathers=True, device=cpu)
    with pytest.raises(ValueError, match=r"Muon needs whole tensors .* keeps moments in blocks: .* use one process"):
        initial_state(slot, torch.zeros(64, 64))
