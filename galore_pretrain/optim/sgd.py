"""Stochastic gradient descent as an update rule."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import BasisChange, Decay, Direction
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.shards import Shard


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with heavy-ball ``momentum``, as ``torch.optim.SGD``."""

    momentum: float = 0.0
    store: MomentStore = field(default_factory=Dense)
    decay: ClassVar[Decay] = "l2"
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum} must be in [0, 1)")

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return self.store.zeros("momentum", like, shard) if self.momentum else {}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        if not self.momentum:
            return Direction(grad)
        buffer = self.store.read(state, "momentum", step)
        direction = buffer.mul_(self.momentum).add_(grad).clone()
        self.store.write(state, "momentum", buffer, step)
        return Direction(direction)

    def narrow(self, state: State, start: int, stop: int) -> State:
        return self.store.narrow(state, "momentum", start, stop) if self.momentum else {}

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        if change.project and self.momentum:
            self.store.write(state, "momentum", change.mean(self.store.read(state, "momentum", step).float()), step)
