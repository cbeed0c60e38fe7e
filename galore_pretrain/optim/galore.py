"""GaLore (arXiv 2403.03507, Algorithm 2): any update rule, run in a low-rank subspace of the gradient."""

import warnings
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.projector import BASES, BasisFn, project, random_basis, sides
from galore_pretrain.optim.rules import Decay, Direction, Step, UpdateRule


@dataclass(frozen=True)
class GaLore:
    """Project the gradient, update in the subspace with ``inner``, project back × ``scale`` (the paper's α).

    The basis is renewed from the current gradient every ``update_proj_gap`` (T) updates; moments are carried over as
    they are. ``refresh="together"`` renews all matrices at updates 1, T + 1, 2T + 1, … (the paper's). ``"staggered"``
    starts from a seeded orthonormal basis and spreads the first refreshes over the first T/10 updates, so that no
    single update stalls; each matrix is then renewed every T. ``materialize`` forms the m × n update in the gradient's
    dtype, as the published code does, where the factors of rank r would do.
    """

    inner: UpdateRule
    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    basis: str | BasisFn = "randomized"
    refresh: str = "staggered"
    materialize: bool = False

    elementwise: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.basis, str) and self.basis not in BASES:
            raise ValueError(f"basis {self.basis!r} is unknown; choose from {', '.join(BASES)}")
        if self.refresh not in ("together", "staggered"):
            raise ValueError(f"refresh {self.refresh!r} is unknown; choose from together, staggered")
        if self.rank < 1 or self.update_proj_gap < 1:
            raise ValueError(f"rank {self.rank} and update_proj_gap {self.update_proj_gap} must be at least 1")
        sides(1, 1, self.proj_type)

    @property
    def decay(self) -> Decay:
        return self.inner.decay

    def init(self, like: Tensor) -> State:
        if like.ndim != 2:
            raise ValueError(f"GaLore projects matrices; got a tensor of shape {tuple(like.shape)}")
        m, n = like.shape
        left, right = sides(m, n, self.proj_type)
        if self.rank > min(m, n):
            warnings.warn(
                f"GaLore rank {self.rank} exceeds a matrix's shorter side, {min(m, n)}, and is clipped to it",
                stacklevel=2,
            )
        r = min(self.rank, m, n)
        state = {"left_basis": like.new_zeros(m, r)} if left else {}
        state |= {"right_basis": like.new_zeros(r, n)} if right else {}
        return state | self.inner.init(like.new_empty(r if left else m, r if right else n))

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        left, right = state.get("left_basis"), state.get("right_basis")
        if self._is_due(step):
            self._renew(grad, left, right, step.seed)
        elif step.count == 1:
            self._start(left, right, step.seed)
        low = self.inner.update(project(grad, left, right), state, step)
        narrow = low.left.to(grad.dtype)
        if left is not None:
            tall, wide = (left, narrow) if right is None else (left @ narrow, right)
        else:
            assert right is not None
            tall, wide = narrow, right
        if self.materialize:
            return Direction((tall @ wide).mul_(self.scale), factor=low.factor)
        return Direction(tall, wide, self.scale * low.factor)

    def narrow(self, state: State, start: int, stop: int) -> State:
        raise TypeError("GaLore projects the whole matrix")

    def _is_due(self, step: Step) -> bool:
        first = 0 if self.refresh == "together" else int(step.phase * max(1, self.update_proj_gap // 10))
        return step.count > first and (step.count - 1 - first) % self.update_proj_gap == 0

    def _start(self, left: Tensor | None, right: Tensor | None, seed: int) -> None:
        if left is not None:
            left.copy_(random_basis((left.shape[0], left.shape[1]), "left", seed, left.device))
        if right is not None:
            right.copy_(random_basis((right.shape[0], right.shape[1]), "right", seed, right.device))

    def _renew(self, grad: Tensor, left: Tensor | None, right: Tensor | None, seed: int) -> None:
        find = BASES[self.basis] if isinstance(self.basis, str) else self.basis
        if left is not None:
            left.copy_(find(grad, left.shape[1], "left", left, seed))
        if right is not None:
            right.copy_(find(grad, right.shape[0], "right", right, seed))


def is_projected(module_name: str, module: torch.nn.Module) -> bool:
    """The paper's targets: the linear layers of attention and MLP; not embeddings, norms or the head."""
    return isinstance(module, torch.nn.Linear) and ("attn" in module_name or "mlp" in module_name)
