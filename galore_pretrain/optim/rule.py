"""Update rules: a gradient and a few state tensors in, a direction out. Learning rate and decay are not theirs.

A rule is a frozen dataclass of hyper-parameters; its tensors live in the optimizer's state. It works on any shape, so
the same object serves a weight matrix and its low-rank projection.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, pieces
from galore_pretrain.tensors.shards import Shard

Decay = Literal["before", "after", "l2"]


@dataclass(frozen=True)
class Direction:
    """``factor`` · ``left`` @ ``right`` (``right`` may be absent): what is subtracted × lr.

    Kept in factors so that an update of rank r never exists as a full m × n matrix. ``row`` (m) and ``column`` (n),
    both fp32, multiply the rows and columns of ``left``. ``scaled``: the learning rate is in it already.
    """

    left: Tensor
    right: Tensor | None = None
    factor: float = 1.0
    row: Tensor | None = None
    column: Tensor | None = None
    scaled: bool = False

    def part(self, start: int, stop: int) -> "Direction":
        """Its rows ``start:stop``, still in factors."""
        row = None if self.row is None else self.row[start:stop]
        return replace(self, left=self.left[start:stop], row=row)

    def whole(self) -> Tensor:
        """The direction without ``factor``, multiplied out, in its own dtype."""
        if self.row is not None and self.column is not None:
            return self.left.float() * self.row[:, None] * self.column
        return self.left if self.right is None else self.left @ self.right

    def add_to(self, target: Tensor, alpha: float) -> None:
        """``target += alpha · direction``, ``factor`` not counted, in place and in the target's dtype."""
        if self.right is not None:
            target.addmm_(self.left, self.right, alpha=alpha)
        else:
            target.add_(self.whole(), alpha=alpha)


@dataclass(frozen=True)
class BasisChange:
    """The gradients to come are in another subspace than those seen, and must not be mixed with them.

    Where moments are to be expressed in the new coordinates (``project``), x becomes ``left`` @ x @ ``right``, each
    r × r or absent.
    """

    project: bool = False
    left: Tensor | None = None
    right: Tensor | None = None

    def mean(self, x: Tensor) -> Tensor:
        """A first moment in the new coordinates."""
        x = x if self.left is None else self.left @ x
        return x if self.right is None else x @ self.right

    def variance(self, x: Tensor) -> Tensor:
        """A second moment about the mean in the new coordinates, the old ones taken as uncorrelated."""
        x = x if self.left is None else self.left.square() @ x
        return x if self.right is None else x @ self.right.square()


class UpdateRule(Protocol):
    """From gradient to direction (stateless itself: ``state`` is passed in and changed in place)."""

    @property
    def decay(self) -> Decay:
        """Weight decay: decoupled ``before`` or ``after`` the update, or ``l2``, added to the gradient."""
        ...

    @property
    def elementwise(self) -> bool:
        """Whether elements do not see each other, so that a large tensor may be updated in pieces (``narrow``)."""
        ...

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """State tensors for a parameter (or projection) shaped, typed and placed as ``like``; shapes never change.

        ``shard``: the part of it that ``like`` is; None means that it is all of it.
        """
        ...

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance ``state`` by one update, through ``step.store``, and return the direction; ``grad`` is left alone."""
        ...

    def narrow(self, state: State, start: int, stop: int) -> State:
        """Views of ``state`` for the elements ``start:stop`` of the flattened parameter."""
        ...

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """The coordinates of the gradients to come are others than those of the gradients seen."""
        ...


def update_in_chunks(rule: UpdateRule, grad: Tensor, state: State, step: Step) -> Direction:
    """As ``rule.update``, but ``grad`` (contiguous) is overwritten, and temporaries are a few chunks of fp32."""
    size = chunk_elements(grad.device)
    if not rule.elementwise or grad.numel() <= size:
        return rule.update(grad, state, step)
    flat = grad.view(-1)
    for start, stop in pieces(flat.numel(), size):
        piece = rule.update(flat[start:stop], rule.narrow(state, start, stop), step.at(start))
        flat[start:stop].copy_(piece.left)
    return replace(piece, left=grad)
