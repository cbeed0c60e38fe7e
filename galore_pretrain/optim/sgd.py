"""Stochastic gradient descent as an update rule."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import BasisChange, Decay, Direction, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.shards import Shard


@dataclass(frozen=True)
class SGD(UpdateRule):
    """Stochastic gradient descent with heavy-ball ``momentum``, as ``torch.optim.SGD``."""

    momentum: float = 0.0
    store: MomentStore = field(default_factory=Dense)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum} must be in [0, 1)")

    @property
    def decay(self) -> Decay:
        return "l2"

    @property
    def scope(self) -> Scope:
        return Scope.ELEMENTS

    def stores(self) -> Mapping[str, MomentStore]:
        return {"momentum": self.store} if self.momentum else {}

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return self.store.zeros("momentum", like, shard) if self.momentum else {}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        if not self.momentum:
            return Direction(grad)
        buffer = self.store.read(state, "momentum", step)
        direction = buffer.mul_(self.momentum).add_(grad).clone()
        self.store.write(state, "momentum", buffer, step)
        return Direction(direction)

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        if change.project and self.momentum:
            self.store.write(state, "momentum", change.mean(self.store.read(state, "momentum", step).float()), step)
