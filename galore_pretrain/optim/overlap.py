"""Overlaps of subspaces say how far a refresh turns a basis, and how far the noise of a gradient alone would."""

import math

import torch
from torch import Tensor

_MOST_UNREAD = 4096

Bases = tuple[Tensor | None, Tensor | None]
"""A left (m × r) and a right basis (r × n); either may be absent, not both."""


# ‖PᵀP'‖²/r is the mean squared cosine of the angles between two subspaces. A basis kept in bf16 is orthonormal to 2⁻⁹
# only, so the square of its length stands for r. The quotient is then the share of ``old`` that lies in the subspace of
# ``new``, which is orthonormal in fp32: it passes 1 by fp32's rounding alone, and that is cut off.
def subspace_overlap(old: Bases, new: Bases) -> Tensor:
    """Return the overlap of two subspaces, an fp32 scalar: 1 if they are the same, r/m in the mean if they are random.

    Of bases on both sides, it is the mean of both sides' overlaps. ``new`` are fp32 and orthonormal; ``old`` may be
    rounded to bf16.
    """
    old_left, old_right = old
    new_left, new_right = new
    overlaps: list[Tensor] = []
    if old_left is not None and new_left is not None:
        overlaps.append(_share(old_left.float(), new_left.T))
    if old_right is not None and new_right is not None:
        overlaps.append(_share(old_right.float().T, new_right))
    return torch.stack(overlaps).mean()


def _share(columns: Tensor, rows: Tensor) -> Tensor:
    """Return the share of the squares of ``columns`` (m × r) that lies in the span of orthonormal ``rows`` (r × m)."""
    inside = torch.linalg.vector_norm(rows @ columns)
    length = torch.linalg.vector_norm(columns)
    overlap = (inside / length).square().clamp(max=1.0)
    return torch.as_tensor(overlap)


def overlaps_of_refresh(overlap: Tensor, noise: Tensor | None) -> dict[str, Tensor]:
    """Return what is told of a refresh, by the key of its metric: scalars, NaN where that is not known.

    ``overlap`` is that of old and new subspace. ``noise`` is that of the subspaces of two halves of the gradient, where
    it was measured. It is told beside the overlap of the same matrix, or both are NaN.
    """
    overlaps = {"subspace_overlap": overlap}
    if noise is not None:
        is_known = ~(overlap + noise).isnan()
        overlaps["subspace_overlap_noise"] = torch.where(is_known, noise, torch.nan)
        overlaps["subspace_overlap_paired"] = torch.where(is_known, overlap, torch.nan)
    return overlaps


class OverlapMeans:
    """Keeps overlaps on the device where they are found, so that nobody waits for it, until their means are asked for.

    They may be left unread for as long as one likes: of each metric, the last 4096 are kept.
    """

    def __init__(self) -> None:
        self.overlaps: dict[str, list[Tensor]] = {}  # by the key of their metric: fp32 scalars

    def add(self, overlaps: dict[str, Tensor]) -> None:
        """Add the overlaps of a refresh, by the key of their metric: fp32 scalars, NaN where it is not known."""
        for name, overlap in overlaps.items():
            kept = self.overlaps.setdefault(name, [])
            kept.append(overlap)
            if len(kept) > _MOST_UNREAD:
                del kept[0]

    # Layerwise updates are made in another order than those after backward. The sum is exact, so that the means are the
    # same to the bit.
    def take(self) -> dict[str, float]:
        """Return the means by the key of their metric, and begin anew. Waits for the device."""
        means: dict[str, float] = {}
        for name, overlaps in self.overlaps.items():
            known = [value for value in _gathered(overlaps) if not math.isnan(value)]
            if known:
                means[name] = math.fsum(known) / len(known)
        self.overlaps.clear()
        return means


def _gathered(scalars: list[Tensor]) -> list[float]:
    """Return the values of scalars on any devices; each device is waited for once."""
    of_devices: dict[torch.device, list[Tensor]] = {}
    for scalar in scalars:
        of_devices.setdefault(scalar.device, []).append(scalar)
    values: list[float] = []
    for on_device in of_devices.values():
        values += torch.stack(on_device).tolist()
    return values
