"""Stochastic rounding: random bits, seeds, and how a number is rounded by them."""

import hashlib

import torch
from torch import Tensor

from galore_pretrain.tensors.chunks import chunk_elements

PERIOD = 524_287
"""Random numbers after which a stream repeats: a prime, so that no row of a matrix gets the bits of another."""
_UPDATES_A_TABLE, _TABLES = 64, 2
_BETWEEN = 65_537  # between the offsets of streams that are read together


class RandomBits:
    """Streams of uniform 16-bit integers for one update of one parameter.

    All streams read one table, each from a place of its own that changes with every update, and the table is drawn anew
    now and then: generating bits for each element would cost more than the rest of an update. Elements half a million
    apart get the same bits, which unbiased rounding does not mind.
    """

    def __init__(self, table: Tensor, seed: int) -> None:
        self._table, self._seed = table, seed
        self._offsets: dict[str, int] = {}  # of the streams, in the table

    @staticmethod
    def table(seed: int, device: torch.device) -> Tensor:
        """Return what streams are read from: int32 in [0, 2¹⁶), the same for equal seeds on a device."""
        generator = torch.Generator(device).manual_seed(seed)
        words = torch.empty(-(-PERIOD // 4), dtype=torch.int64, device=device)
        words.random_(-(1 << 63), None, generator=generator)  # all 64 bits: four numbers at the price of one
        once = words.view(torch.int16)[:PERIOD].to(torch.int32).bitwise_and_(0xFFFF)
        size = (
            PERIOD + chunk_elements(device) + 3 * _BETWEEN
        )  # so that none that starts within the period runs out of it
        return once.repeat(-(-size // PERIOD))[:size]

    def take(self, stream: str, start: int, count: int) -> Tensor:
        """Numbers ``start`` to ``start + count`` of the stream, at most `chunk_elements` of them. Not to be changed."""
        if stream not in self._offsets:
            self._offsets[stream] = derive_seed(self._seed, stream)
        first = (self._offsets[stream] + start) % PERIOD
        return self._table[first : first + count]

    def take_rows(self, start: int, rows: int, count: int) -> Tensor:
        """Numbers ``start`` to ``start + count`` of so many streams (rows × count), of four at most.

        They are one stream, each row further on than the one before.
        """
        first = (self._seed + start) % PERIOD
        return self._table.as_strided((rows, count), (_BETWEEN, 1), first)


class NoiseTables:
    """Keeps the tables that `RandomBits` of a seed read from, one for so many updates.

    A table serves 64 updates, each from places of its own. Two are kept, for parameters that are not updated every
    time.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tables: dict[tuple[torch.device, int], Tensor] = {}

    def bits(self, index: int, count: int, device: torch.device) -> RandomBits:
        """Return the streams of parameter ``index`` at update ``count``."""
        key = device, count // _UPDATES_A_TABLE
        if key not in self._tables:
            if len(self._tables) >= _TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[key] = RandomBits.table(derive_seed(self._seed, key[1]), device)
        return RandomBits(self._tables[key], derive_seed(self._seed, index, count))


def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 ``value`` in place to a number that bf16 holds: up with the probability that keeps its mean.

    E[result] = value, so an update smaller than half a bf16 ulp is not lost but made with its probability. bf16 is the
    upper half of fp32: adding 16 uniform bits to the lower half carries into the upper one with just that probability.
    Infinities stay what they are; of NaN that is not promised.
    """
    value.view(torch.int32).add_(bits).bitwise_and_(-65536)
    return value


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from several small values, without the collisions of sums."""
    digest = hashlib.blake2b(".".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
