"""Update rules: a gradient and a few state tensors in, a direction out. Learning rate and decay are not theirs.

A rule is a frozen dataclass of hyper-parameters; its tensors live in the optimizer's state. It works on any shape, so
the same object serves a weight matrix and its low-rank projection.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State

Decay = Literal["before", "after", "l2"]


@dataclass(frozen=True)
class Step:
    """What one update of one parameter knows besides its tensors.

    ``count`` is 1 at the first update. ``generator`` holds the parameter's own stream of random bits for this update;
    ``seed`` is the parameter's, the same at every update. ``phase`` in [0, 1) is the parameter's place among those
    that share its rule.
    """

    count: int
    generator: torch.Generator | None = None
    seed: int = 0
    phase: float = 0.0


@dataclass(frozen=True)
class Direction:
    """``factor`` · ``left`` @ ``right``, or ``factor`` · ``left`` where there is no ``right``: what is subtracted × lr.

    Kept in factors so that an update of rank r never exists as a full m × n matrix.
    """

    left: Tensor
    right: Tensor | None = None
    factor: float = 1.0

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the direction without ``factor``, in its own dtype."""
        return self.left[start:stop] if self.right is None else self.left[start:stop] @ self.right

    def add_to(self, weight: Tensor, alpha: float) -> None:
        """``weight += alpha · direction`` in one fused operation, in the weight's dtype."""
        if self.right is None:
            weight.add_(self.left, alpha=alpha * self.factor)
        else:
            weight.addmm_(self.left, self.right, alpha=alpha * self.factor)


class UpdateRule(Protocol):
    """From gradient to direction (Stateless itself: ``state`` is passed in and changed in place)."""

    @property
    def decay(self) -> Decay:
        """Weight decay: decoupled ``before`` or ``after`` the update, or ``l2``, added to the gradient."""
        ...

    @property
    def elementwise(self) -> bool:
        """Whether elements do not see each other, so that a large tensor may be updated in pieces (``narrow``)."""
        ...

    def init(self, like: Tensor) -> State:
        """State tensors for a parameter (or projection) shaped, typed and placed as ``like``; shapes never change."""
        ...

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance ``state`` by one update and return the direction; ``grad`` is left alone."""
        ...

    def narrow(self, state: State, start: int, stop: int) -> State:
        """Views of ``state`` for the elements ``start:stop`` of the flattened parameter."""
        ...


@dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent with heavy-ball ``momentum``, as ``torch.optim.SGD``."""

    momentum: float = 0.0
    store: MomentStore = field(default_factory=Dense)
    decay: ClassVar[Decay] = "l2"
    elementwise: ClassVar[bool] = True

    def init(self, like: Tensor) -> State:
        return self.store.zeros("momentum", like) if self.momentum else {}

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        if not self.momentum:
            return Direction(grad)
        buffer = self.store.read(state, "momentum")
        buffer.mul_(self.momentum).add_(grad)
        self.store.write(state, "momentum", buffer, step.generator)
        return Direction(buffer)

    def narrow(self, state: State, start: int, stop: int) -> State:
        return self.store.narrow(state, "momentum", start, stop) if self.momentum else {}


@dataclass(frozen=True)
class Adam:
    """Adam (arXiv 1412.6980, Algorithm 1): direction m̂ / (√v̂ + ε), both moments bias-corrected.

    ``formula="torch"`` adds ε to the corrected √v̂; ``"transformers"`` to the uncorrected √v, as the published GaLore
    code and transformers' former AdamW do. ``decay`` tells AdamW (``before``) from Adam (``l2``).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    formula: Literal["torch", "transformers"] = "torch"
    decay: Decay = "before"
    store: MomentStore = field(default_factory=Dense)
    elementwise: ClassVar[bool] = True

    def init(self, like: Tensor) -> State:
        return self.store.zeros("exp_avg", like) | self.store.zeros("exp_avg_sq", like)

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        beta1, beta2 = self.betas
        m, v = self.store.read(state, "exp_avg"), self.store.read(state, "exp_avg_sq")
        grad = grad.to(m.dtype)
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        self.store.write(state, "exp_avg", m, step.generator)
        self.store.write(state, "exp_avg_sq", v, step.generator)
        correction1, correction2 = 1 - beta1**step.count, float((1 - beta2**step.count) ** 0.5)
        if self.formula == "transformers":
            return Direction(m / v.sqrt().add_(self.eps), factor=correction2 / correction1)
        return Direction(m / v.sqrt().div_(correction2).add_(self.eps), factor=1 / correction1)

    def narrow(self, state: State, start: int, stop: int) -> State:
        return self.store.narrow(state, "exp_avg", start, stop) | self.store.narrow(state, "exp_avg_sq", start, stop)


@dataclass(frozen=True)
class Adafactor:
    """Adafactor (arXiv 1804.04235, Algorithm 4) without relative step sizes, as ``transformers.Adafactor`` computes it.

    A matrix keeps row and column means of its squared gradient, in fp32 (m + n numbers); other shapes the full
    second moment. ``beta1`` adds a first moment (the paper's Figure 3 does), an average of the directions.
    """

    beta1: float | None = None
    decay_rate: float = -0.8
    epsilon: float = 1e-30
    clip_threshold: float = 1.0
    store: MomentStore = field(default_factory=Dense)
    decay: ClassVar[Decay] = "before"
    elementwise: ClassVar[bool] = False

    def init(self, like: Tensor) -> State:
        if like.ndim == 2:
            state = {
                name: like.new_zeros(n, dtype=torch.float32)
                for name, n in zip(("row", "column"), like.shape, strict=True)
            }
        else:
            state = {"exp_avg_sq": torch.zeros_like(like, dtype=torch.float32)}
        return state | (self.store.zeros("exp_avg", like) if self.beta1 is not None else {})

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        grad = grad.float()
        squared = grad.square().add_(self.epsilon)
        beta2 = 1.0 - step.count**self.decay_rate
        if "row" in state:
            row = state["row"].lerp_(squared.mean(-1), 1 - beta2)
            column = state["column"].lerp_(squared.mean(-2), 1 - beta2)
            direction = grad * (row / row.mean()).rsqrt_()[:, None] * column.rsqrt()
        else:
            direction = grad * state["exp_avg_sq"].lerp_(squared, 1 - beta2).rsqrt()
        rms = direction.square().mean().sqrt_()
        direction.div_((rms / self.clip_threshold).clamp_(min=1.0))
        if self.beta1 is not None:
            average = self.store.read(state, "exp_avg")
            average.mul_(self.beta1).add_(direction, alpha=1 - self.beta1)
            self.store.write(state, "exp_avg", average, step.generator)
            direction = average
        return Direction(direction)

    def narrow(self, state: State, start: int, stop: int) -> State:
        raise TypeError("Adafactor's row and column means need the whole tensor")
