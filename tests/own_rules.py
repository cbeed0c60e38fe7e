"""Rules as a user would write them, in a file of their own: one for each scope, and one around GaLore."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from galore_pretrain.optim import Direction, GaLore, Layout, Scope, Step, UpdateRule
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.methods import METHODS, Method, Recipe
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import NewBases
from galore_pretrain.tensors.shards import Shard


@dataclass(frozen=True)
class SignOfAverage(UpdateRule):
    """The sign of an average of gradients: elements do not see each other."""

    beta: float = 0.9

    @property
    def scope(self) -> Scope:
        return Scope.ELEMENTS

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return {"average": torch.zeros_like(like)}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        average = step.working_copy(state["average"], torch.float32).lerp_(grad.float(), 1 - self.beta)
        direction = average.sign()
        step.store(state["average"], average, stream="average")
        return Direction(direction)


@dataclass(frozen=True)
class RowNorms(UpdateRule):
    """Each row over the root of an average of its squared norm: rows do not see each other."""

    beta: float = 0.9
    layouts = {"square": Layout.OF_ROWS}  # noqa: RUF012

    @property
    def scope(self) -> Scope:
        return Scope.ROWS

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return {"square": like.new_zeros(len(like), dtype=torch.float32)}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        square = step.working_copy(state["square"])
        square.lerp_(grad.float().view(len(grad), -1).square().mean(1), 1 - self.beta)
        row = square.add(1e-12).rsqrt()
        step.store(state["square"], square)
        return Direction(grad, row=row)


@dataclass(frozen=True)
class NewtonSchulz(UpdateRule):
    """An average of gradients with all singular values near one: it needs the whole matrix, and takes nothing else."""

    beta: float = 0.9

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        if like.ndim != 2:
            raise ValueError(f"a tensor of shape {tuple(like.shape)} has no singular values")
        return {"average": torch.zeros_like(like)}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        average = step.working_copy(state["average"], torch.float32).lerp_(grad.float(), 1 - self.beta)
        x = average / (average.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        step.store(state["average"], average, stream="average")
        return Direction(x)


@dataclass(frozen=True)
class GaLoreAndRest(UpdateRule):
    """GaLore's update, and beside it a little of what its subspace leaves out of the gradient."""

    inner: GaLore = field(default_factory=lambda: GaLore(Adam(), rank=4, update_proj_gap=3, scale=1.0))
    share: float = 0.1

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return self.inner.init(like)

    def start(self, state: State, step: Step) -> None:
        self.inner.start(state, step)

    def next_refresh(self, step: Step) -> int | None:
        return self.inner.next_refresh(step)

    def find_bases(self, grad: Tensor, state: State, step: Step) -> NewBases:
        return self.inner.find_bases(grad, state, step)

    def set_bases(self, new: NewBases, state: State, step: Step) -> None:
        self.inner.set_bases(new, state, step)

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        left, right = self.inner.bases(state)
        low = self.inner.compress(grad, state, step)
        inside = low if left is None else left.to(low.dtype) @ low
        inside = inside if right is None else inside @ right.to(low.dtype)
        return self.inner.update(low, state, step) + Direction(grad - inside, factor=self.share)


OWN = {
    "own_sign": "SignOfAverage",
    "own_rows": "RowNorms",
    "own_newton": "NewtonSchulz",
    "own_rest": "GaLoreAndRest",
}
"""What the tests call these rules as methods."""


def register() -> None:
    """Enter each into the table of methods, with AdamW for what is no matrix: one entry is all that it takes."""
    for name, attribute in OWN.items():
        METHODS[name] = Method(
            name=name,
            description="a rule of the tests",
            home=f"own_rules:{attribute}",
            companion="adamw",
            recipes=(Recipe({"lr": 0.01}, "tests"),),
        )
