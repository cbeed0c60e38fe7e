"""Adafactor: a matrix's second moment as one number a row and one a column."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import BasisChange, Direction, Layout, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
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
    layouts: ClassVar[Mapping[str, Layout]] = MappingProxyType({"row": Layout.OF_ROWS, "column": Layout.OF_COLUMNS})

    def __post_init__(self) -> None:
        if not (self.beta1 is None or 0 <= self.beta1 < 1) or not self.clip_threshold > 0:
            raise ValueError(f"beta1 {self.beta1} must be in [0, 1), clip_threshold {self.clip_threshold} positive")

    @property
    def scope(self) -> Scope:
        return Scope.PARTS

    def stores(self) -> Mapping[str, MomentStore]:
        return {} if self.beta1 is None else {"exp_avg": self.store}

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        if like.ndim == 2:
            state = {
                name: like.new_zeros(n, dtype=torch.float32)
                for name, n in zip(("row", "column"), like.shape, strict=True)
            }
        else:
            state = {"exp_avg_sq": torch.zeros_like(like, dtype=torch.float32, memory_format=torch.contiguous_format)}
        if self.beta1 is None:
            return state
        # what is published keeps the dtype of its arithmetic
        return state | self.store.zeros("exp_avg", like.float() if self.published else like, shard)

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        if self.published:
            return self._published(grad.float(), state, step)
        beta2 = 1.0 - step.count**self.decay_rate
        if "row" not in state:
            square = step.working_copy(state["exp_avg_sq"])
            square.lerp_(grad.float().square().add_(self.epsilon), 1 - beta2)
            direction = grad.float() * square.rsqrt()
            step.store(state["exp_avg_sq"], square)
            square = direction.square()
            mean = step.total(square.sum()) / math.prod(step.shape(grad)) if step.shard else square.mean()
            direction.div_((mean.sqrt_() / self.clip_threshold).clamp_(min=1.0))
            return self._averaged(Direction(direction), state, step)
        m, n = step.shape(grad)
        row_mean, column_mean = (torch.zeros_like(state[name]) for name in ("row", "column"))
        for start, block in _row_blocks(grad):
            square = block.square_().add_(self.epsilon)
            row_mean[start : start + len(block)] = square.mean(1)
            column_mean += square.sum(0)
        if step.shard is not None and step.shard.dim == 0:
            column_mean = step.shard.sum(column_mean)
        elif step.shard is not None:
            row_mean = step.shard.sum(row_mean * (grad.shape[1] / n))
        row, column = step.working_copy(state["row"]), step.working_copy(state["column"])
        row.lerp_(row_mean, 1 - beta2)
        column.lerp_(column_mean.div_(m), 1 - beta2)
        row_factor, column_factor = (row / step.mean(row, 0)).rsqrt_(), column.rsqrt()
        step.store(state["row"], row)
        step.store(state["column"], column)
        squares = [
            (block.square_() @ column_factor.square()) @ row_factor[start : start + len(block)].square()
            for start, block in _row_blocks(grad)
        ]
        square = torch.stack(squares).sum() if squares else row.new_zeros(())
        rms = (step.total(square) / (m * n)).sqrt_()
        row_factor.div_((rms / self.clip_threshold).clamp_(min=1.0))
        return self._averaged(Direction(grad, row=row_factor, column=column_factor), state, step)

    def _averaged(self, direction: Direction, state: State, step: Step) -> Direction:
        """The first moment, which has taken in ``direction``; that itself where there is none."""
        if self.beta1 is None:
            return direction
        grad = direction.left
        width = grad.shape[1:].numel()
        for start, stop in chunks(grad, grad.shape[0], _rows(grad)):
            part, here = self.store.narrow(state, "exp_avg", start * width, stop * width), step.at(start * width)
            average = self.store.read(part, "exp_avg", here)
            average.mul_(self.beta1).add_(direction.part(start, stop).whole().reshape(-1), alpha=1 - self.beta1)
            self.store.write(part, "exp_avg", average, here)
        return Direction(state["exp_avg"])

    def _published(self, grad: Tensor, state: State, step: Step) -> Direction:
        beta2 = 1.0 - step.count**self.decay_rate
        update = grad.square().add_(self.epsilon)
        if "row" in state:
            row, column = step.working_copy(state["row"]), step.working_copy(state["column"])
            row.mul_(beta2).add_(step.mean(update, 1), alpha=1 - beta2)
            column.mul_(beta2).add_(step.mean(update, 0), alpha=1 - beta2)
            update = torch.mul((row / step.mean(row, 0)).rsqrt_()[:, None], column[None].rsqrt()).mul_(grad)
            step.store(state["row"], row)
            step.store(state["column"], column)
        else:
            square = step.working_copy(state["exp_avg_sq"])
            square.mul_(beta2).add_(update, alpha=1 - beta2)
            update = square.rsqrt().mul_(grad)
            step.store(state["exp_avg_sq"], square)
        norm = update.norm(2) if step.shard is None else step.total(update.square().sum()).sqrt_()
        rms = norm / math.prod(step.shape(update)) ** 0.5
        update.div_((rms / self.clip_threshold).clamp_(min=1.0)).mul_(step.lr)
        if self.beta1 is not None:
            average = self.store.read(state, "exp_avg", step)
            update = average.mul_(self.beta1).add_(update, alpha=1 - self.beta1).clone()
            self.store.write(state, "exp_avg", average, step)
        return Direction(update, scaled=True)

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Row and column means are second moments along the side that the basis spans."""
        if not change.project:
            return
        if change.left is not None:
            step.store(state["row"], change.left.square() @ state["row"])
        if change.right is not None:
            step.store(state["column"], state["column"] @ change.right.square())
        if self.beta1 is not None:
            mean = change.mean(self.store.read(state, "exp_avg", step).float())
            self.store.write(state, "exp_avg", mean, step)


def _rows(matrix: Tensor) -> int:
    return max(1, chunk_elements(matrix.device) // max(1, matrix.shape[1:].numel()))


def _row_blocks(matrix: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first row, fp32 copy) of blocks of rows."""
    for start, stop in chunks(matrix, matrix.shape[0], _rows(matrix)):
        yield start, matrix[start:stop].to(torch.float32, copy=True)
