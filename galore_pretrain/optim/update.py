"""What one update of one parameter knows besides its tensors, and the one way in which its results are kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.rounding import RandomBits, round_stochastic
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.tensors.values import known_true


@dataclass(frozen=True)
class Step:
    """One update of one parameter, or of the elements from ``start`` on of the flattened parameter.

    ``count`` is 1 at the first update; ``lr`` the group's learning rate. ``seed`` is the parameter's, the same at every
    update; ``phase`` in [0, 1) its place among those that share its rule. ``bits`` are None where rounding is to
    nearest. ``valid``: a scalar, whether the results may be kept; None means yes, and is the rule on a CPU. On other
    devices nobody waits to see it: `store` looks at it there. ``failures`` gathers such scalars, one for each
    decomposition, true if it failed. ``shard``: of which part of the tensor this is the update; None means of all.
    """

    count: int
    lr: float = 0.0
    seed: int = 0
    phase: float = 0.0
    start: int = 0
    bits: RandomBits | None = None
    valid: Tensor | None = None
    failures: list[Tensor] = field(default_factory=list)
    shard: Shard | None = None

    def at(self, start: int) -> "Step":
        """Return the update of the elements from ``start`` on, counted from where this one starts."""
        if start == 0:
            return self
        return Step(
            self.count, self.lr, self.seed, self.phase, self.start + start, self.bits, self.valid, self.failures,
            self.shard,
        )  # fmt: skip  # dataclasses.replace takes five times as long

    def placed(self) -> "Step":
        """Return the update counted from where the part at hand begins in the whole tensor."""
        return self if self.shard is None else self.at(self.shard.offset)

    def total(self, part: Tensor) -> Tensor:
        """A sum over elements at hand, over all elements of the tensor."""
        return part if self.shard is None else self.shard.sum(part)

    def mean(self, matrix: Tensor, over: int) -> Tensor:
        """The mean of the whole tensor over dimension ``over``, for the part at hand."""
        if self.shard is None or over != self.shard.dim:
            return matrix.mean(over)
        return self.shard.sum(matrix.sum(over)) / self.shard.shape[over]

    def shape(self, part: Tensor) -> tuple[int, ...]:
        """Return the shape of the whole tensor, of which ``part`` is at hand."""
        return part.shape if self.shard is None else self.shard.shape

    def store(self, target: Tensor, value: Tensor, stream: str = "") -> None:
        """``target`` takes ``value``, of its shape, if ``valid``; ``value`` may be overwritten.

        An fp32 value for a bf16 target is rounded stochastically with the bits of ``stream``, to nearest without one.
        """
        if value is target:  # arithmetic was done in place
            return
        if self.bits is None or not stream or target.dtype != torch.bfloat16 or value.dtype != torch.float32:
            self._keep(target, value)
            return
        kept, given = target.view(-1), value.reshape(-1)
        for begin, end in chunks(kept, kept.numel(), chunk_elements(target.device)):
            bits = self.bits.take(stream, self.start + begin, end - begin)
            self._keep(kept[begin:end], round_stochastic(given[begin:end], bits))

    def store_together(self, targets: Sequence[Tensor], values: Tensor) -> None:
        """`store` for bf16 ``targets`` of n elements and the rows of fp32 ``values`` (targets × n), at most a chunk."""
        assert self.bits is not None
        rounded = round_stochastic(values, self.bits.take_rows(self.start, *values.shape))
        for target, value in zip(targets, rounded, strict=True):
            self._keep(target, value)

    def working_copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``tensor`` in ``dtype`` (None: its own), to be changed in place and then stored: itself where it can be."""
        dtype = dtype or tensor.dtype
        return tensor if dtype == tensor.dtype and self.valid is None else tensor.to(dtype, copy=True)

    def _keep(self, target: Tensor, value: Tensor) -> None:
        target.copy_(value if self.valid is None else torch.where(self.valid, value.to(target.dtype), target))

    def where_valid(self, condition: Tensor) -> "Step":
        """Return the update whose results are kept only if ``condition``, a scalar, holds as well."""
        if known_true(condition):
            return self
        return replace(self, valid=condition if self.valid is None else condition & self.valid)
