"""How weights and sums of gradients change: in place, a block at a time, each result rounded as `Step` says."""

from dataclasses import replace

import torch
from torch import Tensor

from galore_pretrain.optim.rule import Direction
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, pieces
from galore_pretrain.tensors.products import has_fast_bf16

_PRODUCT = 1 << 21
"""Elements of a low-rank update that are multiplied out at a time: matrix products want more than a cache holds."""


def add(total: Tensor, part: Tensor, step: Step, stream: str) -> None:
    """``total += part``, in place; a bf16 total is rounded stochastically where its weight is."""
    if step.bits is None or total.dtype != torch.bfloat16:
        total.add_(part)
        return
    kept, added = total.view(-1), part.reshape(-1)
    for start, stop in pieces(kept.numel(), chunk_elements(total.device)):
        piece = kept[start:stop]
        step.at(start).store(piece, piece.float().add_(added[start:stop]), stream)


def subtract(weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
    """``weight -= lr · direction + decay · weight``, in place; decay sees the weight before or after the update.

    In the weight's own dtype where nothing is gained by another; else in fp32, a block of rows at a time, which a bf16
    weight takes in by ``step.store``.
    """
    if direction.rest is not None:
        _subtract_sum(weight, direction, decay, decay_first, step)
        return
    alpha = -direction.factor * (1.0 if direction.scaled else step.lr)

    def apply(target: Tensor, part: Direction) -> None:
        if decay and decay_first:
            target.add_(target, alpha=-decay)
        part.add_to(target, alpha)
        if decay and not decay_first:
            target.add_(target, alpha=-decay)

    rounded = weight.dtype == torch.bfloat16 and step.bits is not None
    if direction.right is not None and rounded and not has_fast_bf16(weight.device):
        direction = replace(direction, left=direction.left.float(), right=direction.right.float())
    is_scaled = direction.row is not None or direction.column is not None
    computed = torch.float32 if is_scaled else direction.left.dtype
    plain = weight.dtype == torch.float32 or (step.bits is None and computed == weight.dtype)
    if plain and step.ok is None and not is_scaled:
        apply(weight, direction)
        return
    width = weight.shape[1:].numel()
    rows = max(1, chunk_elements(weight.device) // width)
    products = rows if direction.right is None else max(rows, _PRODUCT // width // rows * rows)
    for begin, end in pieces(weight.shape[0], products):
        part, size = direction.part(begin, end), products
        if not plain and computed != torch.float32:  # else multiplied and added in one operation
            part, size = Direction(part.whole()), rows
        for start, stop in pieces(len(part.left), size):
            kept = weight[begin + start : begin + stop]
            block = kept.to(kept.dtype if plain else torch.float32, copy=True)
            apply(block, part.part(start, stop))
            step.at((begin + start) * width).store(kept, block, stream="weight")


# Each block of rows is read once, takes all terms and decay in fp32, and is rounded once.
def _subtract_sum(weight: Tensor, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
    """Subtract a direction of several terms, as `subtract` does one of one."""
    rate = 1.0 if direction.scaled else step.lr
    terms = [_in_fp32(term) for term in direction.terms()]
    width = weight.shape[1:].numel()
    for start, stop in pieces(weight.shape[0], max(1, chunk_elements(weight.device) // width)):
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
