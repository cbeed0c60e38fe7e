"""Says what an update of one parameter knows besides its tensors, and keeps its results in the one way there is."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from galore_pretrain.tensors.capability import kernels_take
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.fused import TO_NEAREST, Noise, store_
from galore_pretrain.tensors.rounding import RandomBits, round_stochastic
from galore_pretrain.tensors.shards import Shard
from galore_pretrain.tensors.values import known_true


@dataclass(frozen=True)
class Step:
    """One update of one parameter, or of the elements from ``start`` on of the flattened parameter.

    - ``count``: the number of the update, 1 at the first.
    - ``lr``: the learning rate of the parameter's group.
    - ``seed``: the parameter's seed, the same at every update.
    - ``phase``: in [0, 1), the place of the parameter among all that the optimizer has.
    - ``bits``: the random bits of stochastic rounding; None where rounding is to nearest.
    - ``valid``: a boolean scalar, whether the results may be kept. None means yes, and is the rule on a CPU. On other
      devices nobody waits to see it: `store` looks at it there.
    - ``failures``: gathers boolean scalars, one for each decomposition, true if it failed.
    - ``kernels``: whether kernels of our own run where the tensors are.
    - ``shard``: the part of the tensor that is updated; None means all of it.
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
    kernels: bool = False

    def at(self, start: int) -> "Step":
        """Return the update of the elements from ``start`` on, counted from where this one starts."""
        if start == 0:
            return self
        # Not dataclasses.replace: it takes five times as long, and a large weight comes here once a chunk.
        return Step(
            self.count,
            self.lr,
            self.seed,
            self.phase,
            self.start + start,
            self.bits,
            self.valid,
            self.failures,
            self.shard,
            self.kernels,
        )

    def placed(self) -> "Step":
        """Return the update counted from where the part at hand begins in the whole tensor; itself, if it is so."""
        if self.shard is None:
            return self
        return self.at(self.shard.offset - self.start)

    def total(self, part: Tensor) -> Tensor:
        """Return a sum over all elements of the tensor, from ``part``, the sum over the elements at hand."""
        if self.shard is None:
            return part
        return self.shard.sum(part)

    # Only a mean across the dimension that is shared out needs the other processes. Their slices may differ in length,
    # so sums are added and divided by the whole length; means are not averaged.
    def mean(self, matrix: Tensor, over: int) -> Tensor:
        """Return the mean of the whole tensor over dimension ``over``, for the part ``matrix`` at hand."""
        shard = self.shard
        if shard is None or over != shard.dim:
            return matrix.mean(over)
        return shard.sum(matrix.sum(over)) / shard.shape[over]

    def shape(self, part: Tensor) -> tuple[int, ...]:
        """Return the shape of the whole tensor, of which ``part`` is at hand."""
        if self.shard is None:
            return part.shape
        return self.shard.shape

    def noise(self, stream: str) -> Noise:
        """Return which random bits of ``stream`` a kernel rounds its results with; none where that is to nearest."""
        if self.bits is None:
            return Noise()
        return Noise(self.bits.seed_of(stream), self.start)

    # Every result of an update passes here, so rounding and "does this result count" are answered once. Rounding an
    # fp32 value x to bf16 stochastically keeps its mean, E[stored] = x. Rounding to nearest would lose every change
    # of less than one part in 512, half a unit in the last place: v · 0.999 would never decay. The bits of an element
    # depend on the stream and its place in the parameter alone, so results do not depend on how the tensor is cut up.
    def store(self, target: Tensor, value: Tensor, stream: str = "") -> None:
        """Copy ``value`` to ``target`` of the same shape if the update is ``valid``; ``value`` may be overwritten.

        An fp32 value for a bf16 target is rounded stochastically with the bits of ``stream``, to nearest without one.
        """
        if value is target:  # arithmetic was done in place
            return
        if self.kernels and kernels_take(target, value):
            store_(target, value, self.noise(stream) if stream else TO_NEAREST, self.valid)
            return
        if self.bits is None or not stream or target.dtype != torch.bfloat16 or value.dtype != torch.float32:
            self._keep(target, value)
            return
        flat_target = target.view(-1)
        flat_value = value.reshape(-1)
        for begin, end in chunks(flat_target, flat_target.numel(), chunk_elements(target.device)):
            bits = self.bits.take(stream, self.start + begin, end - begin)
            rounded = round_stochastic(flat_value[begin:end], bits)
            self._keep(flat_target[begin:end], rounded)

    # One addition and one mask round the weight and both moments of a chunk: two kernel launches in place of six. The
    # rows of bits lie 65,537 apart in the noise table, so the three tensors do not round alike.
    def store_together(self, targets: Sequence[Tensor], values: Tensor) -> None:
        """Store the rows of fp32 ``values`` (targets × n) in bf16 ``targets`` of n elements, at most a chunk."""
        assert self.bits is not None
        bits = self.bits.take_rows(self.start, *values.shape)
        rounded = round_stochastic(values, bits)
        for target, value in zip(targets, rounded, strict=True):
            self._keep(target, value)

    def working_copy(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return ``tensor`` in ``dtype`` (None: its own), to be changed in place and then stored.

        It is the tensor itself where it can be: in its own dtype, and where nothing can make the update invalid.
        """
        if dtype is None:
            dtype = tensor.dtype
        if dtype == tensor.dtype and self.valid is None:
            return tensor
        return tensor.to(dtype, copy=True)

    # `valid` lies on the device, and asking for its value would wait for all work that is queued there. So the choice
    # between the new value and the old one is made by the device itself.
    def _keep(self, target: Tensor, value: Tensor) -> None:
        """Copy ``value`` to ``target``, converted to its dtype, if the update is valid."""
        if self.valid is not None:
            value = torch.where(self.valid, value.to(target.dtype), target)
        target.copy_(value)

    def where_valid(self, condition: Tensor) -> "Step":
        """Return the update whose results are kept only if ``condition``, a scalar, holds as well."""
        if known_true(condition):
            return self
        if self.valid is None:
            return replace(self, valid=condition)
        return replace(self, valid=condition & self.valid)
