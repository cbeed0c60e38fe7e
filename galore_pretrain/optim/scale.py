"""SCALE (arXiv 2506.16659): the gradient with its rows, or its columns, normalized, and hardly any state."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import Direction, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.place import is_gpu
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.tensors.values import channel_norms, sums_of_squares

_AVERAGED_OVER = {"rows": 1, "columns": 0}  # the dimension over which squares are averaged
_SMALLEST_RMS = 1e-8


@dataclass(frozen=True)
class Scale(UpdateRule):
    """Divides each row, or each column, of a matrix by its root mean square: U = M ⊘ max(RMS(M), 1e-8).

    Matrices are out × in. ``axis="rows"`` gives each row of U an RMS of 1: the paper's rule for the matrices of
    attention and MLP, and for the head. ``"columns"`` gives it each column: the paper's for the embedding (vocabulary ×
    features), where each feature is normalized over the vocabulary. The paper writes in × out, and says columns of
    both. The other axis is another method: on a 60M model it doubles the perplexity.

    Without ``momentum``, M is the gradient G, and there is no state. With a momentum of β (the paper's 0.9, for the
    head alone) M ← β M + (1 − β) G. A bias correction would be a factor, which the division takes out again. Where
    ``store`` is dense, the weight moves by M as it is kept; else by the M that is about to be kept in fewer bits.
    """

    axis: Literal["rows", "columns"] = "rows"
    momentum: float = 0.0
    store: MomentStore = field(default_factory=Dense)

    def __post_init__(self) -> None:
        if self.axis not in _AVERAGED_OVER:
            raise ValueError(f"axis {self.axis!r} is unknown; choose from {', '.join(_AVERAGED_OVER)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum} must be in [0, 1)")

    @property
    def scope(self) -> Scope:
        """A part can be updated by itself; sums across the parts of a row or column are asked of the shard."""
        return Scope.PARTS

    def stores(self) -> Mapping[str, MomentStore]:
        """Return the store of the momentum, where there is one."""
        if not self.momentum:
            return {}
        return {"momentum": self.store}

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return ``momentum``, zeros of the shape of ``like`` (m × n), or nothing without a momentum.

        ValueError for a tensor that is no matrix.
        """
        if like.ndim != 2:
            raise ValueError(
                f"SCALE normalizes the {self.axis} of matrices, and a tensor of shape {tuple(like.shape)} is none: "
                "put it into a group of Adam's, as the paper does"
            )
        if not self.momentum:
            return {}
        return self.store.zeros("momentum", like, shard)

    # U = diag(1 / RMS of the rows) · M, or M · diag(1 / RMS of the columns). The direction is returned in these
    # factors, so that no m × n tensor is made of a gradient, nor of a dense momentum.
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the momentum by ``grad`` (m × n), and return it with its rows or columns normalized."""
        matrix = grad
        if self.momentum:
            matrix = self._averaged(grad, state, step)
        rms = self._root_mean_squares(matrix, step.shape(grad), step.shard)
        factor = rms.clamp_(min=_SMALLEST_RMS).reciprocal_()
        if self.axis == "rows":
            return Direction(matrix, row=factor)
        return Direction(matrix, column=factor)

    def _root_mean_squares(self, matrix: Tensor, shape: Sequence[int], shard: Shard | None) -> Tensor:
        """Return the root mean square of each row or column of a matrix of ``shape``, of which ``matrix`` is a part."""
        over = _AVERAGED_OVER[self.axis]
        if is_gpu(matrix.device) and shard is None:  # two launches, and not four
            return channel_norms(matrix, over).div_(math.sqrt(shape[over]))
        squares = sums_of_squares(matrix, over)
        if shard is not None and shard.dim == over:
            squares = shard.sum(squares)
        return squares.div_(shape[over]).sqrt_()

    # M is advanced a chunk of its elements at a time. What a dense store keeps of it is a matrix that can be returned
    # as it is. Another store keeps bytes, so M is copied, in the gradient's dtype, before it is written there.
    def _averaged(self, grad: Tensor, state: State, step: Step) -> Tensor:
        """Advance the momentum by ``grad`` and return it (m × n)."""
        average = state["momentum"]
        if not self.store.is_dense:
            average = torch.empty_like(grad, memory_format=torch.contiguous_format)
        flat_average = average.view(-1)
        flat_grad = grad.reshape(-1)
        for start, stop in chunks(flat_grad, flat_grad.numel(), chunk_elements(grad.device)):
            part = self.store.narrow(state, "momentum", start, stop)
            part_step = step.at(start)
            chunk = self.store.read(part, "momentum", part_step)
            chunk.lerp_(flat_grad[start:stop].to(chunk.dtype), 1 - self.momentum)
            if not self.store.is_dense:
                flat_average[start:stop] = chunk
            self.store.write(part, "momentum", chunk, part_step)
        return average
