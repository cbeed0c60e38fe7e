"""FOAM (arXiv 2512.07112): Adam with moments of blocks of elements, and what the blocks leave out of the gradient."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import Direction, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.shards import Shard

_CUT = 256  # a moment may be cut at multiples of so many elements (`MomentStore.narrow`)


@dataclass(frozen=True)
class Foam(UpdateRule):
    """Adam with one first and one second moment for each block of 2^``level`` neighbours of a row (of the inputs).

    For a gradient G (m × n), let f be its means over the blocks, q those of G², and ρ = G − unfold(f) what the means
    leave out, where unfold gives each element of a block the block's value. With the moments m ← β₁ m + (1 − β₁) f and
    v ← β₂ v + (1 − β₂) q, the direction at update t is

        √(1 − β₂ᵗ) / (1 − β₁ᵗ) · ``scale`` · (unfold(m) + ρ) / (√(unfold(v) + ρ²) + ε)

    The bias corrections are a factor, and ε stands beside moments that are not corrected. So at level 0, where ρ is 0,
    this is ``scale`` · Adam with ``formula="transformers"``. Where 2^``level`` does not divide n, a row's last block is
    shorter, and its means are of the elements that it has. (The authors fill it up with zeros, which makes its mean
    smaller than all that it stands for.) The default scale of 0.25 is the authors'.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    level: int = 2
    scale: float = 0.25
    store: MomentStore = field(default_factory=Dense)

    def __post_init__(self) -> None:
        betas_are_valid = all(0 <= beta < 1 for beta in self.betas)
        if not betas_are_valid or not self.eps >= 0:
            raise ValueError(f"betas {self.betas} must be in [0, 1), and eps {self.eps} not negative")
        if not isinstance(self.level, int) or self.level < 0:
            raise ValueError(f"level {self.level!r} must be a whole number of at least 0: a block has 2^level elements")
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"scale {self.scale} must be finite and not negative")

    @property
    def scope(self) -> Scope:
        """Blocks lie within rows, so rows do not see each other."""
        return Scope.ROWS

    def stores(self) -> Mapping[str, MomentStore]:
        """Return the store of both moments."""
        return {"exp_avg": self.store, "exp_avg_sq": self.store}

    # A matrix that is cut by rows has its moments cut by the same rows. One that is cut by columns is gathered for each
    # update: a block may lie across the cut, so every process has all moments, and advances them alike.
    def layout(self, name: str, state: State, shard: Shard) -> Shard | None:
        """Return where a moment lies: with its rows, or on every process where the columns are cut."""
        if shard.dim == 1:
            return None
        m, _ = shard.shape
        _, blocks = state[name].shape
        return replace(shard, shape=(m, blocks))

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return the moments ``exp_avg`` and ``exp_avg_sq``: zeros, a number for each block of ``like`` (m × n).

        ValueError for a tensor that is no matrix.
        """
        if like.ndim != 2:
            raise ValueError(
                f"FOAM folds the rows of matrices, and a tensor of shape {tuple(like.shape)} is none: put it into a "
                "group of Adam's"
            )
        m, n = like.shape
        blocks = _count_blocks(n, self._block(n))
        folded = like.new_empty(m, blocks)
        folded_shard = shard
        if shard is not None:
            folded_shard = replace(shard, shape=(shard.shape[0], blocks))
        first = self.store.zeros("exp_avg", folded, folded_shard)
        second = self.store.zeros("exp_avg_sq", folded, folded_shard)
        return first | second

    # The direction is a full matrix, and there are no factors to keep it in: it is written, in the gradient's dtype, a
    # few rows at a time. What is in fp32 is of these rows alone.
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the moments by ``grad`` (m × n) and return the direction, of its shape and dtype."""
        m, n = grad.shape
        block = self._block(n)
        blocks = _count_blocks(n, block)
        lengths = _lengths(grad, n, block)
        direction = torch.empty_like(grad, memory_format=torch.contiguous_format)
        first_row = 0
        if step.shard is not None:
            first_row = step.shard.start
        for start, stop in chunks(grad, m, _rows(grad, blocks)):
            part: State = {}
            for name in self.stores():
                part |= self.store.narrow(state, name, start * blocks, stop * blocks)
            # Random bits are counted from the first row of the whole matrix, by moments, not by its elements.
            part_step = replace(step, start=(first_row + start) * blocks)
            # `pad` makes a copy, also where there is nothing to pad: it may be overwritten.
            padded = pad(grad[start:stop].float(), (0, blocks * block - n))
            in_blocks = padded.view(stop - start, blocks, block)
            unfolded = self._advance(in_blocks, lengths, part, part_step)
            direction[start:stop] = unfolded.view(stop - start, -1)[:, :n]
        beta1, beta2 = self.betas
        correction = (1 - beta2**step.count) ** 0.5 / (1 - beta1**step.count)
        return Direction(direction, factor=self.scale * correction)

    # The algorithm of the class's docstring, without the factor, for k rows of b blocks, the last of which is padded
    # with zeros. A sum over it is that of its elements, and is divided by their number. What becomes of its padding is
    # cut off by the caller.
    def _advance(self, grad: Tensor, lengths: Tensor, state: State, step: Step) -> Tensor:
        """Advance the moments (k · b) by ``grad`` (k × b × block), and write (unfold(m) + ρ) / (√(…) + ε) over it."""
        beta1, beta2 = self.betas
        mean = grad.sum(2).div_(lengths)
        mean_square = grad.square().sum(2).div_(lengths)
        rest = grad.sub_(mean[:, :, None])
        m = self.store.read(state, "exp_avg", step)
        m.mul_(beta1)
        m.add_(mean.view(-1), alpha=1 - beta1)
        v = self.store.read(state, "exp_avg_sq", step)
        v.mul_(beta2)
        v.add_(mean_square.view(-1), alpha=1 - beta2)
        denominator = rest.square()
        denominator.add_(v.view_as(mean)[:, :, None])
        denominator.sqrt_()
        denominator.add_(self.eps)
        direction = rest.add_(m.view_as(mean)[:, :, None])
        direction.div_(denominator)
        # Storing may overwrite the moments with their rounded values. The direction is of the exact ones.
        self.store.write(state, "exp_avg", m, step)
        self.store.write(state, "exp_avg_sq", v, step)
        return direction

    def _block(self, n: int) -> int:
        """Return how many elements of a row of ``n`` a block has, but for the last one: no more than there are."""
        return max(1, min(1 << self.level, n))


def _count_blocks(n: int, block: int) -> int:
    """Return how many blocks a row of ``n`` elements has."""
    return -(-n // block)


def _lengths(like: Tensor, n: int, block: int) -> Tensor:
    """Return how many elements each block of a row has, in fp32 on the device of ``like``."""
    blocks = _count_blocks(n, block)
    lengths = like.new_full((blocks,), block, dtype=torch.float32)
    lengths[-1:] = n - (blocks - 1) * block
    return lengths


def _rows(grad: Tensor, blocks: int) -> int:
    """Return how many rows are worked on at a time: about a chunk, and so many that moments may be cut there."""
    _, n = grad.shape
    together = _CUT // math.gcd(_CUT, blocks)
    groups = chunk_elements(grad.device) // max(1, n * together)
    return max(1, groups) * together
