"""Products of 8-bit integers in training: of the linear layers of attention and MLP, forward and backward.

Weights, gradients and what is kept for the backward pass stay in the run's dtype. Both factors of a product are
quantized when they are multiplied, with scales that are found anew each time: the dynamic quantization of torchao's
"INT8 mixed-precision training", whose scales lie along the rows of the first factor and the columns of the second.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from galore_pretrain.errors import InputError
from galore_pretrain.optim import is_projected
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.place import is_cpu

_LARGEST_CODE = 127  # codes are from −127 to 127, so that the scales are symmetric
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
_LONGEST_SUM = 1 << 17
"""Terms of a sum that 32 bits hold whatever the codes are: 127² · 2¹⁷ is less than 2³¹."""


@dataclass(frozen=True)
class Codes:
    """Holds a matrix of n × k for a product that sums over k: its element (i, j) is ``values[i, j] * scales[i]``.

    ``values`` are int8, with zeros behind the n rows and k columns. ``scales`` are n numbers in fp32.
    """

    values: Tensor
    scales: Tensor


# The scale of a row is a 127th of its largest magnitude, so no code is clipped. A row of zeros has codes of zero and
# the smallest scale. A row with an infinity or a NaN has such a scale: whatever its codes are then, all that is
# computed with them is not finite, as in a dense product, and the update is found to be faulty.
#
# The matrix is read a chunk of rows at a time, which a CPU's cache holds, and no fp32 copy of it exists. Its columns
# are scaled where the sum goes over its rows: their largest magnitudes take another reading.
def quantized(matrix: Tensor, over: int, by: Tensor | None = None) -> Codes:
    """Return the codes of ``matrix`` (bf16 or fp32) for a product that sums over its dimension ``over``.

    With ``over`` 0, they are the codes of its transpose. With ``over`` 1, its columns are multiplied by ``by`` (fp32)
    first, where that is given.
    """
    rows, columns = matrix.shape
    values = matrix.new_zeros(_padded(rows), _padded(columns), dtype=torch.int8)
    if over == 1:
        scales = matrix.new_empty(rows, dtype=torch.float32)
        for start, stop in _chunks_of_rows(matrix):
            block = matrix[start:stop].float()
            if by is not None:
                block = block * by
            scales[start:stop] = _scales_for(block.abs().amax(1))
            inverse = scales[start:stop].reciprocal()
            values[start:stop, :columns] = (block * inverse[:, None]).round_()
        return Codes(values, scales)

    largest = matrix.new_zeros(columns, dtype=torch.float32)
    for start, stop in _chunks_of_rows(matrix):
        torch.maximum(largest, matrix[start:stop].float().abs().amax(0), out=largest)
    scales = _scales_for(largest)
    inverse = scales.reciprocal()
    for start, stop in _chunks_of_rows(matrix):
        values[start:stop, :columns] = (matrix[start:stop].float() * inverse).round_()
    # A GPU's product wants the numbers of a sum side by side in memory; a CPU's takes both layouts, equally fast.
    transposed = values.T
    if not is_cpu(matrix.device):
        transposed = transposed.contiguous()
    return Codes(transposed, scales)


def _scales_for(largest: Tensor) -> Tensor:
    """Return the scales of rows whose largest magnitudes are ``largest``."""
    return (largest / _LARGEST_CODE).clamp_(min=_SMALLEST_SCALE)


def _padded(size: int) -> int:
    """Return a size of at least ``size`` that CUDA's product takes: more than 16, and a multiple of 8."""
    return max(24, -(-size // 8) * 8)


def padded(values: Tensor) -> Tensor:
    """Return a matrix of int8 with zeros behind its rows and columns, where CUDA's product wants some."""
    rows, columns = values.shape
    missing = (0, _padded(columns) - columns, 0, _padded(rows) - rows)
    if not any(missing):
        return values
    return nn.functional.pad(values, missing)


# Compiled code has no use for chunks: its loops over elements are joined to one.
def _chunks_of_rows(matrix: Tensor) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the chunks of rows in which a matrix is worked on."""
    rows, columns = matrix.shape
    if torch.compiler.is_compiling():
        return iter([(0, rows)])
    block_rows = max(1, chunk_elements(matrix.device) // columns)
    return chunks(matrix, rows, block_rows)


# Sums are exact, in 32-bit integers. Each is taken to fp32 and multiplied with the scales of its row and its column,
# one after the other: their product alone could be too small for fp32.
def multiplied(left: Codes, right: Codes, dtype: torch.dtype) -> Tensor:
    """Return ``left`` @ ``right``ᵀ (n × k, m × k → n × m) in ``dtype``."""
    sums = torch._int_mm(left.values, right.values.T)
    n, m = len(left.scales), len(right.scales)
    product = left.scales.new_empty(n, m, dtype=dtype)
    for start, stop in _chunks_of_rows(product):
        block = sums[start:stop, :m].float()
        product[start:stop] = block.mul_(left.scales[start:stop, None]).mul_(right.scales)
    return product


# x is tokens × in, W out × in, and g = dL/dy tokens × out. The three products are
#
#     y = x Wᵀ, a sum over in        dx = g W, a sum over out        dW = gᵀ x, a sum over the tokens
#
# and each factor takes part in two of them, along different dimensions, with different codes. x and W are kept for the
# backward pass in their own dtype, as a dense product keeps them: so nothing more is held than with it, and W may be
# one that FSDP2 frees and gathers again. Compilers look into the function, whose layers would else be compiled in bits.
@torch.compiler.allow_in_graph
class _Int8Product(torch.autograd.Function):
    """Computes x Wᵀ and both its gradients by products of 8-bit integers, rounded to the nearest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return y (tokens × out) of ``x`` (tokens × in) and ``weight`` (out × in), in their dtype."""
        ctx.save_for_backward(x, weight)
        return multiplied(quantized(x, over=1), quantized(weight, over=1), x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients by x and W, where they are asked for."""
        grad = grad_outputs[0]
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = multiplied(quantized(grad, over=1), quantized(weight, over=0), x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = sum_over_tokens(grad, x, weight.dtype)
        return grad_x, grad_weight


def sum_over_tokens(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``grad``ᵀ @ ``x`` (tokens × out, tokens × in → out × in) in ``dtype``."""
    tokens = len(x)
    if tokens <= _LONGEST_SUM:
        return multiplied(quantized(grad, over=0), quantized(x, over=0), dtype)
    total = x.new_zeros(grad.shape[1], x.shape[1], dtype=torch.float32)
    for start, stop in chunks(x, tokens, _LONGEST_SUM):
        codes = quantized(grad[start:stop], over=0), quantized(x[start:stop], over=0)
        total += multiplied(*codes, torch.float32)
    return total.to(dtype)


class Int8Linear(nn.Linear):
    """Computes y = Wx + bias as the layer ``dense`` does, whose parameters it takes: in training, by 8-bit integers.

    In evaluation its product is dense, since what is exported is a dense model.
    """

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__(dense.in_features, dense.out_features, bias=False, device="meta")
        self.weight = dense.weight
        self.bias = dense.bias

    def forward(self, input: Tensor) -> Tensor:
        """Return y (… × out) of ``input`` (… × in)."""
        if not self.training:
            return super().forward(input)
        tokens = input.flatten(0, -2)
        product = _Int8Product.apply(tokens, self.weight)  # type: ignore[no-untyped-call]
        y: Tensor = product.unflatten(0, input.shape[:-1])
        if self.bias is not None:
            y = y + self.bias
        return y


def multiply_by_int8(model: nn.Module) -> None:
    """Put an `Int8Linear` in the place of each linear layer of attention and MLP; ``model`` may be on ``meta``."""
    # A list, since the tree of modules that is walked is changed below.
    matrices = [(name, module) for name, module in model.named_modules() if is_projected(name, module)]
    for name, module in matrices:
        model.set_submodule(name, Int8Linear(module))


# oneDNN has int8 products for CPUs without VNNI too, but they add pairs of terms up in 16 bits, which large codes
# exceed: the result is silently wrong. So a product is tried, rather than a list of processors kept.
def check_int8(device: torch.device) -> None:
    """Raise InputError where ``device`` cannot multiply 8-bit integers exactly."""
    size = 64
    largest = torch.full((size, size), _LARGEST_CODE, dtype=torch.int8, device=device)
    largest[::2] *= -1
    expected = largest.double() @ largest.double().T
    try:
        found = torch._int_mm(largest, largest.T).double()
    except RuntimeError as error:
        raise InputError(f"--matmul int8: {device} has no such products ({error}); use --matmul dense") from error
    if not torch.equal(found, expected):
        raise InputError(
            f"--matmul int8: {device} multiplies 8-bit integers inexactly, as CPUs without VNNI do; use --matmul dense"
        )
