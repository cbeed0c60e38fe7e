"""Renews a basis as often as its subspace moves: which of a matrix's refreshes are made, and which are left out.

The idea is Q-GaLore's (arXiv 2407.08296, §3.2): where bases that follow each other are alike, the time between them
doubles. What is compared here are whole subspaces, by ‖P'ᵀP‖²/r, which no sign of a vector changes, and not with a
fixed number. Two gradients at the same weights have different subspaces too ("No Subspace to Track"): so a basis is
first compared with that of a gradient a tenth of a period later, which is nearly all noise.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

LONGEST = 16
"""Periods between two refreshes, at most."""
_PROBE_AGE = 4  # refreshes, after which the noise is measured again


@dataclass(frozen=True)
class Schedule:
    """Says when a matrix's basis is renewed, in periods of T updates from its first refresh on, which is in period 0.

    ``next``: the period of the next refresh. ``gap``: periods from the last one to that. ``noise``: the overlap that
    two subspaces have at about the same weights, 0 where that was not measured. ``age``: refreshes since it was.
    """

    next: float
    gap: float
    noise: float
    age: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the schedule that a tensor of `empty_schedule` holds; all of 0 before the first refresh."""
        return cls(*values)

    def refreshes(self, period: int) -> bool:
        """Return whether the basis is renewed in a period."""
        return period >= self.next

    def probes(self, period: int) -> bool:
        """Return whether the noise is measured in a period: after its refresh, if that is unknown or old."""
        is_refreshed = self.gap > 0 and period == self.next - self.gap
        return is_refreshed and (self.noise == 0 or self.age >= _PROBE_AGE)


def empty_schedule(like: Tensor) -> Tensor:
    """Return the four numbers of a `Schedule` before the first refresh, fp32, on the device of ``like``."""
    return like.new_zeros(4, dtype=torch.float32)


# A subspace moved if its overlap with the one before is nearer to that of two random ones than to that of two at the
# same weights. Then the gap is halved, else doubled. All of it is decided on the device.
def after_refresh(schedule: Tensor, period: int, overlap: Tensor, random: float) -> Tensor:
    """Return the schedule after a refresh in ``period``, whose basis has the ``overlap`` (a scalar) with the old one.

    ``random`` is the mean overlap of two random subspaces. Until the noise was measured, the gap is one period.
    """
    _, gap, noise, age = schedule.unbind()
    moved = overlap < (noise + random) / 2
    new_gap = torch.where(moved, (gap / 2).floor(), gap * 2).clamp(1, LONGEST)
    new_gap = torch.where(noise > 0, new_gap, 1.0)
    return torch.stack((period + new_gap, new_gap, noise, age + 1))


def after_probe(schedule: Tensor, overlap: Tensor) -> Tensor:
    """Return the schedule after the noise was measured as ``overlap``, a scalar."""
    following, gap, _, _ = schedule.unbind()
    return torch.stack((following, gap, overlap, torch.zeros_like(gap)))


def random_overlap(shapes: Sequence[tuple[int, int] | None]) -> float:
    """Return the mean overlap of two random subspaces that have bases of these shapes: r/m of an m × r basis."""
    shares = [min(shape) / max(shape) for shape in shapes if shape is not None]
    return sum(shares) / len(shares)
