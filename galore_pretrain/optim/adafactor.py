"""Adafactor: a matrix's second moment as one number a row and one a column."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import BasisChange, Direction, Layout, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.fused import BLOCK
from galore_pretrain.tensors.shards import Shard


@dataclass(frozen=True)
class Adafactor(UpdateRule):
    """Adafactor (arXiv 1804.04235, Algorithm 4) without relative step sizes.

    A matrix keeps row and column means of its squared gradient, in fp32 (m + n numbers); other shapes the full
    second moment. ``beta1`` adds a first moment, an average of the directions. Works in blocks of rows: no fp32 copy of
    a matrix exists. ``published=True`` computes what ``transformers.Adafactor`` and the GaLore authors' copy
    of it compute, in their order of operations: in whole matrices, with the learning rate inside the first moment.
    """

    beta1: float | None = None
    decay_rate: float = -0.8
    epsilon: float = 1e-30
    clip_threshold: float = 1.0
    published: bool = False
    store: MomentStore = field(default_factory=Dense)
    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType(
        {
            "row": Layout.OF_ROWS,
            "column": Layout.OF_COLUMNS,
        }
    )

    def __post_init__(self) -> None:
        beta1_is_valid = self.beta1 is None or 0 <= self.beta1 < 1
        if not beta1_is_valid or not self.clip_threshold > 0:
            raise ValueError(f"beta1 {self.beta1} must be in [0, 1), clip_threshold {self.clip_threshold} positive")

    @property
    def scope(self) -> Scope:
        """A part can be updated by itself; means over the whole tensor are asked of the step."""
        return Scope.PARTS

    def stores(self) -> Mapping[str, MomentStore]:
        """Return the store of the first moment, where there is one."""
        if self.beta1 is None:
            return {}
        return {"exp_avg": self.store}

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return ``row`` (m) and ``column`` (n) for an m × n matrix, else ``exp_avg_sq`` of its shape; all fp32 zeros.

        With ``beta1`` there is ``exp_avg`` as well, as its store keeps it.
        """
        state: State = {}
        if like.ndim == 2:
            m, n = like.shape
            state["row"] = like.new_zeros(m, dtype=torch.float32)
            state["column"] = like.new_zeros(n, dtype=torch.float32)
        else:
            state["exp_avg_sq"] = torch.zeros_like(
                like,
                dtype=torch.float32,
                memory_format=torch.contiguous_format,
            )
        if self.beta1 is None:
            return state
        # What is published keeps its first moment in the dtype of its arithmetic.
        if self.published:
            like = like.float()
        return state | self.store.zeros("exp_avg", like, shard)

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the second moment by ``grad`` and return the direction, that of a matrix in its factors."""
        if self.published:
            return self._published(grad.float(), state, step)
        advance = self._factored if "row" in state else self._unfactored
        direction = advance(grad, state, step)
        if self.beta1 is None:
            return direction
        return self._averaged(direction, self.beta1, state, step)

    # Algorithm 4 for a gradient G (m × n) at update t, with β₂ = 1 − t^−0.8 and means where the paper has sums:
    #     R ← β₂ R + (1 − β₂) · means of G² + ε over each row             R: m
    #     C ← β₂ C + (1 − β₂) · means of G² + ε over each column          C: n
    #     V̂ = R Cᵀ / mean(R)        U = G / √V̂        direction = U / max(1, RMS(U) / d)
    # V̂ has rank 1, so U is diag(√(mean(R) / R)) · G · diag(1 / √C), and the direction is returned in these factors.
    # Nothing of size m × n is made: two passes over G, one for the means and one for RMS(U), take a block of its rows
    # at a time. RMS(U) needs the sum of U² only, Σᵢ row_factorᵢ² Σⱼ Gᵢⱼ² column_factorⱼ²: two products by vectors.
    def _factored(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the row and column means of a matrix and return its direction."""
        row, column = self._advance_means(grad, state, step)
        row_factor = row / step.mean(row, 0)
        row_factor.rsqrt_()
        column_factor = column.rsqrt()
        step.store(state["row"], row)
        step.store(state["column"], column)

        sums = []
        rows = _rows(grad)
        for start, stop in chunks(grad, grad.shape[0], rows):
            block = grad[start:stop].to(torch.float32, copy=True)
            row_sums = block.square_() @ column_factor.square()
            row_squares = row_factor[start:stop].square()
            sums.append(row_sums @ row_squares)
        # There are no blocks where this process has no part of the matrix.
        total = torch.stack(sums).sum() if sums else row.new_zeros(())
        m, n = step.shape(grad)
        rms = step.total(total) / (m * n)
        rms.sqrt_()
        excess = rms / self.clip_threshold
        row_factor.div_(excess.clamp_(min=1.0))
        return Direction(grad, row=row_factor, column=column_factor)

    def _advance_means(self, grad: Tensor, state: State, step: Step) -> tuple[Tensor, Tensor]:
        """Take the squares of a matrix into its row means (m) and column means (n); return both, still to be stored."""
        beta2 = 1.0 - step.count**self.decay_rate
        rate = 1 - beta2
        m, n = step.shape(grad)
        row_mean = torch.zeros_like(state["row"])
        column_mean = torch.zeros_like(state["column"])
        rows = _rows(grad)
        for start, stop in chunks(grad, grad.shape[0], rows):
            block = grad[start:stop].to(torch.float32, copy=True)
            block.square_().add_(self.epsilon)
            row_mean[start:stop] = block.mean(1)
            column_mean += block.sum(0)
        # Of a part of the rows, sums down the columns are incomplete; of a part of the columns, means along the rows.
        shard = step.shard
        if shard is not None and shard.dim == 0:
            column_mean = shard.sum(column_mean)
        elif shard is not None:
            share = grad.shape[1] / n
            row_mean = shard.sum(row_mean * share)
        row = step.working_copy(state["row"])
        column = step.working_copy(state["column"])
        row.lerp_(row_mean, rate)
        column_mean.div_(m)
        column.lerp_(column_mean, rate)
        return row, column

    # A vector, or a tensor of more than two dimensions, has its second moment in full: V ← β₂ V + (1 − β₂)(G² + ε),
    # U = G / √V. The rest is as for a matrix.
    def _unfactored(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the second moment of a tensor that is no matrix and return its direction, of its shape."""
        beta2 = 1.0 - step.count**self.decay_rate
        square = step.working_copy(state["exp_avg_sq"])
        square.lerp_(grad.float().square().add_(self.epsilon), 1 - beta2)
        direction = grad.float() * square.rsqrt()
        step.store(state["exp_avg_sq"], square)
        square = direction.square()
        if step.shard is None:
            mean = square.mean()
        else:
            total = step.total(square.sum())
            elements = math.prod(step.shape(grad))
            mean = total / elements
        rms = mean.sqrt_()
        excess = rms / self.clip_threshold
        direction.div_(excess.clamp_(min=1.0))
        return Direction(direction)

    # The first moment averages directions, not gradients: m ← β₁ m + (1 − β₁) · direction. The direction is multiplied
    # out a block of rows at a time, so that its m × n never exist in fp32. A store can be cut at multiples of 256 alone
    # where it keeps bytes. These are no direction, so m is copied, in the gradient's dtype, before it is written there.
    def _averaged(
        self,
        direction: Direction,
        beta1: float,
        state: State,
        step: Step,
    ) -> Direction:
        """Advance the first moment by ``direction`` and return it as the new direction."""
        grad = direction.left
        width = grad.shape[1:].numel()
        rows = _rows(grad)
        if self.store.in_blocks(state, "exp_avg"):
            together = BLOCK // math.gcd(BLOCK, width)
            rows = max(1, rows // together) * together
        averages = state["exp_avg"]
        if not self.store.is_dense:
            averages = torch.empty_like(grad, memory_format=torch.contiguous_format)
        flat_averages = averages.view(-1)
        for start, stop in chunks(grad, grad.shape[0], rows):
            first = start * width
            last = stop * width
            part = self.store.narrow(state, "exp_avg", first, last)
            part_step = step.at(first)
            average = self.store.read(part, "exp_avg", part_step)
            average.mul_(beta1)
            average.add_(direction.part(start, stop).whole().reshape(-1), alpha=1 - beta1)
            if not self.store.is_dense:
                flat_averages[first:last] = average
            self.store.write(part, "exp_avg", average, part_step)
        return Direction(averages)

    # The same algorithm with the published code's own operations, so that results agree bit for bit: means by mul and
    # add where `_factored` has lerp, U multiplied out in fp32, and the learning rate inside the first moment.
    def _published(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the state by an fp32 ``grad`` and return the direction, its learning rate included."""
        beta2 = 1.0 - step.count**self.decay_rate
        rate = 1 - beta2
        update = grad.square().add_(self.epsilon)
        if "row" in state:
            row = step.working_copy(state["row"])
            column = step.working_copy(state["column"])
            row.mul_(beta2)
            row_mean = step.mean(update, 1)
            row.add_(row_mean, alpha=rate)
            column.mul_(beta2)
            column_mean = step.mean(update, 0)
            column.add_(column_mean, alpha=rate)
            row_factor = row / step.mean(row, 0)
            row_factor.rsqrt_()
            column_factor = column[None].rsqrt()
            update = torch.mul(row_factor[:, None], column_factor)
            update.mul_(grad)
            step.store(state["row"], row)
            step.store(state["column"], column)
        else:
            square = step.working_copy(state["exp_avg_sq"])
            square.mul_(beta2)
            square.add_(update, alpha=rate)
            update = square.rsqrt()
            update.mul_(grad)
            step.store(state["exp_avg_sq"], square)
        if step.shard is None:
            norm = update.norm(2)
        else:
            norm = step.total(update.square().sum())
            norm.sqrt_()
        elements = math.prod(step.shape(update))
        rms = norm / elements**0.5
        excess = rms / self.clip_threshold
        update.div_(excess.clamp_(min=1.0))
        update.mul_(step.lr)
        if self.beta1 is not None:
            average = self.store.read(state, "exp_avg", step)
            average.mul_(self.beta1)
            average.add_(update, alpha=1 - self.beta1)
            # Storing may overwrite the average with its rounded values. The weight moves by the exact ones.
            update = average.clone()
            self.store.write(state, "exp_avg", average, step)
        return Direction(update, scaled=True)

    # For coordinates x → A x (A is r × r) taken as uncorrelated, second moments are mapped by the squares of A's
    # entries: the row means by those of the left change, the column means by those of the right one.
    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Express row and column means, second moments along the side that the basis spans, in a new basis."""
        if not change.project:
            return
        if change.left is not None:
            row = change.left.square() @ state["row"]
            step.store(state["row"], row)
        if change.right is not None:
            column = state["column"] @ change.right.square()
            step.store(state["column"], column)
        if self.beta1 is not None:
            mean = self.store.read(state, "exp_avg", step).float()
            mean = change.mean(mean)
            self.store.write(state, "exp_avg", mean, step)


def _rows(matrix: Tensor) -> int:
    """Return how many rows of a matrix are worked on at a time, at least one."""
    width = matrix.shape[1:].numel()
    rows = chunk_elements(matrix.device) // max(1, width)
    return max(1, rows)
