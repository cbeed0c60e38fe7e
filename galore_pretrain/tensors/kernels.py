"""Triton kernels of an update and of a loss: each reads and writes its tensors once. `fused` makes operations of them.

All arithmetic is in fp32. Seeds change with every update: Triton must not compile a kernel anew for what divides them,
so they are not specialized. A bf16 result is rounded stochastically, with 16 random bits by Philox (Salmon et al. 2011)
from a seed and the element's place: the same bits however a tensor is cut into programs, and on every device.
"""

import triton
import triton.language as tl

from galore_pretrain.tensors.draws import INCREMENT, MULTIPLIERS

BLOCK = tl.constexpr(256)  # elements that share a scale of 8-bit moments
_INCREMENT = tl.constexpr(INCREMENT)
_FIRST = tl.constexpr(MULTIPLIERS[0])
_SECOND = tl.constexpr(MULTIPLIERS[1])


# bf16 is the upper half of fp32. A number of 16 bits that is added to the lower half carries into the upper one: a
# uniform one with the probability that keeps the mean (see `round_stochastic`); half a unit, less the half's last bit
# where that is even, as rounding to nearest wants it. A NaN must not carry: it could become a number.
@triton.jit
def _rounded(x, noise, STOCHASTIC: tl.constexpr):
    """Round fp32 ``x`` to a number that bf16 holds, by the low 16 bits of ``noise`` or to nearest."""
    bits = x.to(tl.int32, bitcast=True)
    if STOCHASTIC:
        carry = noise.to(tl.int32, bitcast=True) & 0xFFFF
    else:
        carry = 0x7FFF + ((bits >> 16) & 1)
    rounded = (bits + carry) & -65536
    is_nan = x != x  # noqa: PLR0124
    return tl.where(is_nan, x, rounded.to(tl.float32, bitcast=True))


@triton.jit
def _store(at, x, inside, noise, STOCHASTIC: tl.constexpr):
    """Store fp32 ``x`` in the dtype of the tensor that ``at`` points into."""
    if at.dtype.element_ty == tl.bfloat16:
        x = _rounded(x, noise, STOCHASTIC)
    tl.store(at, x.to(at.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["seed", "start"])
def store(target, value, valid, n, start, seed, HAS_VALID: tl.constexpr, STOCHASTIC: tl.constexpr, SIZE: tl.constexpr):
    """Copy a flat tensor to another, rounded to its dtype."""
    if HAS_VALID:
        n = tl.where(tl.load(valid) != 0, n, 0)
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < n
    x = tl.load(value + place, mask=inside, other=0.0).to(tl.float32)
    noise, _, _, _ = tl.randint4x(seed, start + place)
    _store(target + place, x, inside, noise, STOCHASTIC)


# Of the 256 ascending values of a code, the nearest one has the index that a search among the 255 middles finds: eight
# times, the half that holds it.
@triton.jit
def _nearest(x, code):
    """Return the index of the value of ``code`` that is nearest to each of ``x``."""
    index = tl.zeros(x.shape, tl.int32)
    for power in tl.static_range(8):
        candidate = index + (128 >> power)
        middle = (tl.load(code + candidate - 1) + tl.load(code + candidate)) * 0.5
        index = tl.where(x > middle, candidate, index)
    return index


# A moment of 8 bits is the value of each byte times the scale of its block; a dense one is what is there.
@triton.jit
def _read(moment, scales, code, place, inside, block, has_block, EIGHT_BIT: tl.constexpr):
    """Return a moment (blocks × 256) in fp32."""
    if EIGHT_BIT:
        index = tl.load(moment + place, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + block, mask=has_block, other=0.0)
        value = tl.load(code + index) * scale[:, None]
    else:
        value = tl.load(moment + place, mask=inside, other=0.0).to(tl.float32)
    return value


# In 8 bits, the largest magnitude of each block becomes its scale, and each value the nearest byte.
@triton.jit
def _write(
    value,
    moment,
    scales,
    code,
    place,
    inside,
    block,
    has_block,
    noise,
    EIGHT_BIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Write a moment (blocks × 256), which `_read` reads."""
    if EIGHT_BIT:
        scale = tl.max(tl.where(inside, tl.abs(value), 0.0), axis=1)
        divisor = tl.where(scale > 0, scale, 1.0)
        index = _nearest(value / divisor[:, None], code)
        tl.store(moment + place, index.to(tl.uint8), mask=inside)
        tl.store(scales + block, scale, mask=has_block)
    else:
        _store(moment + place, value, inside, noise, STOCHASTIC)


# One program has BLOCKS blocks of 256 elements of flat tensors; in 8 bits, a block has a scale a moment. There is a
# weight, which takes the direction times the rate and its decay, or else the direction is written out.
@triton.jit(do_not_specialize=["seed", "start"])
def adam(
    weight,
    grad,
    m_at,
    m_scales,
    m_code,
    v_at,
    v_scales,
    v_code,
    direction,
    valid,
    n,
    start,
    seed,
    beta1,
    rest1,
    beta2,
    rest2,
    factor,
    root,
    eps,
    lr,
    decay,
    HAS_WEIGHT: tl.constexpr,
    HAS_VALID: tl.constexpr,
    EIGHT_BIT: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    L2: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Advance both moments by a gradient, and update the weight or write the direction."""
    if HAS_VALID:
        n = tl.where(tl.load(valid) != 0, n, 0)
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    has_block = block * BLOCK < n
    place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = place < n
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    m = _read(m_at, m_scales, m_code, place, inside, block, has_block, EIGHT_BIT)
    v = _read(v_at, v_scales, v_code, place, inside, block, has_block, EIGHT_BIT)
    if HAS_WEIGHT:
        w = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
        if L2:
            g += decay * w
        else:
            w -= lr * decay * w
    # Algorithm 1 of Adam's paper (arXiv 1412.6980), with what is left of its bias corrections in two numbers. The
    # formula of torch has root = 1 / √(1 − β₂ᵗ) and factor = 1 / (1 − β₁ᵗ); see `Adam._composed` for transformers'.
    # 1 − β comes as a number of its own, since fp32 would make 1.3 · 10⁻⁵ too much of 1 − 0.999.
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    update = factor * m / (tl.sqrt(v) * root + eps)
    of_weight, of_m, of_v, _ = tl.randint4x(seed, start + place)
    _write(m, m_at, m_scales, m_code, place, inside, block, has_block, of_m, EIGHT_BIT, STOCHASTIC)
    _write(v, v_at, v_scales, v_code, place, inside, block, has_block, of_v, EIGHT_BIT, STOCHASTIC)
    if HAS_WEIGHT:
        _store(weight + place, w - lr * update, inside, of_weight, STOCHASTIC)
    else:
        _store(direction + place, update, inside, of_weight, False)


@triton.jit
def _scaled(
    x, row_scales, row, has_row, column_scales, column, has_column, HAS_ROW: tl.constexpr, HAS_COLUMN: tl.constexpr
):
    """Return a tile times the scales of its rows and columns, those that there are."""
    if HAS_ROW:
        x *= tl.load(row_scales + row, mask=has_row, other=0.0)[:, None]
    if HAS_COLUMN:
        x *= tl.load(column_scales + column, mask=has_column, other=0.0)[None, :]
    return x


# A scale changes where the largest step of its group leaves the codes, or wastes more than half of them.
@triton.jit
def _store_codes(at, steps, inside, scale, most, noise):
    """Store steps of a scale a row as codes, rounded stochastically, and return the scales that they have then."""
    fits = ((most <= 127) & (most >= 64)) | (most == 0)
    new_scale = tl.where(fits, scale, _rounded(scale * most / 96, 0, False))
    uniform = ((noise & 0xFFFF).to(tl.float32) + 0.5) * 0.0000152587890625  # 2⁻¹⁶
    code = tl.floor(steps * (scale / new_scale)[:, None] + uniform)
    code = tl.minimum(tl.maximum(code, -127.0), 127.0)
    tl.store(at, code.to(tl.int8), mask=inside)
    return new_scale


# W ← keep · W − U, or the decay last: W ← keep · (W − U), for an update of rows × columns
#
#     U = product_rate · L R + dense_rate · diag(row) · D · diag(column)        L of rows × r, R of r × columns
#
# One program has a tile of W. The product is formed in its registers, so it never is in memory.
#
# A weight of codes has ``groups`` scales a row, each of ``group`` neighbours, a multiple of a tile's columns. It works
# in steps of the scales, as `tensors.coded` describes it, and makes two passes. The first finds the ``largest`` step of
# each group over its tiles; the order of floats that are not negative is that of their bits. The second forms the
# update again, knows whether the scale stays, and writes codes and new scales.
@triton.jit(do_not_specialize=["seed", "start"])
def subtract(
    weight,
    scales,
    new_scales,
    largest,
    left,
    right,
    dense,
    row_scales,
    column_scales,
    valid,
    rows,
    columns,
    group,
    groups,
    rank,
    left_row,
    left_column,
    right_row,
    right_column,
    start,
    seed,
    product_rate,
    dense_rate,
    keep,
    CODED: tl.constexpr,
    WRITES: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    HAS_DENSE: tl.constexpr,
    HAS_ROW: tl.constexpr,
    HAS_COLUMN: tl.constexpr,
    HAS_VALID: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DECAY_FIRST: tl.constexpr,
    IN_FP32: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    TILE_RANK: tl.constexpr,
):
    """Subtract a direction from a weight in place, or only find the largest step of each group of codes after it."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(columns, TILE_COLUMNS)  # of a row
    first_column = program % tiles * TILE_COLUMNS
    row = program // tiles * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = first_column + tl.arange(0, TILE_COLUMNS)
    if HAS_VALID:
        rows = tl.where(tl.load(valid) != 0, rows, 0)
    has_row = row < rows
    has_column = column < columns
    inside = has_row[:, None] & has_column[None, :]
    place = row[:, None] * columns + column[None, :]
    update = tl.zeros((TILE_ROWS, TILE_COLUMNS), tl.float32)
    if HAS_PRODUCT:
        for first in range(0, rank, TILE_RANK):
            inner = first + tl.arange(0, TILE_RANK).to(tl.int64)
            has_inner = inner < rank
            l = tl.load(
                left + row[:, None] * left_row + inner[None, :] * left_column,
                mask=has_row[:, None] & has_inner[None, :],
                other=0.0,
            )
            r = tl.load(
                right + inner[:, None] * right_row + column[None, :] * right_column,
                mask=has_inner[:, None] & has_column[None, :],
                other=0.0,
            )
            if IN_FP32:
                l = l.to(tl.float32)
                r = r.to(tl.float32)
            update = tl.dot(l, r, update, input_precision="ieee")
        update *= product_rate
    if HAS_DENSE:
        term = tl.load(dense + place, mask=inside, other=0.0).to(tl.float32)
        term = _scaled(term, row_scales, row, has_row, column_scales, column, has_column, HAS_ROW, HAS_COLUMN)
        update += dense_rate * term
    w = tl.load(weight + place, mask=inside, other=0).to(tl.float32)
    if CODED:
        of_group = row * groups + first_column // group
        scale = tl.load(scales + of_group, mask=has_row, other=1.0).to(tl.float32)
        update = update / scale[:, None]
    if DECAY_FIRST:
        w = keep * w - update
    else:
        w = keep * (w - update)
    if not WRITES:
        most = tl.max(tl.where(inside, tl.abs(w), 0.0), axis=1)
        tl.atomic_max(largest + of_group, most.to(tl.int32, bitcast=True), mask=has_row)
        return
    noise, _, _, _ = tl.randint4x(seed, start + place)
    if CODED:
        most = tl.load(largest + of_group, mask=has_row, other=0).to(tl.float32, bitcast=True)
        new_scale = _store_codes(weight + place, w, inside, scale, most, noise)
        rows = tl.where(first_column % group == 0, rows, 0)  # the first tile of a group writes its scales
        tl.store(new_scales + of_group, new_scale.to(new_scales.dtype.element_ty), mask=row < rows)
    else:
        _store(weight + place, w, inside, noise, STOCHASTIC)


@triton.jit
def read_codes(matrix, codes, scales, n, columns, group, groups, SIZE: tl.constexpr):
    """Write a matrix of codes, ``groups`` scales a row, each of ``group`` neighbours, in the matrix's dtype."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < n
    code = tl.load(codes + place, mask=inside, other=0).to(tl.float32)
    of_group = place // columns * groups + place % columns // group
    scale = tl.load(scales + of_group, mask=inside, other=0.0).to(tl.float32)
    _store(matrix + place, code * scale, inside, place, False)


# Many tensors are summed by one launch. ``table`` has five numbers a tensor: the addresses of sum and part, the first
# program of the tensor, its elements, and the seed of its random bits. A program finds its tensor by halving, among
# tensors that are padded to a power of two by ones that no program reaches.
@triton.jit
def add_all(
    table,
    SUM: tl.constexpr,
    PART: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    HALVINGS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Add a part to each of many sums in place."""
    program = tl.program_id(0)
    which = 0
    for power in tl.static_range(HALVINGS):
        candidate = which + (1 << (HALVINGS - 1 - power))
        which = tl.where(program >= tl.load(table + 5 * candidate + 2), candidate, which)
    total = tl.load(table + 5 * which).to(tl.pointer_type(SUM))
    part = tl.load(table + 5 * which + 1).to(tl.pointer_type(PART))
    first = tl.load(table + 5 * which + 2)
    n = tl.load(table + 5 * which + 3)
    seed = tl.load(table + 5 * which + 4)
    place = (program - first) * SIZE + tl.arange(0, SIZE)
    inside = place < n
    value = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(part + place, mask=inside, other=0.0).to(tl.float32)
    noise, _, _, _ = tl.randint4x(seed, place)
    _store(total + place, value, inside, noise, STOCHASTIC)


# With p = softmax(x), the cross-entropy of label y is log Σ exp(x) − x[y], and its gradient by x is p − onehot(y). One
# program has a row, which it reads by pieces: from memory, for the sum, which is scaled to the largest value so far;
# and, for the gradient, from the cache, where the row still is. A row in registers would be read once, but 32,000
# logits do not fit there. The least finite number stands for the largest of none, so that a piece of −inf alone comes
# to 0. What is not finite makes loss and gradient NaN, as it should.
@triton.jit
def cross_entropy(logits, labels, losses, columns, scale, SIZE: tl.constexpr):
    """Write the cross-entropy of each row, and ``scale`` times its gradient over the logits; of labels below 0, 0."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    is_counted = (label >= 0).to(tl.float32)
    logits += row * columns
    label = tl.maximum(label, 0)
    target = tl.load(logits + label).to(tl.float32)
    top = tl.full((), -3.4e38, tl.float32)
    total = tl.zeros((), tl.float32)
    for first in range(0, columns, SIZE):
        column = first + tl.arange(0, SIZE)
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher))
        top = higher
    log_sum = top + tl.log(total)
    for first in range(0, columns, SIZE):
        column = first + tl.arange(0, SIZE)
        x = tl.load(logits + column, mask=column < columns, other=float("-inf")).to(tl.float32)
        gradient = (tl.exp(x - log_sum) - (column == label).to(tl.float32)) * (is_counted * scale)
        _store(logits + column, gradient, column < columns, column, False)
    tl.store(losses + row, (log_sum - target) * is_counted)


# Philox makes four numbers from a counter. A program has 4 · SIZE elements, SIZE neighbours of each number, at places
# that do not depend on where ``mask`` begins: element 0 of it has place ``start``.
@triton.jit(do_not_specialize=["seed", "start"])
def dropout_mask(mask, n, start, seed, limit, SIZE: tl.constexpr):
    """Write 1 where the 16 random bits of an element are less than ``limit``, else 0."""
    block = start // (4 * SIZE) + tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SIZE)
    bits = tl.randint4x(seed, block * SIZE + lane)
    for quarter in tl.static_range(4):
        place = (block * 4 + quarter) * SIZE + lane - start
        is_dropped = (bits[quarter] & 0xFFFF).to(tl.int32) < limit
        tl.store(mask + place, is_dropped.to(tl.uint8), mask=(place >= 0) & (place < n))


# SplitMix64, as `optim.sketch` describes it: word w of row i has the number i · 2²⁰ + w, and 16 of its bits say which
# value of the table an entry has. All of it is in int64, whose right shift copies the sign, which is masked out.
@triton.jit(do_not_specialize=["start", "key"])
def gaussian(
    matrix,
    table,
    n,
    columns,
    start,
    key,
    SIZE: tl.constexpr,
):
    """Fill a matrix of ``n`` entries with values of the table that a hash of each entry's place chooses."""
    entry = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = entry < n
    row = start + entry // columns
    column = entry % columns
    word = (row * 1048576 + column // 4) * _INCREMENT + key
    word = (word ^ ((word >> 30) & 0x3FFFFFFFF)) * _FIRST
    word = (word ^ ((word >> 27) & 0x1FFFFFFFFF)) * _SECOND
    word = word ^ ((word >> 31) & 0x1FFFFFFFF)
    level = ((word >> (16 * (column % 4))) & 0xFFFF) ^ 0x8000
    tl.store(matrix + entry, tl.load(table + level, mask=inside), mask=inside)


# An element is (code − zero) · scale, as `tensors.packing` describes it.
@triton.jit
def unpack(matrix, codes, scales, zeros, n, BITS: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr):
    """Write a flat matrix from its codes of 4 or 8 bits, and the scale and zero of each group."""
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = place < n
    byte = tl.load(codes + place * BITS // 8, mask=inside, other=0).to(tl.int32)
    shift = (place * BITS % 8).to(tl.int32)
    code = (byte >> shift) & (2**BITS - 1)
    group = place // GROUP
    zero = tl.load(zeros + group, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
    _store(matrix + place, (code - zero).to(tl.float32) * scale, inside, place, False)


# What it computes is described in `tensors.growth`. One program looks at all channels twice.
@triton.jit(do_not_specialize=["n"])
def channel_factors(
    factors,
    low,
    direction,
    grad,
    last,
    valid,
    n,
    multiple,
    growth,
    share,
    eps,
    HAS_VALID: tl.constexpr,
    CHANNELWISE: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Write the factors of n channels, limited in their growth, and the norm of the update in place of the last one."""
    lane = tl.arange(0, SIZE)
    low_squares = tl.zeros((SIZE,), tl.float32)
    direction_squares = tl.zeros((SIZE,), tl.float32)
    squares = tl.zeros((SIZE,), tl.float32)
    for start in range(0, n, SIZE):
        place = start + lane
        inside = place < n
        low_norm = tl.abs(tl.load(low + place, mask=inside, other=0.0).to(tl.float32))
        direction_norm = tl.abs(tl.load(direction + place, mask=inside, other=0.0).to(tl.float32))
        grad_norm = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        square = grad_norm * grad_norm - share * low_norm * low_norm
        if CHANNELWISE:
            factor = multiple * direction_norm / (low_norm + eps)
            square = tl.where(inside, factor * factor * square, 0.0)
        else:
            low_squares += low_norm * low_norm
            direction_squares += direction_norm * direction_norm
        squares += square
    norm = tl.sqrt(tl.maximum(tl.sum(squares), 0.0))
    whole = 1.0
    if not CHANNELWISE:
        whole = multiple * tl.sqrt(tl.sum(direction_squares)) / (tl.sqrt(tl.sum(low_squares)) + eps)
        norm = whole * norm
    old = tl.load(last)
    allowed = growth * old
    is_too_large = (allowed > 0) & (norm > allowed)
    limit = tl.where(is_too_large, allowed / norm, 1.0)
    kept = norm * limit
    if HAS_VALID:
        kept = tl.where(tl.load(valid) != 0, kept, old)
    for start in range(0, n, SIZE):
        place = start + lane
        inside = place < n
        factor = tl.zeros((SIZE,), tl.float32) + whole
        if CHANNELWISE:
            low_norm = tl.abs(tl.load(low + place, mask=inside, other=0.0).to(tl.float32))
            direction_norm = tl.abs(tl.load(direction + place, mask=inside, other=0.0).to(tl.float32))
            factor = multiple * direction_norm / (low_norm + eps)
        tl.store(factors + place, factor * limit, mask=inside)
    tl.store(last, kept)
