"""GaLore (arXiv 2403.03507, Algorithm 2): any update rule, run in a low-rank subspace of the gradient."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim.methods import BASIS_NAMES, MOMENTS, REFRESHES
from galore_pretrain.optim.moments import MomentStore, State
from galore_pretrain.optim.projector import BASES, BasisFn, Side, project, project_fast, random_basis, sides
from galore_pretrain.optim.rule import (
    BasisChange,
    Decay,
    Direction,
    Layout,
    NewBases,
    Scope,
    UpdateRule,
    update_in_chunks,
)
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import SMALL_CHUNK
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.tensors.values import gradient_norm, known_true

_SIDES: dict[str, Side] = {"left_basis": "left", "right_basis": "right"}


@dataclass(frozen=True)
class GaLore(UpdateRule):
    """Project the gradient, update in the subspace with ``inner``, project back × ``scale`` (the paper's α).

    The basis is renewed from the current gradient every ``update_proj_gap`` (T) updates. ``refresh="together"`` renews
    all matrices at updates 1, T + 1, 2T + 1, … (the paper's). ``"staggered"`` starts from a seeded orthonormal basis
    and spreads the first refreshes over the first T/10 updates, so that no single update stalls; each matrix is then
    renewed every T. At a refresh, ``moments`` are carried over as they are (``keep``, the paper's), expressed in the
    new basis (``project``) or begun anew (``reset``, also where the refresh that was due fails). A decomposition that
    fails, and a gradient of zeros, leave the old basis for another T updates.

    ``published`` forms the m × n update in the gradient's dtype, as the published code does, where the factors of
    rank r would do; ``upcast`` works on an fp32 copy of the gradient, as its Adafactor does.
    """

    inner: UpdateRule
    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    basis: str | BasisFn = "randomized"
    refresh: str = "staggered"
    moments: str = "keep"
    published: bool = False
    upcast: bool = False

    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType(
        {"left_basis": Layout.EVERYWHERE, "right_basis": Layout.EVERYWHERE}
    )

    def __post_init__(self) -> None:
        if isinstance(self.basis, str) and self.basis not in BASES:
            raise ValueError(f"basis {self.basis!r} is unknown; choose from {', '.join(BASIS_NAMES)}")
        for name, value, known in (("refresh", self.refresh, REFRESHES), ("moments", self.moments, MOMENTS)):
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose from {', '.join(known)}")
        for name, number in (("rank", self.rank), ("update_proj_gap", self.update_proj_gap)):
            if not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} {number!r} must be a whole number of at least 1")
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale {self.scale} must be finite and not negative")
        sides(1, 1, self.proj_type)

    @property
    def decay(self) -> Decay:
        return self.inner.decay

    @property
    def scope(self) -> Scope:
        return Scope.PARTS

    @property
    def projects(self) -> bool:
        return True

    def stores(self) -> Mapping[str, MomentStore]:
        return self.inner.stores()

    def layout(self, name: str, state: State, shard: Shard) -> Shard | None:
        """Return where a state tensor lies: bases everywhere, the inner rule's where the low-rank gradient lies."""
        if name in self.layouts:
            return None
        low = self.low_shard(state, shard)
        return None if low is None else self.inner.layout(name, state, low)

    def has_slots(self, name: str) -> bool:
        return self.inner.has_slots(name)

    def moment_values(self, state: State, name: str, shape: tuple[int, ...]) -> Tensor:
        return self.inner.moment_values(state, name, shape)

    def set_moment_values(self, state: State, name: str, values: Tensor) -> None:
        self.inner.set_moment_values(state, name, values)

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        if like.ndim != 2:
            raise ValueError(
                f"GaLore projects matrices; a tensor of shape {tuple(like.shape)} belongs into a group without rank"
            )
        if self.upcast:
            like = like.float()
        m, n = like.shape if shard is None else shard.shape
        left, right = sides(m, n, self.proj_type)
        if self.rank > min(m, n):  # one text for all matrices, so that it is shown once
            warnings.warn(
                f"GaLore rank {self.rank} exceeds the shorter side of some matrices, and is clipped to it there",
                stacklevel=2,
            )
        r = min(self.rank, m, n)
        state = {"left_basis": self._basis_zeros(like, m, r)} if left else {}
        state |= {"right_basis": self._basis_zeros(like, r, n)} if right else {}
        low = like.new_empty(r if left else like.shape[0], r if right else like.shape[1])
        low_shard = None if shard is None else shard.low_rank(left, right, r)
        if low_shard is not None and not self.inner.scope.allows(low_shard):
            raise ValueError(
                f"{type(self.inner).__name__} needs the whole low-rank gradient (scope {self.inner.scope.name}), of "
                "which each process has a part here: use --shard none, or one process"
            )
        return state | self.inner.init(low, low_shard)

    def _basis_zeros(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """Return an empty basis.

        A ``published`` one lies column by column, as LAPACK leaves it: on some processors a product has other last bits
        if its factor lies otherwise.
        """
        return like.new_zeros(columns, rows).T if self.published else like.new_zeros(rows, columns)

    def start(self, state: State, step: Step) -> None:
        """Give every matrix a random orthonormal basis before its first update, which depends on its seed alone."""
        if step.count > 1:
            return
        for name, side in _SIDES.items():
            if (basis := state.get(name)) is not None:
                basis.copy_(random_basis((basis.shape[0], basis.shape[1]), side, step.seed, basis.device))

    def compress(self, grad: Tensor, state: State, step: Step) -> Tensor:
        """Return the low-rank gradient in the basis in use, contiguous.

        It is linear in ``grad``, so the parts of a sum can be projected one by one, and a factor applied afterwards.
        Of a part of the gradient no process needs another's, unless the side that is projected is shared out. Then all
        have the whole of it.
        """
        shard = step.shard
        if shard is None:
            left, right = state.get("left_basis"), state.get("right_basis")
        else:
            left, right = self._parts(state, shard)
        if self.upcast:
            grad = grad.float()
        if self.published:
            low = project(grad, left, right).contiguous()
        elif grad.dtype == torch.float32:
            low = grad if right is None else grad @ right.T
            low = (low if left is None else (low.T @ left).T).contiguous()
        else:
            low = project_fast(grad, left, right)
        if shard is None or self.low_shard(state, shard) is not None:
            return low
        return shard.sum(low.float()).to(low.dtype)

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the inner rule by the low-rank gradient and project its direction back, in factors."""
        if step.shard is None:
            left, right, low_step = state.get("left_basis"), state.get("right_basis"), step
        else:
            left, right = self._parts(state, step.shard)
            low_step = self.compressed_step(state, step)
        if self.moments == "reset":
            low_step = replace(low_step, count=self._age(step))
        dtype, inner_state = grad.dtype, self._inner_state(state)
        if grad.numel() <= SMALL_CHUNK:
            low = self.inner.update(grad, inner_state, low_step)
        else:
            low = update_in_chunks(self.inner, grad, inner_state, low_step)
        if low.rest is not None:
            low = low.merged()
        is_plain = low.right is None and low.row is None and low.column is None
        narrow = low.left if is_plain else low.whole()
        if narrow.dtype != dtype:
            narrow = narrow.to(dtype)
        if left is not None:
            tall, wide = (left, narrow) if right is None else (left @ narrow, right)
        else:
            assert right is not None
            tall, wide = narrow, right
        if self.published:
            return Direction((tall @ wide).mul_(self.scale), factor=low.factor, scaled=low.scaled)
        return Direction(tall, wide, self.scale * low.factor, scaled=low.scaled)

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        raise TypeError("GaLore has a basis of its own; it is not run inside another")

    def _first_refresh(self, step: Step) -> int:
        """Updates before the one that brings the first refresh."""
        return 0 if self.refresh == "together" else int(step.phase * max(1, self.update_proj_gap // 10))

    def next_refresh(self, step: Step) -> int:
        """Return the number of the first update, from this one on, that begins with a new basis."""
        since = step.count - 1 - self._first_refresh(step)
        return step.count + (-since if since < 0 else -since % self.update_proj_gap)

    def _age(self, step: Step) -> int:
        """The number of the update among those since the last refresh that was due, from 1."""
        since = step.count - 1 - self._first_refresh(step)
        return step.count if since < 0 else since % self.update_proj_gap + 1

    def find_bases(self, grad: Tensor, state: State) -> NewBases:
        """Return new bases from the whole gradient."""
        if self.upcast:
            grad = grad.float()
        find = BASES[self.basis] if isinstance(self.basis, str) else self.basis
        left, right = self.bases(state)
        try:
            new_left = None if left is None else find(grad, left.shape[1], "left", left)
            new_right = None if right is None else find(grad, right.shape[0], "right", right)
        except torch.linalg.LinAlgError:
            old_left, old_right = (None if basis is None else basis.float() for basis in (left, right))
            return NewBases(old_left, old_right, torch.zeros((), dtype=torch.bool, device=grad.device))
        # A gradient of zeros has no subspace; whatever a decomposition makes of it is no better than the basis in use.
        found = gradient_norm(grad) > 0
        for basis in (new_left, new_right):
            if basis is not None:
                found &= torch.linalg.vector_norm(basis).isfinite()
        return NewBases(new_left, new_right, found)

    def empty_bases(self, state: State) -> NewBases:
        """Return what `find_bases` returns, for another process's bases to be written into."""
        left, right = (None if b is None else torch.empty_like(b, dtype=torch.float32) for b in self.bases(state))
        return NewBases(left, right, torch.ones((), device=next(iter(state.values())).device))

    def set_bases(self, new: NewBases, state: State, step: Step) -> None:
        """Take new bases and tell the inner rule; what failed is noted in ``step.failures``."""
        left, right = self.bases(state)
        if self.moments == "reset" and step.count > 1:
            for name in state.keys() - _SIDES.keys():
                state[name].zero_()
        if not known_true(new.found):
            kept = torch.ones_like(new.found) if step.valid is None else step.valid
            step.failures.append(kept & ~new.found)
        if self.moments != "reset" and step.count > 1:
            change = BasisChange()
            if self.moments == "project":
                turned_left = None if left is None or new.left is None else new.left.T @ left.float()
                turned_right = None if right is None or new.right is None else right.float() @ new.right.T
                change = BasisChange(True, turned_left, turned_right)
            self.inner.change_basis(
                self._inner_state(state), change, self.compressed_step(state, step).where_valid(new.found)
            )
        step = step.where_valid(new.found)
        for basis, taken in ((left, new.left), (right, new.right)):
            if basis is not None and taken is not None:
                step.store(basis, taken)

    def _inner_state(self, state: State) -> State:
        """Return the state tensors of the inner rule."""
        return {name: value for name, value in state.items() if name not in _SIDES}

    def bases(self, state: State) -> tuple[Tensor | None, Tensor | None]:
        """The (left, right) basis in use, whole; one of them may not be."""
        return state.get("left_basis"), state.get("right_basis")

    def low_shard(self, state: State, shard: Shard | None) -> Shard | None:
        """Return where the low-rank gradient of a part of a matrix lies."""
        left, right = self.bases(state)
        rank = min(basis.shape[side] for basis, side in ((left, 1), (right, 0)) if basis is not None)
        return None if shard is None else shard.low_rank(left is not None, right is not None, rank)

    def _parts(self, state: State, shard: Shard | None) -> tuple[Tensor | None, Tensor | None]:
        """Return what of the bases in use meets the part at hand."""
        left, right = self.bases(state)
        if shard is None:
            return left, right
        return left if left is None else shard.part(left, 0), right if right is None else shard.part(right, 1)

    def compressed_step(self, state: State, step: Step) -> Step:
        """Return the step of the low-rank gradient."""
        return step if step.shard is None else replace(step, shard=self.low_shard(state, step.shard)).placed()


def is_projected(module_name: str, module: torch.nn.Module) -> bool:
    """The paper's targets: the linear layers of attention and MLP; not embeddings, norms or the head."""
    return isinstance(module, torch.nn.Linear) and ("attn" in module_name or "mlp" in module_name)
