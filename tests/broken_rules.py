"""Rules that break one promise each, as a user might by mistake: `galore-pretrain check-method` must say which."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim import Direction, GaLore, Layout, Scope, Step, UpdateRule
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import NewBases
from galore_pretrain.tensors.shards import Shard


@dataclass(frozen=True)
class Average(UpdateRule):
    """An average of gradients. It breaks nothing, and the others are it with one thing wrong."""

    beta: float = 0.9

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return {"average": torch.zeros_like(like)}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        average = step.working_copy(state["average"], torch.float32).lerp_(grad.float(), 1 - self.beta)
        direction = average.clone()
        step.store(state["average"], average, stream="average")
        return Direction(direction)


@dataclass(frozen=True)
class OfParts(Average):
    """The same; it says that it updates parts by itself."""

    @property
    def scope(self) -> Scope:
        return Scope.PARTS


@dataclass(frozen=True)
class LooksAside(Average):
    """Its step depends on the matrix that was updated before."""

    last: ClassVar[list[int]] = [0]

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        direction = super().update(grad, state, step)
        factor = 1.0
        if grad.ndim == 2:
            if step.count > 1 and self.last[0] > grad.numel():
                factor = 0.5
            self.last[0] = grad.numel()
        return Direction(direction.left, factor=factor)


@dataclass(frozen=True)
class Elsewhere(Average):
    """It keeps its average in a dict of its own."""

    kept: ClassVar[dict[int, Tensor]] = {}

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return {}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        if step.count == 1:
            self.kept[step.seed] = torch.zeros_like(grad)
        finite = torch.where(grad.isfinite(), grad, 0.0)
        self.kept[step.seed] = self.kept[step.seed].lerp(finite, 1 - self.beta)
        return Direction(self.kept[step.seed])


@dataclass(frozen=True)
class NotLinear(Average):
    """It keeps gradients in units of their norm."""

    @property
    def projects(self) -> bool:
        return True

    def compress(self, grad: Tensor, state: State, step: Step) -> Tensor:
        return grad / (grad.norm() + 1e-12)


@dataclass(frozen=True)
class InPlace(Average):
    """It halves the caller's gradient."""

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        return super().update(grad.mul_(0.5), state, step)


@dataclass(frozen=True)
class LongBases(GaLore):
    """Its bases are longer for larger gradients."""

    inner: UpdateRule = field(default_factory=Adam)

    def find_bases(self, grad: Tensor, state: State, step: Step) -> NewBases:
        new = super().find_bases(grad, state, step)
        length = 1 + grad.float().norm()
        left = None if new.left is None else new.left * length
        right = None if new.right is None else new.right * length
        return NewBases(left, right, new.found)


@dataclass(frozen=True)
class Unasked(Average):
    """It writes its state whether the gradient is finite or not."""

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        state["average"].lerp_(grad, 1 - self.beta)
        return Direction(state["average"].clone())


@dataclass(frozen=True)
class Replacing(OfParts):
    """It puts a new tensor where its state was."""

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        state["average"] = state["average"].lerp(grad, 1 - self.beta)
        return Direction(state["average"])


@dataclass(frozen=True)
class Peeking(Average):
    """It looks at a value."""

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        direction = super().update(grad, state, step)
        factor = 1.0
        if grad.norm() > 1e3:
            factor = 0.5
        return Direction(direction.left, factor=factor)


@dataclass(frozen=True)
class Heavier(Average):
    """It takes memory that a plan does not see."""

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        if type(grad) is Tensor:
            grad = torch.stack([grad] * 8)[0]
        return super().update(grad, state, step)


@dataclass(frozen=True)
class OfItsPart(OfParts):
    """It takes the norm of its part for that of the whole."""

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        direction = super().update(grad, state, step)
        return Direction(direction.left / (grad.float().norm() + 1e-12))


@dataclass(frozen=True)
class FirstRate(Average):
    """It goes on with the learning rate of its first update."""

    layouts = {"rate": Layout.EVERYWHERE}  # noqa: RUF012

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return super().init(like, shard) | {"rate": like.new_zeros((), dtype=torch.float32)}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        direction = super().update(grad, state, step)
        if step.count == 1:
            step.store(state["rate"], torch.full_like(state["rate"], step.lr))
        return Direction(direction.left * state["rate"], scaled=True)


@dataclass(frozen=True)
class NoDecay(OfParts):
    """It updates the weight itself, and forgets to decay it."""

    def update_weight(self, weight: Tensor, grad: Tensor, state: State, step: Step, decay: float) -> bool:
        direction = self.update(grad, state, step)
        step.store(weight, weight.float() - step.lr * direction.left, stream="weight")
        return True


@dataclass(frozen=True)
class TorchsNumbers(Average):
    """It draws from torch's own generator."""

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return {"average": 0.1 * torch.randn_like(like)}


@dataclass(frozen=True)
class StopsAlone(OfParts):
    """It raises where it has the second part of a tensor."""

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        if step.shard is not None:
            step.total(grad.sum())
            if step.shard.start:
                raise RuntimeError("no second part is known here")
        return super().update(grad, state, step)
