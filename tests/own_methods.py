"""Methods as users would write them in a file that ``--optim`` names: a class of torch, a rule around GaLore, and rules
that raise. They take nothing of the package but what docs/adding-a-method.md names."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim import Direction, GaLore, Layout, Step, UpdateRule
from galore_pretrain.optim.adam import Adam


class Lion(torch.optim.Optimizer):
    """Lion (arXiv 2302.06675)."""

    def __init__(
        self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                p.add_((mean * first + p.grad * (1 - first)).sign(), alpha=-group["lr"])
                mean.lerp_(p.grad, 1 - second)


LION = f"from typing import Any\n\nimport torch\n\n\n{inspect.getsource(Lion)}"
"""The same as a file of its own."""


@dataclass(frozen=True)
class Fira(GaLore):
    """Fira (arXiv 2410.01673), from the paper: α P N + φ (G − α P R), whose second term is multiplied out here.

    The channels of φ = ‖N‖ / ‖R‖ are those of the side that is not projected. Each process that shares the matrix has
    some of its rows or columns, or a term of what is summed over them.
    """

    inner: UpdateRule = field(default_factory=Adam)
    growth: float = 1.01
    layouts: ClassVar[Mapping[str, Layout]] = {**GaLore.layouts, "last": Layout.EVERYWHERE}

    @property
    def projects(self) -> bool:
        return False

    def init(self, like: Tensor, shard: Any = None) -> dict[str, Tensor]:
        return super().init(like, shard) | {"last": torch.zeros((), device=like.device)}

    def compress(self, grad: Tensor, state: dict[str, Tensor], step: Step) -> Tensor:
        return grad

    def update(self, grad: Tensor, state: dict[str, Tensor], step: Step) -> Direction:
        low = super().compress(grad, state, step)
        inside = super().update(low.clone(), state, step)  # α P N, in two factors
        assert inside.right is not None
        is_left = "left_basis" in state
        across = 0 if is_left else 1
        new = inside.right if is_left else inside.left
        scale = (new * inside.factor / self.scale).norm(dim=across) / (low.norm(dim=across) + 1e-8)
        projected = inside.left @ low if is_left else low @ inside.right
        rest = (grad - self.scale * projected) * scale.unsqueeze(across)
        norm = step.total(rest.square().sum()).sqrt()
        allowed = self.growth * state["last"]
        limit = torch.where((allowed > 0) & (norm > allowed), allowed / norm, 1.0)
        step.store(state["last"], norm * limit)
        return inside + Direction(rest * limit)


@dataclass(frozen=True)
class RaisesLater(UpdateRule):
    """Is sound as long as it is tried on a small matrix, and raises in a run."""

    def init(self, like: Tensor, shard: Any = None) -> dict[str, Tensor]:
        return {}

    def update(self, grad: Tensor, state: dict[str, Tensor], step: Step) -> Direction:
        if grad.numel() > 48:
            raise ArithmeticError("it does not add up")
        return Direction(grad)


@dataclass(frozen=True)
class RaisesWhenMade(UpdateRule):
    """Has a default that cannot be made."""

    table: int = field(default_factory=lambda: {"a": 1}["b"])

    def init(self, like: Tensor, shard: Any = None) -> dict[str, Tensor]:
        return {}

    def update(self, grad: Tensor, state: dict[str, Tensor], step: Step) -> Direction:
        return Direction(grad)
