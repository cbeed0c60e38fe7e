"""Changes weights and sums of gradients: in place, a block at a time, each result rounded as `Step` says."""

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from galore_pretrain.optim.rule import Direction
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors import fused
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.products import has_fast_bf16

_PRODUCT = 1 << 21
"""Elements of a low-rank update that are multiplied out at a time: matrix products want more than a cache holds."""


def add_rounded(total: Tensor, part: Tensor, step: Step, stream: str) -> None:
    """Add ``part`` to the bf16 ``total`` in place, in fp32 and rounded stochastically with the bits of ``stream``."""
    flat_total = total.view(-1)
    flat_part = part.reshape(-1)
    for start, stop in chunks(flat_total, flat_total.numel(), chunk_elements(total.device)):
        target = flat_total[start:stop]
        # No name for the fp32 sum, which would keep it until the next chunk has its own.
        step.at(start).store(target, target.float().add_(flat_part[start:stop]), stream)


class WeightStore(Protocol):
    """Holds weights in a form of its own. But for kernels of one pass, updates write weights through it alone."""

    is_dense: ClassVar[bool]
    """Whether a weight is the tensor itself, so that a kernel may update it in place."""

    def subtract(self, weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
        """Change ``weight`` to ``weight - lr · direction - decay · weight``; here ``decay`` has lr in it already.

        Decay is taken from the weight before the update if ``decay_first``, else after it.
        """
        ...


# Three ways lead to W ← W - lr · D - decay · W, W being m × n:
#
# - In place, in W's own dtype, where fp32 would gain nothing: W is fp32, or the result is rounded to nearest anyway.
#   A direction L R of rank r is added as it is multiplied out (addmm), so D never exists.
# - In blocks of rows, for a bf16 W that is rounded stochastically, scaled rows or columns, and results that may be
#   dropped (``step.valid``). A block is copied, in fp32 where that gains something, takes update and decay, and is
#   stored, rounded, by `Step.store`.
# - In blocks of rows, for a sum of several terms: a block takes all of them before it is rounded once.
#
# Random bits belong to elements and are counted from the start of W: results do not depend on the size of blocks.
@dataclass(frozen=True)
class DenseWeights:
    """Holds weights as they are: fp32 or bf16 tensors."""

    is_dense: ClassVar[bool] = True

    def subtract(self, weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
        """Update ``weight`` in place; a bf16 one is rounded as ``step`` says."""
        if not weight.numel():  # this process has no part of it, and rows of no length cannot be counted
            return
        if step.kernels:
            update = update_for_kernel(direction, step)
            if update is not None:
                _subtract_by_kernel(weight, update, decay, decay_first, step)
                return
        if direction.rest is not None:
            _subtract_sum(weight, direction, decay, decay_first, step)
            return
        has_scales = direction.row is not None or direction.column is not None
        may_be_dropped = step.valid is not None
        if has_scales or may_be_dropped or not _is_plain(weight, direction, step):
            _subtract_in_blocks(weight, direction, decay, decay_first, step)
            return
        alpha = -direction.factor
        if not direction.scaled:
            alpha *= step.lr
        if decay and decay_first:
            weight.add_(weight, alpha=-decay)
        if direction.right is None:
            weight.add_(direction.left, alpha=alpha)
        else:
            weight.addmm_(direction.left, direction.right, alpha=alpha)
        if decay and not decay_first:
            weight.add_(weight, alpha=-decay)


# The kernel knows a low-rank product without scales, a dense term with them, and the sum of both: GaLore's direction,
# APOLLO's and Fira's.
def update_for_kernel(direction: Direction, step: Step) -> fused.Update | None:
    """Return a direction as the kernel takes it; None where it has other terms than that."""
    rate = 1.0 if direction.scaled else step.lr
    update = fused.Update()
    for term in direction.terms():
        has_scales = term.row is not None or term.column is not None
        if term.right is None and update.dense is None:
            dense = term.left.contiguous()
            row, column = _contiguous(term.row), _contiguous(term.column)
            update = replace(update, dense=dense, row=row, column=column, dense_rate=rate * term.factor)
        elif term.right is not None and update.left is None and not has_scales and _alike(term):
            update = replace(update, left=term.left, right=term.right, product_rate=rate * term.factor)
        else:
            return None
    return update


def _contiguous(scales: Tensor | None) -> Tensor | None:
    """Return scales as neighbours in memory, as the kernel reads them: a rule may give a column, or one number."""
    return None if scales is None else scales.contiguous()


def _alike(term: Direction) -> bool:
    """Return whether the factors of a low-rank term have one dtype, as a product of the kernel's wants them."""
    return term.right is not None and term.left.dtype == term.right.dtype


def _subtract_by_kernel(weight: Tensor, update: fused.Update, decay: float, decay_first: bool, step: Step) -> None:
    """Subtract an update in one pass over a contiguous weight; a vector is taken as a row."""
    if weight.ndim != 2:
        dense = update.dense
        assert dense is not None
        rows = len(weight) if weight.ndim > 2 else 1
        weight = weight.view(rows, -1)
        update = replace(update, dense=dense.view(rows, -1))
    fused.subtract_(weight, update, decay, decay_first, step.noise("weight"), step.valid)


def _is_plain(weight: Tensor, direction: Direction, step: Step) -> bool:
    """Return whether the weight's own dtype is as good as fp32: it is fp32, or results are rounded to nearest."""
    if weight.dtype == torch.float32:
        return True
    return step.bits is None and direction.left.dtype == weight.dtype


# Blocks are nested. An outer one has as many rows as a matrix product wants, an inner one as many as a cache holds. A
# term whose dtype is less than fp32 is multiplied out in that dtype for an outer block, and the product is added in
# fp32 to each inner one. Otherwise product and sum are one operation, and an inner block is the whole outer one.
#
# A CPU without fast bf16 products multiplies in fp32 from the start, which then needs no product in between.
def _subtract_in_blocks(weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
    """Subtract a direction of one term, a block of rows at a time, so that temporaries stay small."""
    alpha = -direction.factor
    if not direction.scaled:
        alpha *= step.lr
    is_low_rank = direction.right is not None
    is_rounded = weight.dtype == torch.bfloat16 and step.bits is not None
    if is_low_rank and is_rounded and not has_fast_bf16(weight.device):
        direction = in_fp32(direction)
    has_scales = direction.row is not None or direction.column is not None
    term_dtype = torch.float32 if has_scales else direction.left.dtype
    is_plain = weight.dtype == torch.float32 or (step.bits is None and term_dtype == weight.dtype)
    block_dtype = weight.dtype if is_plain else torch.float32
    adds_products = is_plain or term_dtype == torch.float32
    row_elements = weight.shape[1:].numel()
    inner_rows = max(1, chunk_elements(weight.device) // row_elements)
    outer_rows = inner_rows
    if is_low_rank:
        outer_rows = max(inner_rows, _PRODUCT // row_elements // inner_rows * inner_rows)
    if adds_products:
        inner_rows = outer_rows
    for begin, end in chunks(weight, weight.shape[0], outer_rows):
        part = direction.part(begin, end)
        if not adds_products:
            part = Direction(part.whole())
        for start, stop in chunks(weight, len(part.left), inner_rows):
            target = weight[begin + start : begin + stop]
            block = target.to(block_dtype, copy=True)
            if decay and decay_first:
                block.add_(block, alpha=-decay)
            part.part(start, stop).add_to(block, alpha)
            if decay and not decay_first:
                block.add_(block, alpha=-decay)
            step.at((begin + start) * row_elements).store(target, block, stream="weight")


# Each block of rows is read once, takes all terms and decay in fp32, and is rounded once.
def _subtract_sum(weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
    """Subtract a direction of several terms from ``weight`` in place."""
    rate = 1.0 if direction.scaled else step.lr
    terms = [in_fp32(term) for term in direction.terms()]
    row_elements = weight.shape[1:].numel()
    rows = max(1, chunk_elements(weight.device) // row_elements)
    for start, stop in chunks(weight, weight.shape[0], rows):
        target = weight[start:stop]
        block = target.to(torch.float32, copy=True)
        if decay and decay_first:
            block.mul_(1 - decay)
        for term in terms:
            term.part(start, stop).add_to(block, -term.factor * rate)
        if decay and not decay_first:
            block.mul_(1 - decay)
        step.at(start * row_elements).store(target, block, stream="weight")


def in_fp32(term: Direction) -> Direction:
    """Return a term whose factors of a low-rank product are fp32."""
    if term.right is None:
        return term
    left = term.left.float()
    right = term.right.float()
    return replace(term, left=left, right=right)
