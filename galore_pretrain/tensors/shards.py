"""Tensors of which each process holds a part: where that part lies, and sums over all parts.

torch's FSDP2 shares them out (``fully_shard`` over a mesh of replicas × shards) and reduces their gradients; rules then
work on the part at hand. Nothing here imports torch.distributed before such a tensor exists.
"""

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor


# How a state tensor is cut. Let the parameter be m × n, and let ``count`` processes share its rows (``dim`` 0). Each
# holds ⌈m / count⌉ of them, and the last ones fewer, or none. What has a dimension of rows is cut with it, by the same
# rows: a moment (m × n), a number for each row (m), the low-rank gradient G Qᵀ (m × r) of a right basis. What has none
# is whole on every process: a number for each column (n), and the low-rank gradient Pᵀ G (r × n) of a left basis, which
# is a sum over all rows. The bases P (m × r) and Q (r × n) are whole everywhere, and a process uses the rows of P that
# its part meets. Where columns are shared (``dim`` 1), exchange rows and columns, and left and right.
@dataclass(frozen=True)
class Shard:
    """Is the slice ``start:stop`` along dimension ``dim`` of a tensor of that ``shape``.

    The processes of ``group`` hold ``count`` such slices, each ``length`` long but for the last ones.
    """

    dim: int
    start: int
    stop: int
    shape: tuple[int, ...]
    count: int
    group: Any = field(repr=False, compare=False)

    @property
    def length(self) -> int:
        """Return the length of a slice that is not cut short: as FSDP2 and ``torch.chunk`` have it."""
        return -(-self.shape[self.dim] // self.count)

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Return the shape of the slice."""
        before = self.shape[: self.dim]
        after = self.shape[self.dim + 1 :]
        return (*before, self.stop - self.start, *after)

    @property
    def offset(self) -> int:
        """Return the number of elements in the slices before this one.

        Random bits are counted from it, so that no two processes round with the same ones.
        """
        other_dims = self.shape[: self.dim] + self.shape[self.dim + 1 :]
        return self.start * prod(other_dims)

    def of(self, whole: Tensor) -> Tensor:
        """Return a view of the slice of a ``whole`` tensor, which has this ``shape``."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def part(self, basis: Tensor, dim: int) -> Tensor:
        """Return the part of a ``basis`` that meets the slice: rows of P (``dim`` 0: m × r), columns of Q (1: r × n).

        Where the slice is cut along the other dimension, that is all of it.
        """
        if dim != self.dim:
            return basis
        return basis.narrow(dim, self.start, self.stop - self.start)

    def low_rank(self, left: bool, right: bool, rank: int) -> "Shard | None":
        """Return where the low-rank gradient lies; None where every process has all of it.

        ``left`` and ``right`` say which bases there are. A basis of the shared dimension sums over it.
        """
        is_summed_over = (left, right)[self.dim]
        if is_summed_over:
            return None
        rows, columns = self.shape
        if left:
            rows = rank
        if right:
            columns = rank
        return replace(self, shape=(rows, columns))

    def sum(self, part: Tensor) -> Tensor:
        """Return the sum of each process's ``part``, the same on all of them. ``part`` is left alone."""
        from torch import distributed

        total = part.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=self.group)
        return total


def is_shared(tensor: Tensor) -> bool:
    """Return whether other processes have a part in ``tensor``, or a copy of it."""
    return hasattr(tensor, "device_mesh")


def shard_of(tensor: Tensor) -> Shard | None:
    """Return the part of ``tensor`` that this process holds; None where it holds all.

    ValueError for a tensor that is cut along another dimension of its mesh than the last one, or in another way.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return None
    shards_dim = mesh.ndim - 1  # the mesh is of replicas × shards, or of shards alone
    placements: Any = tensor.placements  # type: ignore[attr-defined]
    cut_dims = [dim for dim in range(mesh.ndim) if mesh.size(dim) > 1 and not placements[dim].is_replicate()]
    if not cut_dims:
        return None
    placement = placements[shards_dim]
    if cut_dims != [shards_dim] or not placement.is_shard():
        raise ValueError(
            f"a parameter lies as {placements} on a mesh of {tuple(mesh.shape)}; it may be cut along the mesh's last "
            "dimension and be whole along the others: share it out over one dimension (FSDP2 or tensor parallelism)"
        )
    count = mesh.size(-1)
    index = mesh.get_local_rank(shards_dim)
    dim = placement.dim
    size = tensor.shape[dim]
    length = -(-size // count)
    start = min(size, index * length)
    stop = min(size, start + length)
    return Shard(dim, start, stop, tuple(tensor.shape), count, mesh.get_group(shards_dim))


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of ``tensor``, sharing its memory; itself where that is all."""
    detached = tensor.detach()
    if not is_shared(tensor):
        return detached
    part: Tensor = detached.to_local()  # type: ignore[attr-defined]
    return part


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """Fill ``tensor`` with its part of ``whole``, which every process has."""
    shard = shard_of(tensor)
    part = whole if shard is None else shard.of(whole)
    local(tensor).copy_(part)


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return all of ``tensor``, gathered from the processes, which must all call this."""
    detached = tensor.detach()
    if not is_shared(tensor):
        return detached
    gathered: Tensor = detached.full_tensor()  # type: ignore[attr-defined]
    return gathered
