"""GaLore (arXiv 2403.03507, Algorithm 2): any update rule, run in a low-rank subspace of the gradient."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim.bases import basis_shape, empty_basis, entries_of_basis, read_basis, write_basis
from galore_pretrain.optim.lazy import Schedule, after_probe, after_refresh, empty_schedule, random_overlap
from galore_pretrain.optim.methods import BASIS_NAMES, BASIS_STORES, MOMENTS, REFRESHES
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.overlap import subspace_overlap
from galore_pretrain.optim.projector import (
    BASES,
    Basis,
    BasisFn,
    Side,
    basis_at,
    clipped_rank,
    is_drawn,
    is_turned,
    project,
    project_fast,
    random_basis,
    sides,
)
from galore_pretrain.optim.rule import (
    BasisChange,
    Direction,
    Layout,
    NewBases,
    OuterRule,
    Scope,
    UpdateRule,
    check_count,
    check_low_rank_scope,
    update_in_chunks,
)
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import SMALL_CHUNK
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.tensors.values import gradient_norm, known_true

_Bases = tuple[Tensor | None, Tensor | None]
_SIDES: dict[str, Side] = {
    "left_basis": "left",
    "right_basis": "right",
}


_BASIS_ENTRIES = tuple(entry for name in _SIDES for entry in entries_of_basis(name))


@dataclass(frozen=True)
class GaLore(OuterRule):
    """Project the gradient, update in the subspace with ``inner``, project back × ``scale`` (the paper's α).

    The basis is renewed from the current gradient every ``update_proj_gap`` (T) updates. ``refresh="together"`` renews
    all matrices at updates 1, T + 1, 2T + 1, … (the paper's). ``"staggered"`` starts from a seeded orthonormal basis
    and spreads the first refreshes over the first T/10 updates, so that no single update stalls; each matrix is then
    renewed every T. ``"lazy"`` does that too, but leaves refreshes out where the subspace stays (`optim.lazy`). At a
    refresh, ``moments`` are carried over as they are (``keep``, the paper's), expressed in the
    new basis (``project``) or begun anew (``reset``, also where the refresh that was due fails). A decomposition that
    fails, and a gradient of zeros, leave the old basis for another T updates.

    ``basis_store`` says how a basis is kept: in the parameter's dtype (``dense``), or in 8 or 4 bits an element with
    groups of 256 (``int8``, ``int4``), from which it is read for each product. Rounded so, ‖PᵀP − I‖ is not 0, and each
    vector of 4 bits is about a hundredth too long.

    ``published`` forms the m × n update in the gradient's dtype, as the published code does, where the factors of
    rank r would do; ``upcast`` works on an fp32 copy of the gradient, as its Adafactor does.
    """

    inner: UpdateRule
    rank: int = 128
    update_proj_gap: int = 200
    scale: float = 0.25
    proj_type: str = "std"
    basis: str | Basis = "randomized"
    basis_store: str = "dense"
    refresh: str = "staggered"
    moments: str = "keep"
    published: bool = False
    upcast: bool = False
    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType(
        dict.fromkeys((*_BASIS_ENTRIES, "schedule"), Layout.EVERYWHERE)
    )

    def __post_init__(self) -> None:
        if isinstance(self.basis, str) and self.basis not in BASES:
            raise ValueError(f"basis {self.basis!r} is unknown; choose from {', '.join(BASIS_NAMES)}")
        _check_choice("basis_store", self.basis_store, BASIS_STORES)
        if self.basis_store != "dense" and is_turned(self.basis):
            raise ValueError(
                f"basis_store {self.basis_store!r} rounds a basis to steps that are far larger than the turns of a "
                "tracked one, which would stay where it is: use dense, or another basis"
            )
        if self.basis_store != "dense" and self.published:
            raise ValueError(f"basis_store {self.basis_store!r} is not the published code's: use dense")
        _check_choice("refresh", self.refresh, REFRESHES)
        _check_choice("moments", self.moments, MOMENTS)
        if self.refresh == "lazy":
            self._check_lazy()
        check_count("rank", self.rank)
        check_count("update_proj_gap", self.update_proj_gap)
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale {self.scale} must be finite and not negative")
        sides(1, 1, self.proj_type)  # refuses an unknown one

    def _check_lazy(self) -> None:
        """Raise ValueError for what cannot be combined with lazy refreshes."""
        why = None
        if is_drawn(self.basis) or is_turned(self.basis):
            why = f"basis {self.basis!r} is no answer to where a gradient's subspace is"
        elif self.moments == "reset":
            why = "moments 'reset' begin their bias corrections anew with each basis, and nobody knows in advance when"
        elif self.update_proj_gap < 2:
            why = "update_proj_gap 1 leaves no update between two refreshes, by which the noise could be measured"
        if why:
            raise ValueError(f"refresh 'lazy': {why}; use staggered")

    @property
    def scope(self) -> Scope:
        """A part can be updated by itself, where `init` does not refuse the inner rule."""
        return Scope.PARTS

    @property
    def projects(self) -> bool:
        """Sums of micro-batches are kept in low rank."""
        return True

    def layout(self, name: str, state: State, shard: Shard) -> Shard | None:
        """Return where a state tensor lies: bases everywhere, the inner rule's where the low-rank gradient lies."""
        if name in self.layouts:
            return None
        low_shard = _low_shard(state, shard)
        if low_shard is None:
            return None
        return self.inner.layout(name, state, low_shard)

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return ``left_basis`` (m × r) and ``right_basis`` (r × n), one or both, and the inner rule's state.

        ValueError for a tensor that is no matrix, and for an inner rule that cannot update a part of one.
        """
        if like.ndim != 2:
            raise ValueError(
                f"GaLore projects matrices; a tensor of shape {tuple(like.shape)} belongs into a group without rank"
            )
        if self.upcast:
            like = like.float()
        m, n = like.shape if shard is None else shard.shape
        left, right = sides(m, n, self.proj_type)
        r = clipped_rank("GaLore", self.rank, m, n)
        low_m, low_n = like.shape
        state: State = {}
        if left:
            state |= self._empty_basis("left_basis", like, m, r)
            low_m = r
        if right:
            state |= self._empty_basis("right_basis", like, r, n)
            low_n = r
        if self.refresh == "lazy":
            state["schedule"] = empty_schedule(like)
        low = like.new_empty(low_m, low_n)
        low_shard = None if shard is None else shard.low_rank(left, right, r)
        check_low_rank_scope(self.inner, low_shard)
        return state | self.inner.init(low, low_shard)

    # A published basis lies column by column, as LAPACK leaves it: on some processors a product has other last bits if
    # its factor lies otherwise.
    def _empty_basis(self, name: str, like: Tensor, rows: int, columns: int) -> State:
        """Return the entries of a basis of zeros of that shape."""
        if self.published:
            return {name: like.new_zeros(columns, rows).T}
        return empty_basis(name, like, rows, columns, self.basis_store)

    def start(self, state: State, step: Step) -> None:
        """Give the matrix a random orthonormal basis before its first update. The basis depends on the seed alone."""
        if step.count > 1:
            return
        for name, side in _SIDES.items():
            shape = basis_shape(state, name)
            if shape is not None:
                basis = random_basis(shape, side, step.seed, state[name].device)
                write_basis(state, name, basis, step)

    # R = PᵀG, GQᵀ or PᵀGQᵀ for G (m × n), P (m × r) and Q (r × n). Where processes share out a side that is projected,
    # each has a term of R only, and all terms are summed. A side that is not projected stays shared out in R.
    def compress(self, grad: Tensor, state: State, step: Step) -> Tensor:
        """Return the low-rank gradient in the basis in use, contiguous: r × n, m × r or r × r.

        It is linear in ``grad``, so the parts of a sum can be projected one by one, and a factor applied afterwards.
        """
        shard = step.shard
        left, right = self._bases_at_hand(state, step)
        in_use = right if left is None else left
        assert in_use is not None
        if self.upcast:
            grad = grad.float()
        if self.published:
            low = project(grad, left, right).contiguous()
        elif grad.dtype == torch.float32 == in_use.dtype:
            # These are the products of `project_fast`, without the calls: a small matrix takes no longer than they do.
            low = grad
            if right is not None:
                low = low @ right.T
            if left is not None:
                low = (low.T @ left).T
            low = low.contiguous()
        else:
            low = project_fast(grad, left, right)
        if shard is None or _low_shard(state, shard) is not None:
            return low
        total = shard.sum(low.float())
        return total.to(low.dtype)

    # The paper's Algorithm 2: the inner rule turns the low-rank gradient R into a direction N of its shape, and the
    # weight moves by α P N, α N Q or α P N Q. This is returned as two factors, m × r and r × n, whose product is first
    # formed when it is added to the weight. Only ``published`` forms it here, since that code rounds it.
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the inner rule by the low-rank gradient and project its direction back, in factors."""
        left, right = self._bases_at_hand(state, step)
        low = self._low_direction(grad, state, step)
        if left is None:
            assert right is not None
            tall, wide = low.left, right
        elif right is None:
            tall, wide = left, low.left
        else:
            tall, wide = left @ low.left, right
        if not self.published:
            factor = self.scale * low.factor
            return Direction(tall, wide, factor, scaled=low.scaled)
        whole = tall @ wide
        whole.mul_(self.scale)
        return Direction(whole, factor=low.factor, scaled=low.scaled)

    def _low_direction(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the inner rule by the low-rank gradient, which may be overwritten; return its direction N.

        That is one term and one tensor, of the shape and dtype of ``grad``, and a factor.
        """
        low_step = step
        if step.shard is not None:
            low_step = self.compressed_step(state, step)
        if self.moments == "reset":  # the bias corrections begin anew with the moments
            low_step = replace(low_step, count=_age(self, step))
        dtype = grad.dtype
        inner_state = _inner_state(self, state)
        if grad.numel() <= SMALL_CHUNK:
            low = self.inner.update(grad, inner_state, low_step)
        else:
            low = update_in_chunks(self.inner, grad, inner_state, low_step)
        if low.rest is not None:
            low = low.merged()
        low_direction = low.left
        if low.right is not None or low.row is not None or low.column is not None:
            low_direction = low.whole()
        if low_direction.dtype != dtype:
            low_direction = low_direction.to(dtype)
        return Direction(low_direction, factor=low.factor, scaled=low.scaled)

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Raise TypeError: GaLore is the rule that changes bases."""
        raise TypeError("GaLore has a basis of its own; it is not run inside another")

    def next_refresh(self, step: Step) -> int:
        """Return the number of the first update, from this one on, that begins with a new basis."""
        since = _since_first_refresh(self.refresh, self.update_proj_gap, step)
        if since < 0:
            return step.count - since
        return step.count + -since % self.update_proj_gap

    def schedule(self, state: State) -> Tensor | None:
        """Return the numbers of the matrix's `Schedule`, where refreshes are lazy."""
        return state.get("schedule")

    def finds_bases(self, step: Step, schedule: Sequence[float] | None = None) -> bool:
        """A lazy refresh leaves out what the schedule says, and has probes besides."""
        is_refresh = self.next_refresh(step) == step.count
        is_probe = self.probes(step)
        if self.refresh != "lazy" or schedule is None:
            return is_refresh or is_probe
        period = self._period(step)
        chosen = Schedule.of(schedule)
        return (is_refresh and chosen.refreshes(period)) or (is_probe and chosen.probes(period))

    # Refreshes lie in the first tenth of a period and probes in the second. So no update has more to do for them.
    def probes(self, step: Step) -> bool:
        """Say whether an update is a tenth of a period after one that may renew the basis, and refreshes are lazy."""
        if self.refresh != "lazy":
            return False
        since = _since_first_refresh(self.refresh, self.update_proj_gap, step)
        return since >= 0 and since % self.update_proj_gap == _spread(self.update_proj_gap)

    def _period(self, step: Step) -> int:
        """Return how many periods of T updates ago the first refresh of the matrix was due."""
        return _since_first_refresh(self.refresh, self.update_proj_gap, step) // self.update_proj_gap

    @property
    def draws_bases(self) -> bool:
        """Random bases have nothing of the gradient in them."""
        return is_drawn(self.basis)

    def find_bases(self, grad: Tensor, state: State, step: Step) -> NewBases:
        """Return new bases from the whole gradient; those in use, and false, where a decomposition raises."""
        if self.upcast:
            grad = grad.float()
        left, right = self.bases(state)
        since = _since_first_refresh(self.refresh, self.update_proj_gap, step)
        number = since // self.update_proj_gap + 1
        find = basis_at(self.basis, number, step.seed)
        new = _find_bases(find, grad, left, right)
        if self.refresh == "lazy":
            new = new._replace(overlap=subspace_overlap((left, right), (new.left, new.right)))
        return new

    def empty_bases(self, state: State) -> NewBases:
        """Return what `find_bases` returns, for another process's bases to be written into."""
        device = next(iter(state.values())).device
        left = _empty_in_fp32(basis_shape(state, "left_basis"), device)
        right = _empty_in_fp32(basis_shape(state, "right_basis"), device)
        one = torch.ones((), device=device)
        return NewBases(left, right, one, one.clone() if self.refresh == "lazy" else None)

    # Nobody waits to see `new.found` or `step.valid`: all that is written depends on them, on the device. A failed
    # refresh changes neither basis nor moments, but for ``reset``, whose moments begin anew whenever a refresh is due.
    # An update that is skipped leaves these too. The count of their bias corrections is the host's, which knows of no
    # skip, and begins anew all the same: with the old moments, Adam's updates are too small until the next refresh.
    def set_bases(self, new: NewBases, state: State, step: Step) -> None:
        """Take new bases and tell the inner rule; what failed is noted in ``step.failures``."""
        left, right = self.bases(state)
        schedule = self.schedule(state)
        if schedule is not None:
            self._reschedule(schedule, new, state, step)
            if self.probes(step):
                return
        has_moments = step.count > 1
        if has_moments and self.moments == "reset":
            for value in _inner_state(self, state).values():
                zero = value.new_zeros(())
                step.store(value, zero.expand_as(value))
        _note_failure(new.found, step)
        if has_moments and self.moments != "reset":
            change = BasisChange()
            if self.moments == "project":
                change = _overlap(left, right, new)
            low_step = self.compressed_step(state, step)
            low_step = low_step.where_valid(new.found)
            self.inner.change_basis(_inner_state(self, state), change, low_step)
        step = step.where_valid(new.found)
        for name, basis in (("left_basis", new.left), ("right_basis", new.right)):
            if basis is not None:
                write_basis(state, name, basis, step)

    def _reschedule(self, schedule: Tensor, new: NewBases, state: State, step: Step) -> None:
        """Take into the schedule how much the new bases, if there are such, overlap with those in use."""
        assert new.overlap is not None
        if self.probes(step):
            following = after_probe(schedule, new.overlap)
        else:
            shapes = [basis_shape(state, name) for name in _SIDES]
            following = after_refresh(schedule, self._period(step), new.overlap, random_overlap(shapes))
        step.where_valid(new.found).store(schedule, following)

    def bases(self, state: State) -> _Bases:
        """Return the (left, right) basis in use, whole; either may be absent, not both."""
        return read_basis(state, "left_basis"), read_basis(state, "right_basis")

    def held_bases(self, state: State) -> list[Tensor]:
        """Return the tensors that hold the bases."""
        return [value for name, value in state.items() if name in _BASIS_ENTRIES]

    def _bases_at_hand(self, state: State, step: Step) -> _Bases:
        """Return the rows of the left basis and the columns of the right one that meet the part at hand of a matrix."""
        left, right = self.bases(state)
        shard = step.shard
        if shard is None:
            return left, right
        if left is not None:
            left = shard.part(left, 0)
        if right is not None:
            right = shard.part(right, 1)
        return left, right

    def compressed_step(self, state: State, step: Step) -> Step:
        """Return the step of the low-rank gradient."""
        if step.shard is None:
            return step
        low_shard = _low_shard(state, step.shard)
        low_step = replace(step, shard=low_shard, start=0)
        return low_step.placed()


_OF_ENCODER = re.compile(r"(^|\.)layer\.\d+\.(attention|intermediate|output)\.")


def is_projected(module_name: str, module: torch.nn.Module) -> bool:
    """Return whether the paper projects the weight of a module.

    These are the linear layers of attention and MLP; not embeddings, norms or the head. They are known by their names:
    ``attn`` or ``mlp``, or as BERT and its kin have them (``layer.0.attention.self.query``, ``layer.0.output.dense``).
    """
    if not isinstance(module, torch.nn.Linear):
        return False
    if "attn" in module_name or "mlp" in module_name:
        return True
    return _OF_ENCODER.search(module_name) is not None


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError for a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown; choose from {', '.join(choices)}")


def _low_shard(state: State, shard: Shard) -> Shard | None:
    """Return which part of the low-rank gradient a part of a matrix gives; None where every process has all of it."""
    left = basis_shape(state, "left_basis")
    right = basis_shape(state, "right_basis")
    ranks = []
    if left is not None:
        ranks.append(left[1])
    if right is not None:
        ranks.append(right[0])
    rank = min(ranks)
    return shard.low_rank(left is not None, right is not None, rank)


def _inner_state(rule: GaLore, state: State) -> State:
    """Return the state tensors of the inner rule."""
    inner_state = dict(state)
    for name in rule.layouts:
        inner_state.pop(name, None)
    return inner_state


# Refreshing all matrices at one update would stall it. So the phases of the matrices in [0, 1) spread the first
# refreshes over T/10 updates; not over all T, since until its first refresh a matrix is projected by a random basis.
def _since_first_refresh(refresh: str, gap: int, step: Step) -> int:
    """Return how many updates ago the first refresh of a matrix was due, negative before it."""
    first = 1
    if refresh != "together":
        first += int(step.phase * _spread(gap))
    return step.count - first


def _spread(gap: int) -> int:
    """Return over how many updates the first refreshes of all matrices are spread."""
    return max(1, gap // 10)


def _age(rule: GaLore, step: Step) -> int:
    """Return the number of the update among those since the last refresh that was due, from 1."""
    since = _since_first_refresh(rule.refresh, rule.update_proj_gap, step)
    if since < 0:
        return step.count
    return since % rule.update_proj_gap + 1


# LAPACK, on a CPU, raises where it fails. On a device a failure shows in the values alone, so ``found`` is a tensor
# that nobody waits for. A gradient of zeros has no subspace; whatever a decomposition makes of it is no better than
# the basis in use.
def _find_bases(
    find: BasisFn,
    grad: Tensor,
    left: Tensor | None,
    right: Tensor | None,
) -> NewBases:
    """Return new bases of an m × n gradient, one for each basis in use (m × r, r × n)."""
    new_left, new_right = None, None
    try:
        if left is not None:
            new_left = find(grad, left.shape[1], "left", left)
        if right is not None:
            new_right = find(grad, right.shape[0], "right", right)
    except torch.linalg.LinAlgError:
        failed = torch.zeros((), dtype=torch.bool, device=grad.device)
        return NewBases(_in_fp32(left), _in_fp32(right), failed)
    found = gradient_norm(grad) > 0
    for new in (new_left, new_right):
        if new is not None:
            found &= torch.linalg.vector_norm(new).isfinite()
    return NewBases(new_left, new_right, found)


def _note_failure(found: Tensor, step: Step) -> None:
    """Gather in ``step.failures`` whether a refresh of a valid update failed, unless it is seen to have succeeded."""
    if known_true(found):
        return
    valid = step.valid
    if valid is None:
        valid = torch.ones_like(found)
    step.failures.append(valid & ~found)


# A low-rank gradient X = PᵀG stands for the gradient P X, which the new basis P' sees as P'ᵀP X. Likewise from the
# right, X = GQᵀ becomes X QQ'ᵀ. Both overlaps are r × r, and orthogonal only if the subspace stayed.
def _overlap(left: Tensor | None, right: Tensor | None, new: NewBases) -> BasisChange:
    """Return the change of coordinates from the bases in use to new ones, in fp32."""
    left_overlap = None
    if left is not None and new.left is not None:
        left_overlap = new.left.T @ left.float()
    right_overlap = None
    if right is not None and new.right is not None:
        right_overlap = right.float() @ new.right.T
    return BasisChange(True, left_overlap, right_overlap)


def _empty_in_fp32(shape: tuple[int, int] | None, device: torch.device) -> Tensor | None:
    """Return an uninitialized fp32 basis of that shape, if there is one."""
    if shape is None:
        return None
    return torch.empty(shape, device=device)


def _in_fp32(basis: Tensor | None) -> Tensor | None:
    """Return a basis, if there is one, in fp32."""
    if basis is None:
        return None
    return basis.float()
