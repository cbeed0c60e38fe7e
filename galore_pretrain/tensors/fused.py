"""Operations of an update that are one kernel each, so that a plan and a count of launches see each as one operation.

They run where Triton does: on a GPU, and on a CPU under ``TRITON_INTERPRET=1``, for tests. On fake tensors they change
and return what they would, without values. All tensors are contiguous, but for the factors of a product.
"""

import logging
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from galore_pretrain.tensors.place import is_gpu

BLOCK = 256
"""Elements of an 8-bit moment that share a scale."""

# How much a program takes. So small that hardly a register is spilled for compute capability 9.0, by ptxas.
_BLOCKS = 2  # of moments
_ELEMENTS = 512  # of a copy
_TILE_ROWS, _TILE_COLUMNS, _TILE_RANK, _TILE_WARPS = 64, 128, 32, 8  # of a product
_SUMMED = 2048  # elements that are added

log = logging.getLogger(__name__)


def runs_on(device: torch.device) -> bool:
    """Return whether the kernels run on tensors of ``device``: a GPU, or a CPU under ``TRITON_INTERPRET=1``."""
    if is_gpu(device):
        return _run_on_cuda()
    return device.type == "cpu" and _run_on_cpu()


@cache
def _run_on_cpu() -> bool:
    """Return whether Triton's interpreter stands for a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None


# To launch a kernel, Triton compiles it, and with a C compiler what calls it. A machine may have no such compiler, or a
# GPU that is too old; and no GPU of a user's has been seen by those who wrote this. So a small update is tried once.
@cache
def _run_on_cuda() -> bool:
    """Return whether the kernels run on this machine's GPUs; where it has none, and only plans for one, say yes."""
    if not torch.cuda.is_available():
        return True
    reason = "a small update came out wrong"
    try:
        with _disable_current_modes():  # a plan asks first, in which tensors are fake
            is_right = small_updates_are_right(torch.device("cuda"))
    except Exception as error:  # whatever Triton, its compilers or the driver raise
        is_right = False
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    if not is_right:
        log.warning("Triton's kernels do not run here (%s): updates take single operations, and more time", reason)
    return is_right


def small_updates_are_right(device: torch.device) -> bool:
    """Make a small update by the kernels, and return whether it comes out as by torch's own operations."""
    left = torch.linspace(-1, 1, 4 * 40, device=device).view(4, 40).bfloat16()
    right = torch.linspace(1, -2, 40 * 130, device=device).view(40, 130).bfloat16()
    weight = torch.ones(4, 130, device=device)
    subtract_(weight, Update(left, right, product_rate=0.5), decay=0.1, decay_first=True)
    expected = 0.9 - 0.5 * (left.float() @ right.float())
    product_is_right = torch.allclose(weight, expected, rtol=1e-4, atol=1e-4)

    # From 1 to 1 + 2⁻⁹ is a quarter of the way to the next bf16 number, 1 + 2⁻⁷.
    rounded = torch.ones(4096, device=device).bfloat16()
    addend = torch.full((4096,), 2.0**-9, device=device).bfloat16()
    add_all_([rounded], [addend], [7])
    shares = [_share_rounded_up(rounded)]
    store_(rounded, torch.full((4096,), 1 + 2.0**-9, device=device), Noise(8), torch.tensor(True, device=device))
    shares.append(_share_rounded_up(rounded))
    store_(rounded, torch.zeros(4096, device=device), Noise(9), torch.tensor(False, device=device))
    shares.append(_share_rounded_up(rounded))
    rounding_is_right = all(0.2 < share < 0.3 for share in shares)
    return product_is_right and rounding_is_right and _first_updates_are_right(device)


def _share_rounded_up(numbers: Tensor) -> float:
    """Return the share of bf16 numbers that are 1 + 2⁻⁷, where all others are 1."""
    return float(numbers.float().mean() - 1) * 2**7


def _first_updates_are_right(device: torch.device) -> bool:
    """Make a first update of Adam with dense moments and with 8 bits, whose code is here 256 even steps."""
    grad = torch.linspace(-1, 1, 600, device=device)
    numbers = AdamNumbers(0.9, 0.99, factor=10.0, root=10.0, eps=1e-8, lr=0.5)
    expected = 1 - 0.5 * grad / (grad.abs() + 1e-8)
    zeros = torch.zeros(600, device=device)
    signed = torch.linspace(-1, 1, 256, device=device)
    unsigned = torch.linspace(0, 1, 256, device=device)
    middle = torch.full((600,), 128, dtype=torch.uint8, device=device)
    scales = torch.zeros(3, device=device)
    dense = (Moment(zeros), Moment(zeros.clone()))
    eight_bit = (Moment(middle, scales, signed), Moment(torch.zeros_like(middle), scales.clone(), unsigned))
    answers = []
    for m, v in (dense, eight_bit):
        weight = torch.ones(600, device=device)
        adam_(weight, grad, m, v, numbers, TO_NEAREST)
        answers.append(torch.allclose(weight, expected, rtol=1e-4, atol=1e-4))
    kept = signed[middle.long()] * scales.repeat_interleave(BLOCK)[:600]
    answers.append(torch.allclose(zeros, 0.1 * grad, rtol=1e-4))
    answers.append(torch.allclose(kept, 0.1 * grad, atol=0.1 / 255))
    return all(answers)


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


def knows(target: Tensor, value: Tensor) -> bool:
    """Return whether `store_` and `add_all_` do of such tensors what copying or adding in place would."""
    dtypes = (torch.float32, torch.bfloat16)
    if target.dtype not in dtypes or value.dtype not in dtypes:
        return False
    return runs_on(target.device) and target.is_contiguous() and value.is_contiguous()


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


def add_all_(sums: Sequence[Tensor], parts: Sequence[Tensor], seeds: Sequence[int]) -> None:
    """Add each of ``parts`` to its sum in place, by one launch; bf16 sums are rounded with the bits of their seeds.

    All sums have one dtype, and all parts. A seed of -1 rounds to nearest; all have one or none has.
    """
    _ops().add_all_(list(sums), list(parts), list(seeds))


@cache
def _ops() -> Any:
    """Return the operations. They are registered when the first is needed, since that takes a tenth of a second."""
    define = torch.library.custom_op

    @define("galore_pretrain::adam_", mutates_args=("weight", "m", "v"))
    def adam(
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
        _launch_adam(weight, grad, m, v, (m_code, v_code), None, valid, numbers, l2, seed, start)

    @define("galore_pretrain::adam_direction", mutates_args=("m", "v"))
    def direction_of_adam(
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
        direction = torch.empty_like(grad)
        _launch_adam(None, grad, m, v, (m_code, v_code), direction, valid, numbers, False, seed, start)
        return direction

    @define("galore_pretrain::store_", mutates_args=("target",))
    def store(target: Tensor, value: Tensor, valid: Tensor | None, seed: int, start: int) -> None:
        _launch_store(target, value, valid, seed, start)

    @define("galore_pretrain::subtract_", mutates_args=("weight",))
    def subtract(
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
        _launch_subtract(weight, left, right, dense, row, column, valid, rates, decay_first, seed, start)

    @define("galore_pretrain::add_all_", mutates_args=("sums",))
    def add_all(sums: Sequence[Tensor], parts: Sequence[Tensor], seeds: Sequence[int]) -> None:
        _launch_add_all(sums, parts, seeds)

    for operation in (adam, store, subtract, add_all):
        operation.register_fake(_nothing)
    direction_of_adam.register_fake(_like_gradient)
    return torch.ops.galore_pretrain


def _nothing(*arguments: Any) -> None:
    """Stand for a kernel on fake tensors, whose values do not change."""


def _like_gradient(grad: Tensor, *arguments: Any) -> Tensor:
    """Return what a kernel returns for a fake gradient."""
    return torch.empty_like(grad)


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
    with _on(grad.device):
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
    with _on(target.device):
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


def _launch_subtract(
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
    """Launch the kernel that changes a weight."""
    from galore_pretrain.tensors import kernels

    rows, columns = weight.shape
    if not weight.numel():
        return
    rank = 0
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if left is not None and right is not None:
        rank = left.shape[1]
        strides = (*left.stride(), *right.stride())
    # A grid may be 2³¹ programs long in its first dimension, and 65,535 in the second.
    grid = (-(-columns // _TILE_COLUMNS), -(-rows // _TILE_ROWS))
    with _on(weight.device):
        kernels.subtract[grid](
            weight,
            left,
            right,
            dense,
            row,
            column,
            _as_byte(valid),
            rows,
            columns,
            rank,
            *strides,
            start,
            max(seed, 0),
            *rates,
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

    pairs = [(total, part, seed) for total, part, seed in zip(sums, parts, seeds, strict=True) if total.numel()]
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
    table = torch.tensor(words, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    with _on(device):
        kernels.add_all[(first,)](
            table,
            SUM=_element(pairs[0][0].dtype),
            PART=_element(pairs[0][1].dtype),
            STOCHASTIC=pairs[0][2] >= 0,
            HALVINGS=halvings,
            SIZE=_SUMMED,
        )


# Triton launches on the current device, whatever device its tensors are on.
def _on(device: torch.device) -> AbstractContextManager[None]:
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
