"""Natural GaLore (arXiv 2410.16029): the low-rank gradient, preconditioned by its own recent past."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import BasisChange, Decay, Direction, Layout, Scope, UpdateRule, update_in_chunks
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.shards import Shard

_BLOCK = 256  # a slot of the history is padded to whole blocks of an 8-bit store


@dataclass(frozen=True)
class Natural(UpdateRule):
    """Gives ``inner`` the gradient g̃ = (λI + HHᵀ)⁻¹ g instead of g (§3 of the paper, an empirical Fisher matrix).

    The columns of H are the last ``history`` gradients, the newest of them g itself; λ is ``damping``. Since g = He_s,
    g̃ = H (λI + HᵀH)⁻¹ e_s: one s × s system, and none of the cancellation of the printed formula
    (g − H(λI + HᵀH)⁻¹Hᵀg)/λ, which is 3 % off at ‖g‖ = 29. HᵀH is carried along in fp64, a row and column an update.
    Where ‖g‖² is far below λ, g̃ is g/λ, which Adam does not tell from g. A history begins anew with every basis.

    The history costs ``history`` × the low-rank gradient, 10 times Adam's two moments at its default of 20. ``store``
    says in what form it is kept; where that rounds, H is what was kept, newest column included.
    """

    inner: UpdateRule
    history: int = 20
    damping: float = 1e-3
    store: MomentStore = field(default_factory=Dense)
    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType(
        {"gram": Layout.EVERYWHERE, "history": Layout.LIKE_PARAMETER}
    )

    def __post_init__(self) -> None:
        if self.history < 1 or not self.damping > 0:
            raise ValueError(f"history {self.history} must be at least 1 and damping {self.damping} greater than 0")

    @property
    def decay(self) -> Decay:
        return self.inner.decay

    @property
    def scope(self) -> Scope:
        return Scope.PARTS

    def stores(self) -> Mapping[str, MomentStore]:
        return {"history": self.store, **self.inner.stores()}

    def layout(self, name: str, state: State, shard: Shard) -> Shard | None:
        return super().layout(name, state, shard) if name in self.layouts else self.inner.layout(name, state, shard)

    def has_slots(self, name: str) -> bool:
        return name == "history" or self.inner.has_slots(name)

    def moment_values(self, state: State, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the values of a moment; of the history, its slots × ``shape``, without what pads them."""
        if name != "history":
            return self.inner.moment_values(state, name, shape)
        values = self.store.read(state, name, Step(count=0)).view(self.history, -1)
        return values[:, : prod(shape)].reshape(self.history, *shape)

    def set_moment_values(self, state: State, name: str, values: Tensor) -> None:
        if name != "history":
            self.inner.set_moment_values(state, name, values)
            return
        padded = torch.zeros(state[name].shape, dtype=torch.float32, device=values.device)
        padded[:, : values[0].numel()] = values.flatten(1)
        self.store.write(state, name, padded, Step(count=0))

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        gram = like.new_zeros(self.history, self.history, dtype=torch.float64)
        slots = like.new_empty(self.history, _padded(like.numel()))
        return {"gram": gram} | self.store.zeros("history", slots) | self.inner.init(like, shard)

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        newest = (step.count - 1) % self.history
        padded = torch.zeros(_padded(grad.numel()), dtype=torch.float32, device=grad.device)
        padded[: grad.numel()] = grad.reshape(-1)
        self.store.write(self._slot(state, newest), "history", padded.clone(), step.at(newest * len(padded)))
        columns = range(min(step.count, self.history))
        parts = list(chunks(padded, len(padded), chunk_elements(grad.device)))

        products = torch.zeros(self.history, dtype=torch.float64, device=grad.device)
        for piece in parts:
            g = self._column(state, newest, *piece)
            for i in columns:
                products[i] += torch.dot(self._column(state, i, *piece), g)
        products = step.total(products)
        gram = state["gram"].clone()
        gram[newest] = gram[:, newest] = products
        step.store(state["gram"], gram)
        unit = torch.zeros_like(products)
        unit[newest] = 1.0
        # What parallel gradients differ by below fp32's resolution is rounding, and must not be divided by λ alone.
        damping = self.damping + 1e-13 * gram.diagonal().sum()
        damped = gram + damping * torch.eye(self.history, dtype=gram.dtype, device=gram.device)
        weights, _ = torch.linalg.solve_ex(damped, unit)  # unlike solve, waits for no device

        for start, stop in parts:  # in fp64: of parallel gradients, weights of 1/λ must cancel
            total = torch.zeros(stop - start, dtype=torch.float64, device=grad.device)
            for i in columns:
                total.addcmul_(self._column(state, i, start, stop), weights[i])
            padded[start:stop] = total
        rest = self._inner_state(state)
        return update_in_chunks(self.inner, padded[: grad.numel()].view(grad.shape), rest, step)

    def _inner_state(self, state: State) -> State:
        """Return the state tensors of the inner rule."""
        own = {"gram", *self.store.entries(state, "history")}
        return {name: value for name, value in state.items() if name not in own}

    def _slot(self, state: State, i: int) -> State:
        length = state["history"].shape[1]
        return self.store.narrow(state, "history", i * length, (i + 1) * length)

    def _column(self, state: State, i: int, start: int, stop: int) -> Tensor:
        """Elements ``start:stop`` of column i of H, padded with zeros, in fp64."""
        part = self.store.narrow(self._slot(state, i), "history", start, stop)
        return self.store.read(part, "history", Step(count=0)).double()

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        for name in ("gram", *self.store.entries(state, "history")):
            step.store(state[name], torch.zeros_like(state[name]))
        self.inner.change_basis(self._inner_state(state), change, step)


def _padded(elements: int) -> int:
    return -(-elements // _BLOCK) * _BLOCK
