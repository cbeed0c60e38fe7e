"""Natural GaLore's preconditioned gradient against an fp64 oracle, and the life of its history."""

import pytest
import torch
from torch import Tensor

from galore_pretrain.optim.galore import GaLore
from galore_pretrain.optim.moments import Blockwise8bit, Dense
from galore_pretrain.optim.natural import Natural
from galore_pretrain.optim.sgd import SGD
from galore_pretrain.optim.update import Step


def oracle(history: list[Tensor], damping: float) -> Tensor:
    """(λI + HHᵀ)⁻¹ g in fp64, the columns of H being ``history`` and g its last."""
    h = torch.stack([g.double().flatten() for g in history], dim=1)
    return torch.linalg.solve(damping * torch.eye(len(h), dtype=torch.float64) + h @ h.T, h[:, -1])


@pytest.mark.parametrize("norm", [1e-4, 1e-2, 1.0, 29.0, 1e3])
@pytest.mark.parametrize("overlap", [0.0, 0.9, 0.999])
def test_against_the_oracle(norm: float, overlap: float) -> None:
    """Within 1e-4, also where gradients are nearly parallel, before and after the history is full."""
    rule = Natural(SGD(), history=5, damping=1e-3)
    state = rule.init(torch.zeros(24, 16))
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(24, 16, generator=generator)
    seen: list[Tensor] = []
    for count in range(1, 13):
        g = overlap * common + (1 - overlap**2) ** 0.5 * torch.randn(24, 16, generator=generator)
        seen.append(g * (norm / g.norm()))
        found = rule.update(seen[-1], state, Step(count)).left.double().flatten()
        expected = oracle(seen[-5:], 1e-3)
        assert (found - expected).norm() <= 1e-4 * expected.norm()


@pytest.mark.parametrize("norm", [1e3, 1e7, 1e10])
def test_equal_gradients_stay_finite(norm: float) -> None:
    """A batch that repeats makes HHᵀ singular, and λ may be below what fp64 resolves beside it."""
    rule = Natural(SGD())
    g = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    g *= norm / g.norm()
    state = rule.init(g)
    for count in range(1, 50):
        found = rule.update(g, state, Step(count)).left
        expected = g.double() / (1e-3 + min(count, 20) * norm**2)
        assert (found - expected).norm() <= 0.01 * expected.norm()


def test_far_below_the_damping_it_is_the_gradient() -> None:
    rule = Natural(SGD(), history=4)
    g = torch.randn(24, 16, generator=torch.Generator().manual_seed(0)) * 1e-7
    found = rule.update(g, rule.init(g), Step(1)).left
    assert torch.allclose(found, g / 1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "store", "tolerance"),
    [(torch.bfloat16, Dense(), 0.02), (torch.float32, Blockwise8bit(), 0.05)],
    ids=["bf16", "8 bits"],
)
def test_a_rounded_history_is_preconditioned_as_it_was_kept(dtype: torch.dtype, store: Dense, tolerance: float) -> None:
    """The first gradient of a history is only scaled; what is kept in few bits changes it by its rounding alone."""
    rule = Natural(SGD(), history=3, store=store)
    for norm in (1e-3, 1.0, 1e3):
        g = torch.randn(80, 64, generator=torch.Generator().manual_seed(0))
        g = (g * norm / g.norm()).to(dtype)
        found = rule.update(g, rule.init(g), Step(1)).left.float()
        expected = g.float() / (1e-3 + g.float().norm() ** 2)
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("moments", ["keep", "project", "reset"])
@pytest.mark.parametrize("store", [Dense(), Blockwise8bit()], ids=["dense", "8 bits"])
def test_a_history_ends_with_its_basis(moments: str, store: Dense) -> None:
    """After a refresh, the update is that of a history that has seen nothing but what came since."""
    grads = [torch.randn(96, 80, generator=torch.Generator().manual_seed(i)) for i in range(8)]
    rule = GaLore(
        Natural(SGD(), history=6, store=store),
        rank=64,
        basis="svd",
        refresh="together",
        update_proj_gap=4,
        moments=moments,
    )
    state = rule.init(grads[0])
    for count, grad in enumerate(grads, 1):
        direction = rule.full_update(grad, state, Step(count))
        if count == 5:
            low = grad @ state["right_basis"].T
            tolerance = 1e-4 if store == Dense() else 0.1
            expected = low / (1e-3 + low.norm() ** 2)
            assert (direction.left - expected).norm() <= tolerance * expected.norm()


def test_history_is_counted_in_the_state() -> None:
    like = torch.zeros(64, 80, dtype=torch.bfloat16)
    assert Natural(SGD(), history=20).init(like)["history"].nbytes == 20 * 64 * 80 * 2
    assert Natural(SGD(), history=20, store=Blockwise8bit()).init(like)["history"].nbytes == 20 * 64 * 80
    with pytest.raises(ValueError, match="history 0"):
        Natural(SGD(), history=0)
