"""Natural GaLore (arXiv 2410.16029): the low-rank gradient, preconditioned by its own recent past."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import BasisChange, Direction, Layout, OuterRule, Scope, UpdateRule, update_in_chunks
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.fused import BLOCK
from galore_pretrain.tensors.shards import Shard

_CHUNKS_PER_PIECE = 2  # of the history: a product wants more than a cache holds


@dataclass(frozen=True)
class Natural(OuterRule):
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
        {
            "gram": Layout.EVERYWHERE,
            "history": Layout.LIKE_PARAMETER,
        }
    )

    def __post_init__(self) -> None:
        if self.history < 1 or not self.damping > 0:
            raise ValueError(f"history {self.history} must be at least 1 and damping {self.damping} greater than 0")

    @property
    def scope(self) -> Scope:
        """A part can be updated by itself; products of whole gradients are asked of the step."""
        return Scope.PARTS

    def stores(self) -> Mapping[str, MomentStore]:
        """Return the store of the history, and those of the inner rule."""
        return {"history": self.store, **super().stores()}

    def layout(self, name: str, state: State, shard: Shard) -> Shard | None:
        """Return where a state tensor lies; of one that is not this rule's, what the inner rule says."""
        if name in self.layouts:
            return super().layout(name, state, shard)
        return self.inner.layout(name, state, shard)

    def has_slots(self, name: str) -> bool:
        """Return whether a moment has slots of padded length: the history has, one for each gradient."""
        return name == "history" or super().has_slots(name)

    def moment_values(self, state: State, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the values of a moment; of the history, its slots × ``shape``, without what pads them."""
        if name != "history":
            return super().moment_values(state, name, shape)
        no_step = Step(count=0)
        values = self.store.read(state, name, no_step)
        values = values.view(self.history, -1)
        unpadded = values[:, : prod(shape)]
        return unpadded.reshape(self.history, *shape)

    def set_moment_values(self, state: State, name: str, values: Tensor) -> None:
        """Keep what `moment_values` returned."""
        if name != "history":
            super().set_moment_values(state, name, values)
            return
        shape = state[name].shape
        padded = torch.zeros(shape, dtype=torch.float32, device=values.device)
        elements = values[0].numel()
        padded[:, :elements] = values.flatten(1)
        self.store.restore(state, name, padded)

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return ``gram`` (s × s, fp64), ``history`` (s slots of ``like``, padded) and the inner rule's state."""
        gram = like.new_zeros(self.history, self.history, dtype=torch.float64)
        length = _padded(like.numel())
        slots = like.new_empty(self.history, length)
        state = {"gram": gram}
        state |= self.store.zeros("history", slots)
        state |= self.inner.init(like, shard)
        return state

    # The natural gradient of a low-rank gradient g of n elements. H is n × s, its columns the last s gradients, and
    #     g̃ = (λI + HHᵀ)⁻¹ g = (λI + HHᵀ)⁻¹ H e = H (λI + HᵀH)⁻¹ e
    # where e is the unit vector of g's own column. The n × n matrix is never made: the s × s system gives a weight for
    # each column, and g̃ is the sum of the columns by these weights. The history is a ring: update t replaces the
    # column (t − 1) mod s, so HᵀH changes in one row and one column. H is read twice, in pieces of a few elements of
    # all columns, as fp64: the columns may be parallel gradients, whose weights of about 1/λ must cancel.
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Take ``grad`` into the history, and return the inner rule's direction for the natural gradient."""
        elements = grad.numel()
        length = _padded(elements)
        padded = torch.nn.functional.pad(grad.reshape(-1).float(), (0, length - elements))
        newest = (step.count - 1) % self.history
        newest_step = step.at(newest * length)
        # What is rounded may overwrite ``padded``; it is not read again.
        self.store.write(self._slot(state, newest), "history", padded, newest_step)

        pieces = list(chunks(padded, length, self._piece(grad.device)))
        products: Tensor | None = None
        for start, stop in pieces:
            columns = self._columns(state, start, stop)
            of_piece = columns @ columns[newest]
            products = of_piece if products is None else products.add_(of_piece)
        if products is None:  # this process has no part of it
            products = torch.zeros(self.history, dtype=torch.float64, device=grad.device)
        weights = self._weights(products, newest, state, step)
        for start, stop in pieces:
            if len(pieces) > 1:  # else those at hand are all
                columns = self._columns(state, start, stop)
            padded[start:stop] = weights @ columns
        natural = padded[:elements].view(grad.shape)
        inner_state = self._inner_state(state)
        return update_in_chunks(self.inner, natural, inner_state, step)

    # Only one row and column of the Gram matrix HᵀH change, those of the newest gradient. They are its products with
    # all columns, summed over the processes that share g out. Columns that are not filled yet have products of 0, and
    # so get weights of 0. The count does not say which these are: where a refresh is skipped, it begins anew and the
    # history does not (`GaLore.set_bases`).
    def _weights(self, products: Tensor, newest: int, state: State, step: Step) -> Tensor:
        """Bring ``gram`` up to date and return (λI + HᵀH)⁻¹ e: the weight of each column in g̃ (s, fp64).

        ``products`` (s, fp64) are those of the newest gradient with all columns, of the part at hand.
        """
        products = step.total(products)
        gram = state["gram"]
        step.store(gram[newest], products)
        step.store(gram[:, newest], products)
        # Parallel gradients differ by rounding, below fp32's resolution. That must not be divided by λ alone.
        damped = gram.clone()
        diagonal = damped.diagonal()
        diagonal += self.damping + 1e-13 * diagonal.sum()
        unit = torch.zeros_like(products)
        unit[newest] = 1.0
        # Unlike `solve`, `solve_ex` does not look whether it succeeded, which would wait for the device.
        weights, _ = torch.linalg.solve_ex(damped, unit)
        return torch.as_tensor(weights)

    def _inner_state(self, state: State) -> State:
        """Return the state tensors of the inner rule."""
        outer = {"gram", *self.store.entries(state, "history")}
        return {name: value for name, value in state.items() if name not in outer}

    def _slot(self, state: State, i: int) -> State:
        """Return views of the entries of the history that hold its column i."""
        length = state["history"].shape[1]
        start = i * length
        return self.store.narrow(state, "history", start, start + length)

    def _piece(self, device: torch.device) -> int:
        """Return how many elements of all columns are read at a time: whole blocks of a store."""
        blocks = _CHUNKS_PER_PIECE * chunk_elements(device) // (self.history * BLOCK)
        return max(1, blocks) * BLOCK

    # What else a store keeps (scales of blocks) lies in slots as the elements do, with fewer numbers each.
    def _columns(self, state: State, start: int, stop: int) -> Tensor:
        """Return elements ``start:stop`` of all columns of H, padded with zeros, in fp64 (s × elements)."""
        length = state["history"].shape[1]
        part: State = {}
        for name in self.store.entries(state, "history"):
            slots = state[name].view(self.history, -1)
            numbers = slots.shape[1]
            part[name] = slots[:, start * numbers // length : stop * numbers // length].contiguous()
        no_step = Step(count=0)
        values = self.store.read(part, "history", no_step)
        return values.double().view(self.history, -1)

    # A product of gradients means nothing if they lie in two subspaces, and the full gradients behind the old ones are
    # gone, so they cannot be projected anew.
    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Begin the history anew, and let the inner rule change its basis."""
        for name in ("gram", *self.store.entries(state, "history")):
            step.store(state[name], torch.zeros_like(state[name]))
        inner_state = self._inner_state(state)
        self.inner.change_basis(inner_state, change, step)


def _padded(elements: int) -> int:
    """Return the length of a slot for so many elements: whole blocks."""
    blocks = -(-elements // BLOCK)
    return blocks * BLOCK
