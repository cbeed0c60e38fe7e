"""Updates of weights that are held as 8-bit integers: a block of rows at a time, rounded once, stochastically."""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import Direction, Scope
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.weights import in_fp32, update_for_kernel
from galore_pretrain.tensors.coded import Coded
from galore_pretrain.tensors.fused import BLOCK, CODED_TILE, subtract_codes_

if TYPE_CHECKING:
    from galore_pretrain.optim.execution import PendingGradient
    from galore_pretrain.optim.slots import Slot


def _fits_kernel(coded: Coded) -> bool:
    """Return whether a kernel's tile has columns of one group alone."""
    return coded.scales.shape[1] == 1 or coded.group % CODED_TILE == 0


# A rule of single elements sees the rows of a block, any other one the whole gradient. Blocks are cut where 8-bit
# moments are.
def update_codes(coded: Coded, pending: "PendingGradient", decay: float) -> None:
    """Update a matrix of codes and the state of its rule by a gradient in its final form."""
    slot, step = pending.slot, pending.step
    sees_all = slot.scope is not Scope.ELEMENTS
    if sees_all or (step.kernels and _fits_kernel(coded)):
        _update(coded, pending.grad, pending.state, slot, step, decay)
        return
    columns = coded.codes.shape[1]
    grad = pending.grad.reshape(-1)
    for first, block in coded.blocks(BLOCK):
        start = first * columns
        stop = start + block.codes.numel()
        state = slot.rule.narrow(pending.state, start, stop)
        _update(block, grad[start:stop], state, slot, step.at(start), decay)


def _update(coded: Coded, grad: Tensor, state: State, slot: "Slot", step: Step, decay: float) -> None:
    """Update a matrix of codes, or the rows of one that are handed over, by the rule's direction."""
    decoupled = step.lr * decay
    if slot.decay == "l2":
        decoupled = 0.0
        if decay:
            weight = coded.read()
            if slot.scope is Scope.ELEMENTS:
                weight = weight.view(-1)
            grad = torch.add(grad.float(), slot.rule.compress(weight, state, step), alpha=decay)
    direction = slot.rule.update(grad, state, step)
    if direction.left.ndim == 1:
        direction = replace(direction, left=direction.left.view(coded.codes.shape))
    subtract_codes(coded, direction, decoupled, slot.decay == "before", step)


# In steps, the direction is divided by the scales of the block. It is formed in fp32 a block of rows at a time, as for
# a dense weight.
def subtract_codes(coded: Coded, direction: Direction, decay: float, decay_first: bool, step: Step) -> None:
    """Change a matrix of codes to itself - lr · direction - decay · itself, rounded stochastically.

    ``decay`` has lr in it already, and is taken before the direction if ``decay_first``. ``step`` counts elements from
    where ``coded`` begins, and has random bits.
    """
    assert step.bits is not None
    if step.kernels and _fits_kernel(coded):
        update = update_for_kernel(direction, step)
        if update is not None:
            noise = step.noise("weight")
            subtract_codes_(coded.codes, coded.scales, coded.group, update, decay, decay_first, noise, step.valid)
            return
    rate = 1.0 if direction.scaled else step.lr
    terms = [in_fp32(term) for term in direction.terms()]
    columns = coded.codes.shape[1]
    for start, block in coded.blocks():
        rows = len(block.codes)

        def change(steps: Tensor, start: int = start, block: Coded = block) -> Tensor:
            if decay and decay_first:
                steps.mul_(1 - decay)
            update = torch.zeros_like(steps)
            for term in terms:
                term.part(start, start + len(steps)).add_to(update, -term.factor * rate)
            steps.add_(block.in_steps(update))
            if decay and not decay_first:
                steps.mul_(1 - decay)
            return steps

        bits = step.bits.take("weight", step.start + start * columns, rows * columns)
        block.change(change, bits.view(rows, columns), step.valid)
