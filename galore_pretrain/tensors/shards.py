"""Tensors of which each process holds a part: where that lies, and sums over the parts.

torch's FSDP2 shares them out (``fully_shard`` over a mesh of replicas × shards) and reduces their gradients; rules then
work on the part at hand. Nothing here imports torch.distributed before such a tensor exists.
"""

from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """The slice ``start:stop`` along dimension ``dim`` of a tensor of that ``shape``, one of ``count`` such slices that
    the processes of ``group`` hold, each ``length`` long but for the last ones."""

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
        return (*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :])

    @property
    def offset(self) -> int:
        """Elements of the slices before this one: no two processes round with the same random bits."""
        return self.start * prod(self.shape[: self.dim] + self.shape[self.dim + 1 :])

    def of(self, whole: Tensor) -> Tensor:
        """The slice of a tensor of that shape."""
        return whole.narrow(self.dim, self.start, self.stop - self.start)

    def part(self, basis: Tensor, dim: int) -> Tensor:
        """Return the rows (0) or columns (1) of a ``basis`` of dimension ``dim`` that meet the slice; else all."""
        return basis.narrow(dim, self.start, self.stop - self.start) if dim == self.dim else basis

    def low_rank(self, left: bool, right: bool, rank: int) -> "Shard | None":
        """Return where the low-rank gradient lies; None where every process has all of it."""
        if (left, right)[self.dim]:
            return None
        return replace(self, shape=(rank if left else self.shape[0], rank if right else self.shape[1]))

    def sum(self, part: Tensor) -> Tensor:
        """``part`` summed over the processes, the same on all of them."""
        from torch import distributed

        total = part.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=self.group)
        return total


def is_shared(tensor: Tensor) -> bool:
    """Whether other processes have a part in ``tensor``, or a copy of it."""
    return hasattr(tensor, "device_mesh")


def shard_of(tensor: Tensor) -> Shard | None:
    """Which part of ``tensor`` this process holds; None where it holds all."""
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None or mesh.size(-1) == 1:
        return None
    dim, count, index = tensor.placements[-1].dim, mesh.size(-1), mesh.get_local_rank(mesh.ndim - 1)  # type: ignore[attr-defined]
    size, length = tensor.shape[dim], -(-tensor.shape[dim] // count)
    start, stop = (min(size, i * length) for i in (index, index + 1))
    return Shard(dim, start, stop, tuple(tensor.shape), count, mesh.get_group(mesh.ndim - 1))


def local(tensor: Tensor) -> Tensor:
    """Return what this process holds of ``tensor``, sharing its memory; itself where that is all."""
    return tensor.detach().to_local() if is_shared(tensor) else tensor.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def fill(tensor: Tensor, whole: Tensor) -> None:
    """``tensor`` takes its part of ``whole``, which every process has."""
    shard = shard_of(tensor)
    local(tensor).copy_(whole if shard is None else shard.of(whole))


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """All of ``tensor``, gathered from the processes, which must all ask for it."""
    return tensor.detach().full_tensor() if is_shared(tensor) else tensor.detach()  # type: ignore[attr-defined]
