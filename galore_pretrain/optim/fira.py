"""Fira (arXiv 2410.01673): GaLore, and the rest of the gradient, scaled as its low-rank part was."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim.galore import GaLore
from galore_pretrain.optim.limiter import LAST_NORM, last_norm, limit_growth, limited_by_kernel
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import Direction, Layout
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.growth import FactorRule
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.tensors.values import sums_of_squares

_EPS = 1e-8  # the published code's


@dataclass(frozen=True)
class Fira(GaLore):
    """Moves the weight by GaLore's update and by S = φ (G − α P R), what that leaves of the gradient (§4 of the paper).

    P is m × r, R = PᵀG the low-rank gradient, N the inner rule's direction for it and α ``scale``. A channel j of the
    side that is not projected has φ_j = ‖N_j‖ / (‖R_j‖ + 1e-8): what ``inner`` made of its low-rank part. From the
    right, read rows for columns. As in the published code, S leaves out α P R, where the paper has P R, and is itself
    not multiplied by α. Where φ is 1, as of plain SGD, the sum is then G, whatever the subspace.

    ‖S‖ grows by at most the factor ``growth`` (γ) from one update to the next, ``inf`` for no limit. It is that of the
    update as applied. The published code measures before Adam's bias correction, which differs only while that matters:
    in the first 1/(1 − β₂) updates.

    The state is GaLore's and a number, ``last_norm``. A sum of micro-batches takes the whole gradient's memory.
    """

    growth: float = 1.01
    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType({**GaLore.layouts, LAST_NORM: Layout.EVERYWHERE})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proj_type == "full":
            raise ValueError(
                "Fira scales each channel of the side that is not projected, and proj_type full projects both; "
                "choose from std, reverse_std, left, right"
            )
        if self.published:
            raise ValueError("Fira keeps its update in factors: published=True, which multiplies them out, is GaLore's")
        if not self.growth >= 1:
            raise ValueError(f"growth {self.growth} must be at least 1; inf is no limit")

    @property
    def projects(self) -> bool:
        """Sums of micro-batches are kept whole: the residual needs all of the gradient."""
        return False

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return GaLore's state and the limiter's."""
        return super().init(like, shard) | last_norm(like)

    def compress(self, grad: Tensor, state: State, step: Step) -> Tensor:
        """Return the gradient as it is."""
        return grad

    # For a left basis, G m × n, R and N r × n, and φ a number for each of the n columns:
    #     direction = α P N + S = α P N + (G − α P R) diag(φ) = α P (N − R diag(φ)) + G diag(φ)
    # The right side has two terms, one of rank r and one that is the gradient itself with a factor for each column: no
    # other matrix of m × n is made. Nor is S for its norm. As P is orthonormal,
    #     ‖S‖² = Σ φ_j² ‖G_j − α P R_j‖² = Σ φ_j² (‖G_j‖² − (2α − α²) ‖R_j‖²)
    # In bf16, whose bases are orthonormal to 2⁻⁹ only, that is right to 1e-4 for α ≤ 1/4. It is off by 2 % where S is a
    # tenth of φ G, and where S is 0 it comes to about a hundredth of ‖φ G‖.
    # A right basis is the left one of Gᵀ: rows for columns.
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the inner rule by the projected gradient; return its direction and the residual's, as two terms."""
        left, right = self._bases_at_hand(state, step)
        low = super().compress(grad, state, step)
        across = 0 if right is None else 1
        seen = low.clone()  # the inner rule may overwrite the other
        inner = self._low_direction(low, state, step)
        low_direction = inner.left.float() * inner.factor

        low_norms = torch.linalg.vector_norm(seen, dim=across, dtype=torch.float32)
        if step.kernels and step.shard is None:
            rule = FactorRule(1.0, self.growth, self._seen_share, _EPS, channelwise=True)
            scales = limited_by_kernel(grad, low_norms, low_direction, across, state, step, rule)
        else:
            scales = self._scales(low_direction, low_norms, across)
            norm = self._residual_norm(scales, grad, low_norms, across, state, step)
            scales = scales * limit_growth(norm, state, step, self.growth)

        taken_out = seen * scales.unsqueeze(across)
        low_direction -= taken_out
        if right is None:
            assert left is not None
            low_term = Direction(left, low_direction.to(left.dtype), self.scale, scaled=inner.scaled)
            return low_term + Direction(grad, column=scales, scaled=inner.scaled)
        low_term = Direction(low_direction.to(right.dtype), right, self.scale, scaled=inner.scaled)
        return low_term + Direction(grad, row=scales, scaled=inner.scaled)

    @property
    def _seen_share(self) -> float:
        """Return 2α − α²: what part of ‖R_j‖² a residual's square lacks."""
        return (2 - self.scale) * self.scale

    def _scales(self, low_direction: Tensor, low_norms: Tensor, across: int) -> Tensor:
        """Return φ, a number for each channel, from N and the norms of R's channels, each taken ``across`` the rank."""
        norms = torch.linalg.vector_norm(low_direction, dim=across)
        return torch.as_tensor(norms / (low_norms + _EPS))

    # Rounding can make the difference negative where the subspace has nearly all of the gradient. Where processes share
    # the matrix out, channels or what is summed over in each may be cut: the sums of G's squares are of parts always,
    # those of R's where R is cut too.
    def _residual_norm(
        self,
        scales: Tensor,
        grad: Tensor,
        low_norms: Tensor,
        across: int,
        state: State,
        step: Step,
    ) -> Tensor:
        """Return ‖S‖ of the whole matrix, before it is limited, fp32."""
        squares = sums_of_squares(grad, across)
        total = step.total((scales.square() * squares).sum())
        low_step = self.compressed_step(state, step)
        low_total = low_step.total((scales * low_norms).square().sum())
        square = total - self._seen_share * low_total
        return square.clamp(min=0).sqrt()
