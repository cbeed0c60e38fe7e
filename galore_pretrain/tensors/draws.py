"""Random numbers that a kernel computes from their places: dropout's masks and random projections, one launch each."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.tensors.fused import on_device
from galore_pretrain.tensors.operations import operation

# The constants of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014), as int64.
INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))

_NEIGHBOURS = 512  # elements of a mask that share one of the four numbers of a program's counters
_ENTRIES = 1024  # of a matrix that a program fills


def dropout_mask(like: Tensor, start: int, seed: int, limit: int) -> Tensor:
    """Return a boolean mask shaped as ``like``, true for an element whose 16 random bits are less than ``limit``.

    They depend on ``seed`` and on the element's place alone, which is ``start`` for the first.
    """
    mask: Tensor = _mask_operation()(like, start, seed, limit)
    return mask.view(torch.bool)


def gaussian_(matrix: Tensor, table: Tensor, start: int, key: int) -> None:
    """Fill a contiguous ``matrix``, whose first row has the number ``start``, with values of ``table``.

    ``table`` has 2¹⁶ values in the matrix's dtype. What is chosen from it are the bits of `optim.sketch.gaussian`.
    """
    _gaussian_operation()(matrix, table, start, key)


@cache
def _mask_operation() -> Callable[..., Any]:
    """Return the operation that draws a mask, registered when it is first needed."""
    return operation("dropout_mask", _mask_of, _mask_for)


@cache
def _gaussian_operation() -> Callable[..., Any]:
    """Return the operation that fills a matrix, registered when it is first needed."""
    return operation("gaussian_", _launch_gaussian, _nothing, ("matrix",))


def _mask_of(like: Tensor, start: int, seed: int, limit: int) -> Tensor:
    """Return a mask, as `dropout_mask` says, a byte an element."""
    mask = _mask_for(like, start, seed, limit)
    _launch_mask(mask, start, seed, limit)
    return mask


def _mask_for(like: Tensor, start: int, seed: int, limit: int) -> Tensor:
    """Return a place for a mask, a byte an element."""
    del start, seed, limit
    return torch.empty(like.shape, dtype=torch.uint8, device=like.device)


def _nothing(matrix: Tensor, table: Tensor, start: int, key: int) -> None:
    """Stand for the kernel on fake tensors, whose values do not change."""


def _launch_mask(mask: Tensor, start: int, seed: int, limit: int) -> None:
    """Launch the kernel of a mask."""
    from galore_pretrain.tensors import kernels

    n = mask.numel()
    if not n:
        return
    elements = 4 * _NEIGHBOURS
    programs = (start + n - 1) // elements - start // elements + 1
    with on_device(mask.device):
        kernels.dropout_mask[(programs,)](mask, n, start, seed, limit, SIZE=_NEIGHBOURS)


def _launch_gaussian(matrix: Tensor, table: Tensor, start: int, key: int) -> None:
    """Launch the kernel of a random matrix."""
    from galore_pretrain.tensors import kernels

    n, columns = matrix.numel(), matrix.shape[1]
    if not n:
        return
    programs = -(-n // _ENTRIES)
    with on_device(matrix.device):
        kernels.gaussian[(programs,)](matrix, table, n, columns, start, key, SIZE=_ENTRIES)
