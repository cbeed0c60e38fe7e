"""Stochastic rounding of fp32 numbers to bf16: its random bits, their seeds, and the rounding itself."""

import hashlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from galore_pretrain.tensors.chunks import chunk_elements

PERIOD = 524_287
"""Number of random numbers after which a stream repeats: a prime, so that no row of a matrix gets another's bits."""
_UPDATES_PER_TABLE = 64
_TABLES_KEPT = 2
_NUMBERS_PER_WORD = 4  # 16 of the 64 bits of a word each
_ROWS_TOGETHER = 4  # streams that `take_rows` reads at most
_ROW_OFFSET = 65_537  # between the starts of streams that are read together


# The noise table. Random bits for each element would cost more than the rest of an update, so they are drawn once into
# a table of PERIOD numbers, and every stream reads consecutive numbers of it. Where a stream starts depends on the
# parameter, the update and the stream's name, and is as good as random: the seeds that say so are hashes. Element i of
# a stream gets number (offset + i) mod PERIOD. Elements half a million apart get the same bits; each is still rounded
# without bias, and that is all that an update needs.
#
# A read is a view, never a copy: the table goes on behind its period, from its beginning again, as far as the longest
# read can reach (a chunk of `chunk_elements`, or the four rows of `take_rows`, _ROW_OFFSET apart).
class RandomBits:
    """Gives streams of uniform 16-bit integers for one update of one parameter.

    All streams read one table, each from an offset of its own that changes with every update (``seed``). ``table``
    returns it: kernels that make random bits of their own, from `seed_of`, need none.
    """

    def __init__(self, table: Callable[[], Tensor], seed: int) -> None:
        self._table = table
        self._seed = seed
        self._seeds: dict[str, int] = {}  # of the streams, which also say where they start in the table

    @staticmethod
    def table(seed: int, device: torch.device) -> Tensor:
        """Return what streams read from: int32 in [0, 2¹⁶), the same for equal seeds on a device."""
        generator = torch.Generator(device).manual_seed(seed)
        word_count = -(-PERIOD // _NUMBERS_PER_WORD)
        words = torch.empty(word_count, dtype=torch.int64, device=device)
        # From the least int64 on and without an upper end: all 64 bits are random, four numbers at the price of one.
        words.random_(-(1 << 63), None, generator=generator)
        signed = words.view(torch.int16)[:PERIOD]
        numbers = signed.to(torch.int32).bitwise_and_(0xFFFF)
        longest_read = chunk_elements(device) + (_ROWS_TOGETHER - 1) * _ROW_OFFSET
        size = PERIOD + longest_read
        repeats = -(-size // PERIOD)
        return numbers.repeat(repeats)[:size]

    def take(self, stream: str, start: int, count: int) -> Tensor:
        """Return a view of the numbers ``start`` to ``start + count`` of the stream; ``count`` is a chunk at most."""
        first = (self.seed_of(stream) + start) % PERIOD
        return self._table()[first : first + count]

    def seed_of(self, stream: str) -> int:
        """Return the 63-bit seed of a stream, from which a kernel makes random bits."""
        if stream not in self._seeds:
            self._seeds[stream] = derive_seed(self._seed, stream)
        return self._seeds[stream]

    def take_rows(self, start: int, rows: int, count: int) -> Tensor:
        """Return a view of the numbers ``start`` to ``start + count`` of each of at most four streams: rows × count.

        They are one stream, and each row starts `_ROW_OFFSET` numbers after the one before.
        """
        first = (self._seed + start) % PERIOD
        return self._table().as_strided((rows, count), (_ROW_OFFSET, 1), first)


class NoiseTables:
    """Keeps the tables that `RandomBits` of a seed read from, a new one for every 64 updates.

    Each update reads its table from offsets of its own. Two tables are kept, for parameters that are not updated every
    time.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._tables: dict[tuple[torch.device, int], Tensor] = {}  # the oldest first

    def bits(self, index: int, count: int, device: torch.device) -> RandomBits:
        """Return the streams of parameter ``index`` at update ``count``."""
        table = partial(self._table, device, count // _UPDATES_PER_TABLE)
        return RandomBits(table, derive_seed(self._seed, index, count))

    def _table(self, device: torch.device, table_index: int) -> Tensor:
        """Return a table on a device, made when it is first read from."""
        key = (device, table_index)
        if key not in self._tables:
            if len(self._tables) >= _TABLES_KEPT:
                oldest = next(iter(self._tables))
                del self._tables[oldest]
            table_seed = derive_seed(self._seed, table_index)
            self._tables[key] = RandomBits.table(table_seed, device)
        return self._tables[key]


# bf16 is the upper half of fp32. The lower half, 16 bits, says how far the value is from the bf16 number below to the
# one above: f / 2¹⁶ of the way. A uniform number u of 16 bits added to it carries into the upper half if u ≥ 2¹⁶ - f,
# so with the probability f / 2¹⁶, and then the lower half is cleared. Sign and magnitude are apart in a float, so this
# rounds negative numbers likewise; a carry out of the mantissa goes into the exponent, which is the next number, too.
def round_stochastic(value: Tensor, bits: Tensor) -> Tensor:
    """Round fp32 ``value`` in place to a number that bf16 holds: up with the probability that keeps its mean.

    E[result] = value, so an update smaller than half a bf16 ulp is not lost but made with its probability. ``bits``
    are int32 in [0, 2¹⁶), shaped as ``value``. Infinities stay what they are; of NaN that is not promised.
    """
    integers = value.view(torch.int32)
    integers.add_(bits).bitwise_and_(-65536)  # 0xFFFF0000 as an int32
    return value


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed made from several small values, without the collisions that their sum would have."""
    text = ".".join(map(str, parts))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
