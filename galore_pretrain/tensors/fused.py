"""Operations of an update that are one kernel each, so that a plan and a count of launches see each as one operation.

They run where `capability.runs_on` says that Triton does. On fake tensors they change and return what they would,
without values. All tensors are contiguous, but for the factors of a product.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.tensors.operations import operation

BLOCK = 256
"""Elements of an 8-bit moment that share a scale."""

# How much a program takes. So small that hardly a register is spilled for compute capability 9.0, by ptxas.
_BLOCKS = 2  # of moments
_ELEMENTS = 512  # of a copy
_TILE_ROWS, _TILE_COLUMNS, _TILE_RANK, _TILE_WARPS = 64, 128, 32, 8  # of a product
CODED_TILE = _TILE_COLUMNS
"""Columns of a tile of codes, which a group of them is a multiple of."""
_READ = 1024  # codes that are read
_SUMMED = 2048  # elements that are added


@dataclass(frozen=True)
class AdamNumbers:
    """Holds the numbers of an Adam update: direction = ``factor`` · m / (√v · ``root`` + ``eps``).

    A weight takes ``lr`` · (direction + ``decay`` · weight), or with ``l2`` has its decay added to the gradient.
    """

    beta1: float
    beta2: float
    factor: float
    root: float
    eps: float
    lr: float = 1.0
    decay: float = 0.0
    l2: bool = False

    def arguments(self) -> list[float]:
        """Return the numbers as the kernel takes them, but for ``l2``; 1 − β is computed here, in fp64."""
        betas = (self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2)
        return [*betas, self.factor, self.root, self.eps, self.lr, self.decay]


@dataclass(frozen=True)
class Noise:
    """Says which random bits a bf16 result is rounded with: of ``seed``, by the element's place from ``start`` on.

    A ``seed`` of -1 rounds to nearest.
    """

    seed: int = -1
    start: int = 0


TO_NEAREST = Noise()


@dataclass(frozen=True)
class Moment:
    """Holds a moment: its values, or in 8 bits a byte an element.

    Then each block of 256 has one of the ``scales``, fp32, and ``code`` has the 256 ascending values of a byte.
    """

    values: Tensor
    scales: Tensor | None = None
    code: Tensor | None = None

    def written(self) -> list[Tensor]:
        """Return the tensors that an update writes."""
        return [self.values] if self.scales is None else [self.values, self.scales]


def adam_(
    weight: Tensor,
    grad: Tensor,
    m: Moment,
    v: Moment,
    numbers: AdamNumbers,
    noise: Noise,
    valid: Tensor | None = None,
) -> None:
    """Update ``weight`` and both moments in place, all flat tensors of one length. Both are dense, or both of 8 bits.

    Nothing changes where ``valid``, a boolean scalar on their device, is false.
    """
    _ops().adam_(
        weight,
        grad,
        m.written(),
        v.written(),
        m.code,
        v.code,
        valid,
        numbers.arguments(),
        numbers.l2,
        noise.seed,
        noise.start,
    )


def adam_direction(
    grad: Tensor, m: Moment, v: Moment, numbers: AdamNumbers, noise: Noise, valid: Tensor | None = None
) -> Tensor:
    """Advance both moments in place and return Adam's direction in the shape and dtype of ``grad``.

    It has no meaning where ``valid`` is false.
    """
    moments = (m.written(), v.written(), m.code, v.code)
    direction: Tensor = _ops().adam_direction(grad, *moments, valid, numbers.arguments(), noise.seed, noise.start)
    return direction


def store_(target: Tensor, value: Tensor, noise: Noise, valid: Tensor | None) -> None:
    """Copy ``value`` to ``target`` of the same shape, rounded to its dtype; not where ``valid`` is false."""
    _ops().store_(target, value, valid, noise.seed, noise.start)


@dataclass(frozen=True)
class Update:
    """Says what `subtract_` takes from a weight (m × n): ``product_rate`` · left @ right, ``dense_rate`` · dense.

    ``left`` (m × r) and ``right`` (r × n) may be absent together, and so may ``dense`` (m × n); its rows are multiplied
    by ``row`` (m, fp32) and its columns by ``column`` (n, fp32), where they are given.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    product_rate: float = 0.0
    dense: Tensor | None = None
    row: Tensor | None = None
    column: Tensor | None = None
    dense_rate: float = 0.0


def subtract_(
    weight: Tensor,
    update: Update,
    decay: float,
    decay_first: bool,
    noise: Noise = TO_NEAREST,
    valid: Tensor | None = None,
) -> None:
    """Subtract an update from ``weight`` (m × n) in place, and ``decay`` · weight before or after it."""
    rates = [update.product_rate, update.dense_rate, 1 - decay]
    parts = (update.left, update.right, update.dense, update.row, update.column)
    _ops().subtract_(weight, *parts, valid, rates, decay_first, noise.seed, noise.start)


def subtract_codes_(
    codes: Tensor,
    scales: Tensor,
    group: int,
    update: Update,
    decay: float,
    decay_first: bool,
    noise: Noise,
    valid: Tensor | None = None,
) -> None:
    """Subtract an update from a matrix of ``codes`` (m × n, int8) in place, as `tensors.coded.Coded.change` does.

    ``scales`` (bf16) are m × groups, each of ``group`` neighbours in a row: all of it, or a multiple of `CODED_TILE`.
    """
    rates = [update.product_rate, update.dense_rate, 1 - decay]
    parts = (update.left, update.right, update.dense, update.row, update.column)
    _ops().subtract_codes_(codes, scales, group, *parts, valid, rates, decay_first, noise.seed, noise.start)


def read_codes(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix (m × n) of such codes and scales in ``dtype``, rounded to nearest. A group has any size."""
    matrix: Tensor = _ops().read_codes(codes, scales, group, dtype)
    return matrix


def add_all_(sums: Sequence[Tensor], parts: Sequence[Tensor], seeds: Sequence[int]) -> None:
    """Add each of ``parts`` to its sum in place, by one launch; bf16 sums are rounded with the bits of their seeds.

    All sums have one dtype, and all parts. A seed of -1 rounds to nearest; all have one or none has.
    """
    _ops().add_all_(list(sums), list(parts), list(seeds))


class _Operations:
    """Has the operations. They are registered when the first is needed, since that takes time."""

    def __init__(self) -> None:
        self.adam_ = operation("adam_", _adam, _nothing, ("weight", "m", "v"))
        self.adam_direction = operation("adam_direction", _direction_of_adam, _like_gradient, ("m", "v"))
        self.store_ = operation("store_", _launch_store, _nothing, ("target",))
        self.subtract_ = operation("subtract_", _subtract, _nothing, ("weight",))
        self.subtract_codes_ = operation("subtract_codes_", _subtract_codes, _nothing, ("codes", "scales"))
        self.read_codes = operation("read_codes", _read, _matrix)
        self.add_all_ = operation("add_all_", _launch_add_all, _nothing, ("sums",))


@cache
def _ops() -> _Operations:
    """Return the operations, the same at each call."""
    return _Operations()


def _adam(
    weight: Tensor,
    grad: Tensor,
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    m_code: Tensor | None,
    v_code: Tensor | None,
    valid: Tensor | None,
    numbers: Sequence[float],
    l2: bool,
    seed: int,
    start: int,
) -> None:
    """Update a weight and both moments, as `adam_` says."""
    _launch_adam(weight, grad, m, v, (m_code, v_code), None, valid, numbers, l2, seed, start)


def _direction_of_adam(
    grad: Tensor,
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    m_code: Tensor | None,
    v_code: Tensor | None,
    valid: Tensor | None,
    numbers: Sequence[float],
    seed: int,
    start: int,
) -> Tensor:
    """Advance both moments and return the direction, as `adam_direction` says."""
    direction = torch.empty_like(grad)
    _launch_adam(None, grad, m, v, (m_code, v_code), direction, valid, numbers, False, seed, start)
    return direction


def _subtract(
    weight: Tensor,
    left: Tensor | None,
    right: Tensor | None,
    dense: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    valid: Tensor | None,
    rates: Sequence[float],
    decay_first: bool,
    seed: int,
    start: int,
) -> None:
    """Change a weight, as `subtract_` says."""
    _launch_subtract(weight, (left, right, dense, row, column), valid, rates, decay_first, seed, start)


def _subtract_codes(
    codes: Tensor,
    scales: Tensor,
    group: int,
    left: Tensor | None,
    right: Tensor | None,
    dense: Tensor | None,
    row: Tensor | None,
    column: Tensor | None,
    valid: Tensor | None,
    rates: Sequence[float],
    decay_first: bool,
    seed: int,
    start: int,
) -> None:
    """Change codes and scales, as `subtract_codes_` says."""
    parts = (left, right, dense, row, column)
    _launch_subtract_codes(codes, scales, group, parts, valid, rates, decay_first, seed, start)


def _read(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return the matrix of codes and scales, as `read_codes` says."""
    matrix = _matrix(codes, scales, group, dtype)
    _launch_read(matrix, codes, scales, group)
    return matrix


def _nothing(*arguments: Any) -> None:
    """Stand for a kernel on fake tensors, whose values do not change."""


def _like_gradient(grad: Tensor, *arguments: Any) -> Tensor:
    """Return what a kernel returns for a fake gradient."""
    return torch.empty_like(grad)


def _matrix(codes: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """Return a place for a matrix of codes."""
    del scales, group
    return torch.empty(codes.shape, dtype=dtype, device=codes.device)


def _launch_read(matrix: Tensor, codes: Tensor, scales: Tensor, group: int) -> None:
    """Launch the kernel that reads codes."""
    from galore_pretrain.tensors import kernels

    n = matrix.numel()
    if not n:
        return
    columns, groups = codes.shape[1], scales.shape[1]
    with on_device(matrix.device):
        kernels.read_codes[(-(-n // _READ),)](matrix, codes, scales, n, columns, group, groups, SIZE=_READ)


def _launch_adam(
    weight: Tensor | None,
    grad: Tensor,
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    codes: tuple[Tensor | None, Tensor | None],
    direction: Tensor | None,
    valid: Tensor | None,
    numbers: Sequence[float],
    l2: bool,
    seed: int,
    start: int,
) -> None:
    """Launch the kernel of Adam."""
    from galore_pretrain.tensors import kernels

    n = grad.numel()
    if not n:
        return
    is_eight_bit = len(m) > 1
    m_values, m_scales = m if is_eight_bit else (m[0], None)
    v_values, v_scales = v if is_eight_bit else (v[0], None)
    m_code, v_code = codes
    with on_device(grad.device):
        kernels.adam[(-(-n // (BLOCK * _BLOCKS)),)](
            weight,
            grad,
            m_values,
            m_scales,
            m_code,
            v_values,
            v_scales,
            v_code,
            direction,
            _as_byte(valid),
            n,
            start,
            max(seed, 0),
            *numbers,
            HAS_WEIGHT=weight is not None,
            HAS_VALID=valid is not None,
            EIGHT_BIT=is_eight_bit,
            STOCHASTIC=seed >= 0,
            L2=l2,
            BLOCKS=_BLOCKS,
        )


def _launch_store(target: Tensor, value: Tensor, valid: Tensor | None, seed: int, start: int) -> None:
    """Launch the kernel that copies and rounds."""
    from galore_pretrain.tensors import kernels

    n = target.numel()
    if not n:
        return
    with on_device(target.device):
        kernels.store[(-(-n // _ELEMENTS),)](
            target,
            value,
            _as_byte(valid),
            n,
            start,
            max(seed, 0),
            HAS_VALID=valid is not None,
            STOCHASTIC=seed >= 0,
            SIZE=_ELEMENTS,
        )


_Parts = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # of an `Update`


def _launch_subtract(
    weight: Tensor,
    parts: _Parts,
    valid: Tensor | None,
    rates: Sequence[float],
    decay_first: bool,
    seed: int,
    start: int,
) -> None:
    """Launch the kernel that changes a weight."""
    if weight.numel():
        _launch_of_update(weight, parts, valid, rates, decay_first, seed, start)


# Both passes are one operation to a plan. New scales are written aside, since the old ones are read by all programs of
# a row; where the update is not valid, none are written, and the copy holds the old ones.
def _launch_subtract_codes(
    codes: Tensor,
    scales: Tensor,
    group: int,
    parts: _Parts,
    valid: Tensor | None,
    rates: Sequence[float],
    decay_first: bool,
    seed: int,
    start: int,
) -> None:
    """Launch both passes of the kernel that changes codes."""
    if not codes.numel():
        return
    largest = torch.zeros(scales.shape, dtype=torch.int32, device=scales.device)
    new_scales = scales.clone()
    of_codes = (scales, new_scales, largest, group)
    for writes in (False, True):
        _launch_of_update(codes, parts, valid, rates, decay_first, seed, start, of_codes, writes=writes)
    scales.copy_(new_scales)


def _launch_of_update(
    weight: Tensor,
    parts: _Parts,
    valid: Tensor | None,
    rates: Sequence[float],
    decay_first: bool,
    seed: int,
    start: int,
    of_codes: tuple[Tensor | None, Tensor | None, Tensor | None, int] = (None, None, None, 1),
    *,
    writes: bool = True,
) -> None:
    """Launch a pass of `kernels.subtract` over a weight.

    Of codes, ``of_codes`` are the scales, the new ones, the largest steps, and how many neighbours a group has.
    """
    from galore_pretrain.tensors import kernels

    rows, columns = weight.shape
    left, right, dense, row, column = parts
    rank = 0
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if left is not None and right is not None:
        rank = left.shape[1]
        strides = (*left.stride(), *right.stride())
    scales, new_scales, largest, group = of_codes
    groups = 1 if scales is None else scales.shape[1]
    # In one dimension, since a grid may be 2³¹ programs long in its first, and 65,535 in its second.
    grid = (-(-columns // _TILE_COLUMNS) * -(-rows // _TILE_ROWS),)
    with on_device(weight.device):
        kernels.subtract[grid](
            weight,
            scales,
            new_scales,
            largest,
            left,
            right,
            dense,
            row,
            column,
            _as_byte(valid),
            rows,
            columns,
            group,
            groups,
            rank,
            *strides,
            start,
            max(seed, 0),
            *rates,
            CODED=scales is not None,
            WRITES=writes,
            HAS_PRODUCT=left is not None,
            HAS_DENSE=dense is not None,
            HAS_ROW=row is not None,
            HAS_COLUMN=column is not None,
            HAS_VALID=valid is not None,
            STOCHASTIC=seed >= 0,
            DECAY_FIRST=decay_first,
            IN_FP32=weight.device.type == "cpu",  # Triton's interpreter has no bf16 products
            TILE_ROWS=_TILE_ROWS,
            TILE_COLUMNS=_TILE_COLUMNS,
            TILE_RANK=_TILE_RANK,
            num_warps=_TILE_WARPS,
        )


# Where each tensor lies changes with every micro-batch, so the addresses go to the device by each call: some kilobytes,
# from page-locked memory where that is not the CPU's own, so that nobody waits.
def _launch_add_all(sums: Sequence[Tensor], parts: Sequence[Tensor], seeds: Sequence[int]) -> None:
    """Launch the kernel that adds parts to sums."""
    from galore_pretrain.tensors import kernels

    pairs: list[tuple[Tensor, Tensor, int]] = []
    for pair in zip(sums, parts, seeds, strict=True):
        if pair[0].numel():
            pairs.append(pair)
    if not pairs:
        return
    device = pairs[0][0].device
    halvings = (len(pairs) - 1).bit_length()
    words: list[int] = []
    first = 0
    for total, part, seed in pairs:
        if total.numel() != part.numel():
            raise ValueError(f"a part of shape {tuple(part.shape)} cannot be added to a sum of {tuple(total.shape)}")
        words += [total.data_ptr(), part.data_ptr(), first, total.numel(), max(seed, 0)]
        first += -(-total.numel() // _SUMMED)
    for _ in range(len(pairs), 1 << halvings):  # no program comes to these
        words += [0, 0, first, 0, 0]
    table = torch.tensor(words, device="cpu", pin_memory=device.type == "cuda").to(device, non_blocking=True)
    with on_device(device):
        kernels.add_all[(first,)](
            table,
            SUM=_element(pairs[0][0].dtype),
            PART=_element(pairs[0][1].dtype),
            STOCHASTIC=pairs[0][2] >= 0,
            HALVINGS=halvings,
            SIZE=_SUMMED,
        )


# Triton launches on the current device, whatever device its tensors are on.
def on_device(device: torch.device) -> AbstractContextManager[None]:
    """Make ``device`` the current one in a context; of a CPU there is one."""
    if device.type == "cuda":
        guard: AbstractContextManager[None] = torch.cuda.device(device)
        return guard
    return nullcontext()


def _as_byte(valid: Tensor | None) -> Tensor | None:
    """Return a boolean as the byte that it is: Triton's interpreter makes no mask of booleans that were loaded."""
    return None if valid is None else valid.view(torch.uint8)


def _element(dtype: torch.dtype) -> Any:
    """Return Triton's name of a dtype."""
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}[dtype]
