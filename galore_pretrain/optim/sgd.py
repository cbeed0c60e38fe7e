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
    """Stochastic gradient descent with heavy-ball ``momentum``, as ``torch.optim.SGD`` computes it.

    The buffer is b ← μ b + g and the direction is b, both shaped as the gradient g. Without momentum the direction is
    the gradient itself, and there is no state.
    """

    momentum: float = 0.0
    store: MomentStore = field(default_factory=Dense)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum} must be in [0, 1)")

    @property
    def decay(self) -> Decay:
        """Weight decay is added to the gradient, as in ``torch.optim.SGD``."""
        return "l2"

    @property
    def scope(self) -> Scope:
        """Elements do not see each other."""
        return Scope.ELEMENTS

    def stores(self) -> Mapping[str, MomentStore]:
        """Return the store of the momentum buffer, where there is one."""
        if not self.momentum:
            return {}
        return {"momentum": self.store}

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return a momentum buffer of zeros, shaped as ``like``; nothing without momentum."""
        if not self.momentum:
            return {}
        return self.store.zeros("momentum", like, shard)

    # There is no dampening: the gradient enters the buffer with weight 1, so that a constant gradient g moves the
    # weight by up to g / (1 − μ).
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the momentum buffer by ``grad`` (any shape) and return it as the direction."""
        if not self.momentum:
            return Direction(grad)
        buffer = self.store.read(state, "momentum", step)
        buffer.mul_(self.momentum)
        buffer.add_(grad)
        # Storing may overwrite the buffer with its rounded values. The weight moves by the exact ones.
        direction = buffer.clone()
        self.store.write(state, "momentum", buffer, step)
        return Direction(direction)

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Express the momentum buffer, a sum of gradients, in the new coordinates."""
        if not change.project or not self.momentum:
            return
        buffer = self.store.read(state, "momentum", step).float()
        buffer = change.mean(buffer)
        self.store.write(state, "momentum", buffer, step)
