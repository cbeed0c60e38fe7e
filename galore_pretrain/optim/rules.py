"""Update rules: a gradient and a few state tensors in, a direction out. Learning rate and decay are not theirs.

A rule is a frozen dataclass of hyper-parameters; its tensors live in the optimizer's state. It works on any shape, so
the same object serves a weight matrix and its low-rank projection.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Blockwise8bit, Dense, MomentStore, State
from galore_pretrain.optim.shards import Shard
from galore_pretrain.optim.step import Step, chunk_elements, pieces

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


@dataclass(frozen=True)
class Adam:
    """Adam (arXiv 1412.6980, Algorithm 1): direction m̂ / (√v̂ + ε), both moments bias-corrected.

    ``formula="torch"`` adds ε to the corrected √v̂; ``"transformers"`` to the uncorrected √v, as the published GaLore
    code and transformers' former AdamW do. ``decay`` tells AdamW (``before``) from Adam (``l2``). ``scaled`` multiplies
    by the learning rate before anything is rounded, as bitsandbytes does on the published code's low-rank scratch.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    formula: Literal["torch", "transformers"] = "torch"
    decay: Decay = "before"
    scaled: bool = False
    store: MomentStore = field(default_factory=Dense)
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps >= 0:
            raise ValueError(f"betas {self.betas} must be in [0, 1), and eps {self.eps} not negative")

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return self.store.zeros("exp_avg", like, shard) | self.store.zeros("exp_avg_sq", like, shard)

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        if isinstance(self.store, Blockwise8bit) and not self.scaled:
            fused = self.store.fused_adam(grad, state, step, self.betas, self.eps)
            if fused is not None:
                return Direction(fused, factor=-1.0)
        if step.ok is None and self.kernel_suffices(step, grad.dtype) and state["exp_avg"].dtype == grad.dtype:
            return self._fused(state["exp_avg"], state["exp_avg_sq"], grad, step)  # in place
        m, v = self.store.read(state, "exp_avg", step), self.store.read(state, "exp_avg_sq", step)
        grad = grad.to(m.dtype)
        if self.formula == "torch" and isinstance(self.store, Dense) and m.dtype == torch.float32:
            direction = self._fused(m, v, grad, step)
        else:
            direction = self._composed(m, v, grad, step)
        self.store.write(state, "exp_avg", m, step)
        self.store.write(state, "exp_avg_sq", v, step)
        return direction

    def update_weight(self, weight: Tensor, grad: Tensor, state: State, step: Step, decay: float) -> bool:
        """The whole update of a weight that is not projected, decay included, in one pass over memory; False where the
        kernel behind ``torch.optim.AdamW(fused=True)`` computes something else than this rule.

        In bf16 it works on fp32 copies, whose results are rounded together.
        """
        if not self._is_plain:
            return False
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if self.kernel_suffices(step, weight.dtype):
            self._kernel(weight, grad, m, v, step, step.lr, decay)
            return True
        if weight.dtype != torch.bfloat16:
            return False
        kept = (weight, m, v)
        copies = torch.empty(4, weight.numel(), dtype=torch.float32, device=weight.device)
        for copy, tensor in zip(copies, (*kept, grad), strict=True):
            copy.copy_(tensor)
        self._kernel(copies[0], copies[3], copies[1], copies[2], step, step.lr, decay)
        step.store_together(kept, copies[:3])
        return True

    def kernel_suffices(self, step: Step, dtype: torch.dtype) -> bool:
        """Whether torch's kernel, given whole tensors of that dtype, does what this rule does: it computes in fp32, and
        rounds what it writes to nearest."""
        return self._is_plain and (dtype == torch.float32 or (dtype == torch.bfloat16 and step.bits is None))

    @property
    def _is_plain(self) -> bool:
        """Whether it is what torch's kernel knows, but for how results are rounded."""
        return self.formula == "torch" and self.store == Dense() and not self.scaled and self.decay != "after"

    def _kernel(self, weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: Step, lr: float, decay: float) -> None:
        """Called directly: the way there through ``torch.optim`` takes longer than a chunk."""
        count = torch.full((), float(step.count), device=weight.device)
        skipped = None if step.ok is None else (~step.ok).float()
        kernel = torch._fused_adam_ if self.decay == "l2" else torch._fused_adamw_
        kernel(
            [weight], [grad], [m], [v], [], [count], lr=lr, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
            weight_decay=decay, amsgrad=False, maximize=False, found_inf=skipped,
        )  # fmt: skip

    def _fused(self, m: Tensor, v: Tensor, grad: Tensor, step: Step) -> Direction:
        """By the same kernel: the update of a weight of 0 at rate 1."""
        scratch = torch.zeros_like(grad)
        self._kernel(scratch, grad, m, v, replace(step, ok=None), 1.0, 0.0)  # m and v are copies, stored if ok
        return Direction(scratch, factor=-1.0)

    def _composed(self, m: Tensor, v: Tensor, grad: Tensor, step: Step) -> Direction:
        beta1, beta2 = self.betas
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = self._corrections(step.count)
        if self.formula == "transformers":
            denominator, factor = v.sqrt().add_(self.eps), correction2 / correction1
        else:
            denominator, factor = v.sqrt().div_(correction2).add_(self.eps), 1 / correction1
        if self.scaled:
            return Direction(torch.zeros_like(m).addcdiv_(m, denominator, value=step.lr * factor), scaled=True)
        return Direction(m / denominator, factor=factor)

    def narrow(self, state: State, start: int, stop: int) -> State:
        return self.store.narrow(state, "exp_avg", start, stop) | self.store.narrow(state, "exp_avg_sq", start, stop)

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Mean and variance are transformed each in its way, as in LDAdam (arXiv 2410.16103, §3.2)."""
        if not change.project:
            return
        correction1, correction2 = self._corrections(step.count - 1)
        mean = self.store.read(state, "exp_avg", step).float() / correction1
        square = self.store.read(state, "exp_avg_sq", step).float() / correction2**2
        spread = change.variance((square - mean.square()).clamp_(min=0))
        mean = change.mean(mean)
        self.store.write(state, "exp_avg_sq", spread.add_(mean.square()).mul_(correction2**2), step)
        self.store.write(state, "exp_avg", mean.mul_(correction1), step)

    def _corrections(self, count: int) -> tuple[float, float]:
        return 1 - self.betas[0] ** count, float((1 - self.betas[1] ** count) ** 0.5)
