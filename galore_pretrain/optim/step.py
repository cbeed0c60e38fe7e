"""What one update of one parameter knows besides its tensors, and the one way in which its results are kept."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from galore_pretrain.optim.shards import Shard

POOL = 524_287
"""Random numbers after which a stream repeats: a prime, so that no row of a matrix gets the bits of another."""

_BETWEEN = 65_537  # between the places of streams that are read together


def chunk_elements(device: torch.device) -> int:
    """Elements that are worked on at a time: on a CPU, what its cache holds; elsewhere 8 MiB of fp32.

    So no fp32 copy of a large weight, gradient or moment ever exists. Results do not depend on it.
    """
    return 1 << 18 if device.type == "cpu" else 1 << 21


@dataclass
class Abridgement:
    """``alike``: how many pieces the present one stands for."""

    alike: int = 1


_abridgement: Abridgement | None = None


@contextmanager
def abridged() -> Iterator[Abridgement]:
    """Meanwhile, `pieces` leaves out all but the first two and the last: what they hold is alike. For fake tensors,
    whose memory or work is asked; the values of real ones would be wrong."""
    global _abridgement  # noqa: PLW0603  (autograd's threads must see it, which they do not a context variable)
    _abridgement = Abridgement()
    try:
        yield _abridgement
    finally:
        _abridgement = None


def pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive pieces of ``size``, the last of which may be smaller."""
    starts: Sequence[int] = range(0, total, size)
    if _abridgement is None or len(starts) <= 3:
        for start in starts:
            yield start, min(start + size, total)
        return
    outer = _abridgement.alike  # of a piece that is itself cut into these
    for i, start in enumerate((*starts[:2], starts[-1])):
        _abridgement.alike = outer * (len(starts) - 2 if i == 1 else 1)
        yield start, min(start + size, total)
        _abridgement.alike = outer


class RandomBits:
    """Streams of uniform 16-bit integers for one update of one parameter.

    All streams read one pool, each from a place of its own that changes with every update, and the pool is drawn anew
    now and then: generating bits for each element would cost more than the rest of an update. Elements half a million
    apart get the same bits, which unbiased rounding does not mind.
    """

    def __init__(self, pool: Tensor, seed: int) -> None:
        self._pool, self._seed = pool, seed
        self._places: dict[str, int] = {}  # of the streams, in the pool

    @staticmethod
    def pool(seed: int, device: torch.device) -> Tensor:
        """What the streams of one update are read from: int32 in [0, 2¹⁶), the same for equal seeds on a device."""
        generator = torch.Generator(device).manual_seed(seed)
        words = torch.empty(-(-POOL // 4), dtype=torch.int64, device=device)
        words.random_(-(1 << 63), None, generator=generator)  # all 64 bits: four numbers at the price of one
        once = words.view(torch.int16)[:POOL].to(torch.int32).bitwise_and_(0xFFFF)
        size = POOL + chunk_elements(device) + 3 * _BETWEEN  # so that none that starts within the pool runs out of it
        return once.repeat(-(-size // POOL))[:size]

    def take(self, stream: str, start: int, count: int) -> Tensor:
        """Numbers ``start`` to ``start + count`` of the stream, at most `chunk_elements` of them. Not to be changed."""
        if stream not in self._places:
            self._places[stream] = mix(self._seed, stream)
        first = (self._places[stream] + start) % POOL
        return self._pool[first : first + count]

    def take_rows(self, start: int, rows: int, count: int) -> Tensor:
        """Numbers ``start`` to ``start + count`` of so many streams (rows × count), of four at most.

        They are one stream, each row further on than the one before.
        """
        first = (self._seed + start) % POOL
        return self._pool.as_strided((rows, count), (_BETWEEN, 1), first)


def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 ``value`` in place to a number that bf16 holds: up with the probability that keeps its mean.

    E[result] = value, so an update smaller than half a bf16 ulp is not lost but made with its probability. bf16 is the
    upper half of fp32: adding 16 uniform bits to the lower half carries into the upper one with just that probability.
    Infinities stay what they are; of NaN that is not promised.
    """
    value.view(torch.int32).add_(bits).bitwise_and_(-65536)
    return value


@dataclass(frozen=True)
class Step:
    """One update of one parameter, or of the elements from ``start`` on of the flattened parameter.

    ``count`` is 1 at the first update; ``lr`` the group's learning rate. ``seed`` is the parameter's, the same at every
    update; ``phase`` in [0, 1) its place among those that share its rule. ``bits`` are None where rounding is to
    nearest. ``ok``: a scalar, whether the results may be kept; None means yes, and is the rule on a CPU. On other
    devices nobody waits to see it: `store` looks at it there. ``failures`` gathers such scalars, one for each
    decomposition, true if it failed. ``shard``: of which part of the tensor this is the update; None means of all.
    """

    count: int
    lr: float = 0.0
    seed: int = 0
    phase: float = 0.0
    start: int = 0
    bits: RandomBits | None = None
    ok: Tensor | None = None
    failures: list[Tensor] = field(default_factory=list)
    shard: Shard | None = None

    def at(self, start: int) -> "Step":
        """The same update of the elements from ``start`` on, counted from where this one starts."""
        if start == 0:
            return self
        return Step(
            self.count, self.lr, self.seed, self.phase, self.start + start, self.bits, self.ok, self.failures,
            self.shard,
        )  # fmt: skip  # dataclasses.replace takes five times as long

    def placed(self) -> "Step":
        """The same, counted from where the part at hand begins in the whole tensor."""
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
        """Of the whole tensor, of which ``part`` is at hand."""
        return part.shape if self.shard is None else self.shard.shape

    def store(self, target: Tensor, value: Tensor, stream: str = "") -> None:
        """``target`` takes ``value``, of its shape, if ``ok``; ``value`` may be overwritten.

        An fp32 value for a bf16 target is rounded stochastically with the bits of ``stream``, to nearest without one.
        """
        if value is target:  # arithmetic was done in place
            return
        if self.bits is None or not stream or target.dtype != torch.bfloat16 or value.dtype != torch.float32:
            self._keep(target, value)
            return
        kept, given = target.view(-1), value.reshape(-1)
        for begin, end in pieces(kept.numel(), chunk_elements(target.device)):
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
        return tensor if dtype == tensor.dtype and self.ok is None else tensor.to(dtype, copy=True)

    def _keep(self, target: Tensor, value: Tensor) -> None:
        target.copy_(value if self.ok is None else torch.where(self.ok, value.to(target.dtype), target))

    def only_if(self, condition: Tensor) -> "Step":
        """The same update, whose results are kept if ``condition``, a scalar, holds as well."""
        if known_true(condition):
            return self
        return replace(self, ok=condition if self.ok is None else condition & self.ok)


def gradient_norm(grad: Tensor) -> Tensor:
    """‖G‖ in fp32, a scalar, without the fp32 copy that torch makes of a bf16 tensor on a CPU."""
    if grad.dtype == torch.float32 or not grad.is_contiguous():
        return torch.as_tensor(torch.linalg.vector_norm(grad, dtype=torch.float32))
    flat, size = grad.view(-1), chunk_elements(grad.device)
    norms = torch.stack(
        [torch.linalg.vector_norm(flat[start:stop], dtype=torch.float32) for start, stop in pieces(flat.numel(), size)]
    )
    return torch.as_tensor(torch.linalg.vector_norm(norms))


def can_look(tensor: Tensor) -> bool:
    """Whether a value can be looked at without waiting for a device (fake and meta tensors have none)."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def known_true(condition: Tensor) -> bool:
    """Whether a scalar is true and can be looked at."""
    return can_look(condition) and bool(condition)


def mix(*parts: int | str) -> int:
    """A 63-bit seed from several small values, without the collisions of sums."""
    digest = hashlib.blake2b(".".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
