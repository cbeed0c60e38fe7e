"""Matrices of weights held as 8-bit integers with scales: read a block at a time, and changed in place.

An element is code · scale, a code an integer from -127 to 127, and a scale is shared by a group of neighbours in a row,
or by all of it. Codes are symmetric around 0, so a group of one sign loses nothing.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from galore_pretrain.tensors import capability
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.fused import read_codes
from galore_pretrain.tensors.shards import local

LARGEST = 127
"""The largest code. -128 is not used, so that both signs reach as far."""
_LEAST = 64  # the least that the largest code of a group may fall to before its scale changes
_WANTED = 96.0  # the largest code after that: room to grow, and most of a byte's precision


@dataclass(frozen=True)
class Coded:
    """Holds a matrix of m × n: ``codes``, int8, and ``scales``, bf16, of m × groups; each row has ``groups`` of them.

    A group is ``group`` neighbours in a row; a row's last one may be shorter.
    """

    codes: Tensor
    scales: Tensor
    group: int

    @classmethod
    def empty(cls, rows: int, columns: int, group: int | None, device: torch.device | str | None = None) -> Self:
        """Return a matrix whose memory holds anything; ``group`` None: a row has one scale."""
        group = columns if group is None else min(group, columns)
        codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
        scales = torch.empty(rows, -(-columns // group), dtype=torch.bfloat16, device=device)
        return cls(codes, scales, group)

    @property
    def nbytes(self) -> int:
        """Return the bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes

    def rows(self, start: int, stop: int) -> "Coded":
        """Return a view of the rows ``start:stop``."""
        return Coded(self.codes[start:stop], self.scales[start:stop], self.group)

    def blocks(self, multiple: int = 1) -> "Iterator[tuple[int, Coded]]":
        """Yield the matrix as blocks of rows that a cache holds in fp32, each with the number of its first row.

        All blocks but the last have a multiple of ``multiple`` elements.
        """
        rows, columns = self.codes.shape
        least = multiple // math.gcd(multiple, columns)
        size = max(1, chunk_elements(self.codes.device) // columns // least) * least
        for start, stop in chunks(self.codes, rows, size):
            yield start, self.rows(start, stop)

    def _spread(self, values: Tensor) -> Tensor:
        """Return values of groups (m × groups) for the elements of the groups: m × n, or what stretches to that."""
        if values.shape[1] == 1:
            return values
        return values.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]

    def in_steps(self, values: Tensor) -> Tensor:
        """Divide ``values`` (m × n, fp32) by the scales in place, and return them."""
        return values.div_(self._spread(self.scales.float()))

    def _largest(self, steps: Tensor) -> Tensor:
        """Return the largest magnitude of each group of ``steps`` (m × n): m × groups."""
        magnitudes = steps.abs()
        columns = steps.shape[1]
        if self.group >= columns:
            return magnitudes.amax(1, keepdim=True)
        missing = -columns % self.group
        if missing:
            magnitudes = nn.functional.pad(magnitudes, (0, missing))
        return magnitudes.view(len(steps), -1, self.group).amax(2)

    def read(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the matrix in ``dtype``: products of fp32, rounded to nearest."""
        if capability.runs_on(self.codes.device):
            return read_codes(self.codes, self.scales, self.group, dtype)
        if dtype == torch.float32:
            return self.codes.float().mul_(self._spread(self.scales.float()))
        matrix = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for start, block in self.blocks():
            matrix[start : start + len(block.codes)] = block.read()
        return matrix

    def write(self, matrix: Tensor) -> None:
        """Take the values of ``matrix`` (m × n), each as the nearest code. The scales are made for them."""
        for start, block in self.blocks():
            values = matrix[start : start + len(block.codes)].float()
            largest = block._largest(values)
            scales = torch.where(largest > 0, largest / _WANTED, 1.0).to(torch.bfloat16)
            block.scales.copy_(scales)
            steps = values / block._spread(scales.float())
            block.codes.copy_(steps.round_().clamp_(-LARGEST, LARGEST))

    # All arithmetic is in steps, where an element is its code: what an update leaves alone stays the same number, and
    # so the same code. A scale changes only where its largest element would leave the codes, or would waste more than
    # half of them; then all elements of the group are rounded anew. A group of zeros keeps its scale.
    #
    # Rounding is stochastic: the floor of a number plus a uniform one in [0, 1) is the number in the mean. fp32 holds
    # numbers up to 128 to 2⁻¹⁷, which is the half of 16 bits' last one: sums with (bits + ½) / 2¹⁶ are exact, and one
    # of a whole number stays below the next.
    def change(self, change: Callable[[Tensor], Tensor], bits: Tensor, valid: Tensor | None = None) -> None:
        """Replace the matrix by what ``change`` makes of it, rounded with ``bits``, m × n, int32 in [0, 2¹⁶).

        ``change`` is given the matrix in steps, divided by its scales, in fp32. It returns the new one in the same
        steps, and may overwrite what it was given. Nothing changes where ``valid``, a boolean scalar, is false.
        """
        steps = change(self.codes.float())
        largest = self._largest(steps)
        fits = (largest <= LARGEST) & (largest >= _LEAST)
        fits |= largest == 0
        old = self.scales.float()
        scales = torch.where(fits, old, old * largest / _WANTED).to(torch.bfloat16)
        ratio = torch.where(fits, 1.0, old / scales.float())
        steps.mul_(self._spread(ratio)).add_(bits + 0.5, alpha=2.0**-16).floor_()
        codes = steps.clamp_(-LARGEST, LARGEST).to(torch.int8)
        if valid is not None:
            scales = torch.where(valid, scales, self.scales)
            codes = torch.where(valid, codes, self.codes)
        self.scales.copy_(scales)
        self.codes.copy_(codes)


class CodedParameter(nn.Parameter):
    """Stands for a matrix of codes where autograd and an optimizer want a parameter.

    It has the matrix's shape, a dtype, a gradient and hooks. It has no values: its one number, a zero, is repeated.
    ``coded`` holds the matrix.
    """

    coded: Coded

    @classmethod
    def of(cls, coded: Coded, dtype: torch.dtype) -> Self:
        """Return what stands for ``coded``; its gradients are in ``dtype``."""
        zero = torch.zeros((), dtype=dtype, device=coded.codes.device)
        parameter = cls(zero.expand(coded.codes.shape))
        parameter.coded = coded
        return parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return what stands for a copy of the codes: a copy of the parameter by itself would have values."""
        coded = Coded(self.coded.codes.clone(), self.coded.scales.clone(), self.coded.group)
        copy = type(self).of(coded, self.dtype)
        memo[id(self)] = copy
        return copy


def codes_of(parameter: Tensor) -> Coded | None:
    """Return what a parameter stands for, if it is a `CodedParameter`; in a plan, that is a fake tensor."""
    coded: Coded | None = getattr(parameter, "coded", None)
    return coded


def held_bytes(parameter: Tensor) -> int:
    """Return the bytes that hold a parameter's values on this process."""
    coded = codes_of(parameter)
    if coded is not None:
        return coded.nbytes
    return local(parameter).nbytes
