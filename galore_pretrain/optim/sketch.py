"""Random projections that are never stored: every entry is computed from its place whenever it is wanted."""

import math
from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor

from galore_pretrain.tensors.capability import runs_on
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.draws import INCREMENT, MULTIPLIERS, gaussian_
from galore_pretrain.tensors.rounding import derive_seed

_LEVELS = 1 << 16  # values that an entry can have, one for each number of 16 bits
_ENTRIES_PER_WORD = 4  # 16 of the 64 bits of a word each
_NUMBERS_PER_WORD = 12  # of 4 bytes: a word, its shifted copy, four levels and four entries
_WORDS_PER_ROW = 1 << 20  # more than any rank has, so that a word's number does not depend on the rank

_SHIFTS = (30, 27, 31)  # of SplitMix64

_tables: dict[tuple[torch.device, torch.dtype, int], Tensor] = {}


# A generator's stream differs between kinds of devices, and has to be drawn from its beginning. A hash of an entry's
# place does not and need not. Word w of row i has the number i · 2²⁰ + w, and is what SplitMix64 returns at that number
# when it starts from the hash of seed and draw. It gives four neighbouring entries 16 bits each, which choose one of
# 65,536 quantiles of the normal distribution. A device only adds, multiplies, shifts and looks up, all of it exact, so
# that all devices agree to the bit. Where no kernel does all of it, a block of rows is made at a time, for its words to
# stay in a cache.
def gaussian(
    start: int,
    stop: int,
    rank: int,
    *,
    seed: int,
    draw: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the rows ``start:stop`` of an m × r matrix of random entries, normal with mean 0 and variance 1/r.

    r is ``rank``. But for the factor 1/√r, an entry depends on (``seed``, ``draw``, row, column) alone, so rows are the
    same bits on every device, wherever the matrix is cut. No entry is larger than 4.4/√r. In bf16, entries are those of
    fp32, rounded to nearest.
    """
    rows = stop - start
    matrix = torch.empty(rows, rank, dtype=dtype, device=device)
    table = _table_for(matrix, rank)
    key = derive_seed(seed, draw)
    if runs_on(device):
        gaussian_(matrix, table, start, key)
        return matrix
    words_per_row = -(-rank // _ENTRIES_PER_WORD)
    word_numbers = torch.arange(words_per_row, device=device)
    block_rows = max(1, chunk_elements(device) // (words_per_row * _NUMBERS_PER_WORD))
    for first, last in chunks(matrix, rows, block_rows):
        row_numbers = torch.arange(start + first, start + last, device=device)
        numbers = row_numbers[:, None] * _WORDS_PER_ROW + word_numbers
        words = _hashed(numbers, key)
        levels = words.view(torch.int16).to(torch.int32)
        levels.add_(_LEVELS // 2)
        entries = table.index_select(0, levels.view(-1))
        matrix[first:last] = entries.view(levels.shape)[:, :rank]
    return matrix


# int64 multiplication drops what overflows, as that of unsigned integers does. Its right shift copies the sign, so
# the bits that came in from the left are masked out.
def _hashed(numbers: Tensor, key: int) -> Tensor:
    """Return SplitMix64's outputs at these int64 ``numbers``, started from ``key``; overwrites them."""
    words = numbers.mul_(INCREMENT).add_(key)
    for shift, multiplier in zip(_SHIFTS, (*MULTIPLIERS, 1), strict=True):
        shifted = words >> shift
        shifted.bitwise_and_((1 << 64 - shift) - 1)
        words.bitwise_xor_(shifted)
        if multiplier != 1:
            words.mul_(multiplier)
    return words


# A value stands for an equal share of the distribution, in the middle of which it lies. These have a variance of a
# little less than 1, since the tails are cut off, so all are multiplied by what makes it 1.
@cache
def _quantile_values() -> list[float]:
    """Return the 65,536 values of an entry of variance 1, ascending and symmetric, in fp64."""
    normal = NormalDist()
    half = [normal.inv_cdf((level + 0.5) / _LEVELS) for level in range(_LEVELS // 2)]
    variance = math.fsum(value * value for value in half) / len(half)
    deviation = math.sqrt(variance)
    negative = [value / deviation for value in half]
    positive = [-value for value in reversed(negative)]
    return negative + positive


def _table_for(like: Tensor, rank: int) -> Tensor:
    """Return the values of an entry of variance 1 / ``rank``, in the dtype and on the device of ``like``."""
    if type(like) is not Tensor or like.is_meta:
        # It is not kept: a fake tensor must not outlive its mode. Of one number, since a real table is made but once.
        return torch.empty((), dtype=like.dtype, device=like.device).expand(_LEVELS)
    key = like.device, like.dtype, rank
    if key not in _tables:
        table = torch.tensor(_quantile_values(), dtype=torch.float32, device=like.device)
        _tables[key] = (table * (1 / math.sqrt(rank))).to(like.dtype)
    return _tables[key]
