"""Matrices in 4 or 8 bits an element, as bases are kept: written and read as a whole, rounded to nearest.

An element is (code - zero) · scale. 256 neighbours of the flattened matrix share a scale and a zero, which is a code
itself: their range is cut into even steps, and reaches to 0 where they are of one sign. So none is off by more than a
step, and a 0 stays a 0.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor

from galore_pretrain.tensors.fused import on_device
from galore_pretrain.tensors.operations import operation

GROUP = 256
"""Neighbours that share a scale and a zero."""
_ELEMENTS = 1024  # that a program reads


@dataclass(frozen=True)
class Packed:
    """Holds a matrix of ``shape``: ``codes`` and ``zeros`` are uint8, ``scales`` of the dtype that it is read in.

    All three are flat. There is a scale and a zero for each group, and codes for whole groups: of 4 bits, a byte has
    two, the first of them in its lower half.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    shape: tuple[int, int]

    @classmethod
    def empty(cls, like: Tensor, rows: int, columns: int, bits: int) -> Self:
        """Return a matrix of zeros, on the device of ``like`` and to be read in its dtype."""
        groups = -(-rows * columns // GROUP)
        codes = like.new_zeros(groups * GROUP * bits // 8, dtype=torch.uint8)
        zeros = like.new_zeros(groups, dtype=torch.uint8)
        return cls(codes, like.new_zeros(groups), zeros, (rows, columns))

    @property
    def bits(self) -> int:
        """Return how many bits a code has."""
        return 8 * self.codes.numel() // (GROUP * max(1, self.scales.numel()))

    def read(self, *, by_kernel: bool = False) -> Tensor:
        """Return the matrix, m × n, in the dtype of the scales."""
        rows, columns = self.shape
        if by_kernel:
            matrix: Tensor = _op()(self.codes, self.scales, self.zeros, rows, columns, self.bits)
            return matrix
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1)
        steps = codes.view(-1, GROUP).float() - self.zeros.float()[:, None]
        values = steps.mul_(self.scales.float()[:, None]).to(self.scales.dtype)
        return values.view(-1)[: rows * columns].view(rows, columns)

    # The scale is rounded to its dtype before codes are made by it. In bf16 that can make the range half a step too
    # short in 8 bits, hence the clamp.
    def written(self, matrix: Tensor) -> "Packed":
        """Return ``matrix`` (m × n) in the form of this one."""
        groups = self.scales.numel()
        flat = matrix.float().reshape(-1)
        missing = groups * GROUP - flat.numel()
        if missing:
            flat = torch.nn.functional.pad(flat, (0, missing))
        values = flat.view(groups, GROUP)
        largest_code = 2**self.bits - 1
        least = values.amin(1).clamp(max=0.0)
        most = values.amax(1).clamp(min=0.0)
        scales = ((most - least) / largest_code).to(self.scales.dtype)
        divisors = torch.where(scales > 0, scales, 1.0).float()
        zeros = (-least / divisors).round_().clamp_(0, largest_code)
        codes = (values / divisors[:, None]).round_().add_(zeros[:, None]).clamp_(0, largest_code)
        codes = codes.to(torch.uint8).view(-1)
        if self.bits == 4:
            codes = codes[0::2] | (codes[1::2] << 4)
        return Packed(codes, scales, zeros.to(torch.uint8), self.shape)


@cache
def _op() -> Callable[..., Any]:
    """Return the operation, registered when it is first needed."""
    return operation("unpack", _unpack, _matrix)


def _unpack(codes: Tensor, scales: Tensor, zeros: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """Return the matrix that codes, scales and zeros stand for."""
    matrix = _matrix(codes, scales, zeros, rows, columns, bits)
    _launch(matrix, codes, scales, zeros, bits)
    return matrix


def _matrix(codes: Tensor, scales: Tensor, zeros: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """Return a place for a matrix."""
    del codes, zeros, bits
    return scales.new_empty(rows, columns)


def _launch(matrix: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> None:
    """Launch the kernel that reads."""
    from galore_pretrain.tensors import kernels

    n = matrix.numel()
    if not n:
        return
    with on_device(matrix.device):
        kernels.unpack[(-(-n // _ELEMENTS),)](matrix, codes, scales, zeros, n, BITS=bits, GROUP=GROUP, SIZE=_ELEMENTS)
