"""APOLLO (arXiv 2412.05270): the gradient itself, each channel scaled as an adaptive rule would scale it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.limiter import LAST_NORM, last_norm, limit_growth, limited_by_kernel
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.projector import clipped_rank, project_fast, sides
from galore_pretrain.optim.rule import (
    BasisChange,
    Direction,
    Layout,
    OuterRule,
    Scope,
    UpdateRule,
    check_count,
    check_low_rank_scope,
    update_in_chunks,
)
from galore_pretrain.optim.sketch import gaussian
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.growth import FactorRule
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.tensors.values import channel_norms

_EPS = 1e-8  # added to the norm of a low-rank gradient before it divides


@dataclass(frozen=True)
class Apollo(OuterRule):
    """APOLLO (arXiv 2412.05270, Algorithm 1): direction √``scale`` · G · diag(s), s found by ``inner`` in low rank.

    The shorter side of G is projected by a random P with entries N(0, 1/r), R = PᵀG, and ``inner`` (the paper's: Adam)
    makes the direction N of R. A channel, a column of R, has s = ‖N_j‖ / (‖R_j‖ + 1e-8). ``channelwise=False`` gives
    all channels one s, ‖N‖_F / (‖R‖_F + 1e-8): APOLLO-Mini is that at rank 1 and scale 128.

    P is drawn anew every ``update_proj_gap`` updates, and the moments of ``inner`` are kept, as published. P depends on
    the parameter's seed and the number of the draw alone, so no state holds it. An update's norm may be ``growth``
    times that of the one before at most. Norms are those of updates as they are applied; the published code compares
    them before Adam's bias correction, which differs in the first 1/(1 − β₂) updates.
    """

    inner: UpdateRule = field(default_factory=Adam)
    rank: int = 256
    update_proj_gap: int = 200
    scale: float = 1.0
    channelwise: bool = True
    growth: float = 1.01
    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType({LAST_NORM: Layout.EVERYWHERE})

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("update_proj_gap", self.update_proj_gap)
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale {self.scale} must be finite and not negative")
        if self.inner.projects:
            raise ValueError(
                f"{type(self.inner).__name__} has bases of its own; run a rule inside Apollo that has none"
            )
        if not self.growth >= 1:
            raise ValueError(f"growth {self.growth} must be at least 1; inf never limits an update")

    @property
    def scope(self) -> Scope:
        """A part can be updated by itself, where `init` does not refuse the inner rule."""
        return Scope.PARTS

    def layout(self, name: str, state: State, shard: Shard) -> Shard | None:
        """Return where a state tensor lies: the inner rule's where the low-rank gradient lies."""
        if name in self.layouts:
            return super().layout(name, state, shard)
        low_shard = self._low_shard(shard)
        if low_shard is None:
            return None
        return self.inner.layout(name, state, low_shard)

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return ``last_norm`` and the inner rule's state for the low-rank gradient, r × n or m × r.

        ValueError for a tensor that is no matrix, and for an inner rule that cannot update a part of one.
        """
        if like.ndim != 2:
            raise ValueError(
                f"APOLLO projects matrices; a tensor of shape {tuple(like.shape)} belongs into a group of another rule"
            )
        m, n = like.shape if shard is None else shard.shape
        r = clipped_rank("APOLLO", self.rank, m, n)
        low_m, low_n = like.shape
        if _projects_right(m, n):
            low_n = r
        else:
            low_m = r
        low_shard = None if shard is None else self._low_shard(shard)
        check_low_rank_scope(self.inner, low_shard)
        low = like.new_empty(low_m, low_n)
        return last_norm(like) | self.inner.init(low, low_shard)

    # P has nothing in common with the one before it. Adam's moments are kept all the same, as published; a rule that
    # cannot keep what it has seen in another subspace, such as a history of gradients, says so by `change_basis`.
    def start(self, state: State, step: Step) -> None:
        """Tell the inner rule, before an update's first gradient, where a new P begins."""
        updates_before = step.count - 1
        if updates_before and updates_before % self.update_proj_gap == 0:
            self.inner.change_basis(_inner_state(state), BasisChange(), self._low_step(step))

    # The paper's Algorithm 1 for G (m × n), here with m < n, so that channels are columns:
    #     R = PᵀG  (r × n)        N = the inner rule's direction for R        s_j = ‖N_j‖ / (‖R_j‖ + 1e-8)
    #     U = √scale · G · diag(s)        direction = U · min(1, growth · ‖last U‖ / ‖U‖)
    # Where m ≥ n, channels are rows, and R = GQᵀ (m × r). U is returned in its factors and never made: its norm is that
    # of the numbers s_j ‖G_j‖. Where processes share out the projected side, R is summed over them and its direction is
    # found by each; a channel's ‖G_j‖ is then of a part of it, and ‖U‖² is the sum over all parts either way.
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the inner rule by the low-rank gradient, and return ``grad`` with a factor for each channel."""
        m, n = step.shape(grad)
        right = _projects_right(m, n)
        projected_dim = 1 if right else 0
        low = self._low_rank(grad, step)
        low_norms = channel_norms(low, projected_dim)
        direction = update_in_chunks(self.inner, low, _inner_state(state), self._low_step(step))
        if direction.scaled:
            raise ValueError(
                f"{type(self.inner).__name__} has the learning rate in its direction, which is then no measure of a "
                "gradient: run a rule inside Apollo that leaves the rate out"
            )
        if step.kernels and step.shard is None:
            multiple = math.sqrt(self.scale) * abs(direction.factor)
            rule = FactorRule(multiple, self.growth, share=0.0, eps=_EPS, channelwise=self.channelwise)
            factors = limited_by_kernel(grad, low_norms, direction.whole(), projected_dim, state, step, rule)
        else:
            factors = self._factors(grad, low_norms, direction, projected_dim, state, step)
        if right:
            return Direction(grad, row=factors)
        return Direction(grad, column=factors)

    def _factors(
        self, grad: Tensor, low_norms: Tensor, direction: Direction, over: int, state: State, step: Step
    ) -> Tensor:
        """Return the limited factor of each channel, by single operations; ``low_norms`` and more may be of a part."""
        low_step = self._low_step(step)
        direction_norms = channel_norms(direction.whole(), over)
        direction_norms.mul_(abs(direction.factor))
        if not self.channelwise:
            low_norms = _whole_norm(low_norms, low_step).expand_as(low_norms)
            direction_norms = _whole_norm(direction_norms, low_step).expand_as(low_norms)
        factors = direction_norms / (low_norms + _EPS)
        factors.mul_(math.sqrt(self.scale))
        norm = _whole_norm(factors * channel_norms(grad, over), step)
        return factors.mul_(limit_growth(norm, state, step, self.growth))

    def _low_rank(self, grad: Tensor, step: Step) -> Tensor:
        """Return R = PᵀG (r × n) or GQᵀ (m × r) in the dtype of ``grad``, contiguous; this process's part of it."""
        m, n = step.shape(grad)
        right = _projects_right(m, n)
        projected_dim = 1 if right else 0
        shard = step.shard
        start = 0
        if shard is not None and shard.dim == projected_dim:
            start = shard.start
        sketch = gaussian(
            start,
            start + grad.shape[projected_dim],
            min(self.rank, m, n),
            seed=step.seed,
            draw=(step.count - 1) // self.update_proj_gap,
            device=grad.device,
            dtype=grad.dtype,
        )
        if right:
            low = project_fast(grad, None, sketch.T)
        else:
            low = project_fast(grad, sketch, None)
        if shard is None or self._low_shard(shard) is not None:
            return low
        total = shard.sum(low.float())
        return total.to(low.dtype)

    def _low_shard(self, shard: Shard) -> Shard | None:
        """Return which part of the low-rank gradient a part of a matrix gives; None where every process has all."""
        m, n = shard.shape
        right = _projects_right(m, n)
        return shard.low_rank(not right, right, min(self.rank, m, n))

    def _low_step(self, step: Step) -> Step:
        """Return the step of the low-rank gradient."""
        if step.shard is None:
            return step
        low_step = replace(step, shard=self._low_shard(step.shard), start=0)
        return low_step.placed()

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Raise TypeError: Apollo is a rule that projects."""
        raise TypeError("Apollo has a projection of its own; it is not run inside another")


def _projects_right(m: int, n: int) -> bool:
    """Return whether an m × n matrix is projected from the right, so that its channels are rows."""
    _, right = sides(m, n, "std")
    return right


def _inner_state(state: State) -> State:
    """Return the state tensors of the inner rule."""
    return {name: value for name, value in state.items() if name != LAST_NORM}


def _whole_norm(norms: Tensor, step: Step) -> Tensor:
    """Return the norm, a scalar, of the whole tensor whose channels at hand have these ``norms``."""
    if step.shard is None:
        return torch.as_tensor(torch.linalg.vector_norm(norms))
    return step.total(norms.square().sum()).sqrt()
