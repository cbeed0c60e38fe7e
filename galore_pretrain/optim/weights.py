"""How weights and sums of gradients change: in place, a block at a time, each result rounded as `Step` says."""

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from galore_pretrain.optim.rule import Direction
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.products import has_fast_bf16

_PRODUCT = 1 << 21
"""Elements of a low-rank update that are multiplied out at a time: matrix products want more than a cache holds."""


def add_rounded(total: Tensor, part: Tensor, step: Step, stream: str) -> None:
    """Add ``part`` to the bf16 ``total`` in place, in fp32 and rounded stochastically with the bits of ``stream``."""
    kept, added = total.view(-1), part.reshape(-1)
    for start, stop in chunks(kept, kept.numel(), chunk_elements(total.device)):
        piece = kept[start:stop]
        step.at(start).store(piece, piece.float().add_(added[start:stop]), stream)


class WeightStore(Protocol):
    """Holds weights in a form of its own. Updates read and write weights through it alone."""

    is_dense: ClassVar[bool]
    """Whether a weight is the tensor itself, so that a kernel may update it in place."""

    def subtract(self, weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
        """Make it ``weight - lr · direction - decay · weight``; decay sees the weight before or after the update."""
        ...


# What is computed in the weight's own dtype, where nothing is gained by another, is computed in place. All else is
# computed in fp32, a block of rows at a time, and a bf16 weight takes it in by `Step.store`, rounded.
@dataclass(frozen=True)
class DenseWeights:
    """Holds weights as they are: fp32 or bf16 tensors."""

    is_dense: ClassVar[bool] = True

    def subtract(self, weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
        """Update ``weight`` in place; a bf16 one is rounded as ``step`` says."""
        has_scales = direction.row is not None or direction.column is not None
        if direction.rest is not None:
            _subtract_sum(weight, direction, decay, decay_first, step)
        elif step.valid is None and not has_scales and _is_plain(weight, direction, step):
            alpha = -direction.factor if direction.scaled else -direction.factor * step.lr
            if decay and decay_first:
                weight.add_(weight, alpha=-decay)
            if direction.right is None:
                weight.add_(direction.left, alpha=alpha)
            else:
                weight.addmm_(direction.left, direction.right, alpha=alpha)
            if decay and not decay_first:
                weight.add_(weight, alpha=-decay)
        else:
            _subtract_in_blocks(weight, direction, decay, decay_first, step)


def _is_plain(weight: Tensor, direction: Direction, step: Step) -> bool:
    """Whether the weight's own dtype is as good as fp32: it is fp32, or results are rounded to nearest anyway."""
    return weight.dtype == torch.float32 or (step.bits is None and direction.left.dtype == weight.dtype)


def _subtract_in_blocks(weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
    """Subtract a direction of one term, a block of rows at a time, so that temporaries stay small.

    Products are made for several blocks at once: they want more rows than a cache holds. Where the term's dtype is less
    than fp32, it is multiplied out in that dtype before it is added in fp32.
    """
    alpha = -direction.factor * (1.0 if direction.scaled else step.lr)
    is_rounded = weight.dtype == torch.bfloat16 and step.bits is not None
    if direction.right is not None and is_rounded and not has_fast_bf16(weight.device):
        direction = _in_fp32(direction)
    has_scales = direction.row is not None or direction.column is not None
    computed = torch.float32 if has_scales else direction.left.dtype
    plain = weight.dtype == torch.float32 or (step.bits is None and computed == weight.dtype)
    width = weight.shape[1:].numel()
    rows = max(1, chunk_elements(weight.device) // width)
    products = rows if direction.right is None else max(rows, _PRODUCT // width // rows * rows)
    for begin, end in chunks(weight, weight.shape[0], products):
        part, size = direction.part(begin, end), products
        if not plain and computed != torch.float32:  # else multiplied and added in one operation
            part, size = Direction(part.whole()), rows
        for start, stop in chunks(weight, len(part.left), size):
            kept = weight[begin + start : begin + stop]
            block = kept.to(kept.dtype if plain else torch.float32, copy=True)
            if decay and decay_first:
                block.add_(block, alpha=-decay)
            part.part(start, stop).add_to(block, alpha)
            if decay and not decay_first:
                block.add_(block, alpha=-decay)
            step.at((begin + start) * width).store(kept, block, stream="weight")


# Each block of rows is read once, takes all terms and decay in fp32, and is rounded once.
def _subtract_sum(weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
    """Subtract a direction of several terms, as `subtract` does one of one."""
    rate = 1.0 if direction.scaled else step.lr
    terms = [_in_fp32(term) for term in direction.terms()]
    width = weight.shape[1:].numel()
    for start, stop in chunks(weight, weight.shape[0], max(1, chunk_elements(weight.device) // width)):
        kept = weight[start:stop]
        block = kept.to(torch.float32, copy=True)
        if decay and decay_first:
            block.mul_(1 - decay)
        for term in terms:
            term.part(start, stop).add_to(block, -term.factor * rate)
        if decay and not decay_first:
            block.mul_(1 - decay)
        step.at(start * width).store(kept, block, stream="weight")


def _in_fp32(term: Direction) -> Direction:
    """Return a term whose factors of a low-rank product are fp32."""
    if term.right is None:
        return term
    return replace(term, left=term.left.float(), right=term.right.float())
