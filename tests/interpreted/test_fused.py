"""The kernels of an update under Triton's interpreter, against fp64 and against the composed rules."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from galore_pretrain.optim.moments import _code_values
from galore_pretrain.tensors import capability, fused, kernels
from galore_pretrain.tensors.capability import runs_on
from galore_pretrain.tensors.fused import (
    AdamNumbers,
    Moment,
    Noise,
    Update,
    adam_,
    adam_direction,
    add_all_,
    subtract_,
)

DTYPES = (torch.float32, torch.bfloat16)
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


def numbers(count: int = 3, **more: Any) -> AdamNumbers:
    root = 1 / math.sqrt(1 - BETA2**count)
    return AdamNumbers(BETA1, BETA2, 1 / (1 - BETA1**count), root, EPS, **more)


class Seen(TorchDispatchMode):
    """Writes down the names of operations; ``ours`` are those of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.ours: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = func.overloadpacket.__name__
        self.names.append(name)
        if func.namespace == "galore_pretrain":
            self.ours.append(name)
        return func(*args, **(kwargs or {}))


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def adam_in_fp64(w: Tensor, g: Tensor, m: Tensor, v: Tensor, n: AdamNumbers) -> tuple[Tensor, ...]:
    w, g, m, v = (t.double() for t in (w, g, m, v))
    if n.l2:
        g = g + n.decay * w
    else:
        w = w - n.lr * n.decay * w
    m = n.beta1 * m + (1 - n.beta1) * g
    v = n.beta2 * v + (1 - n.beta2) * g**2
    direction = n.factor * m / (v.sqrt() * n.root + n.eps)
    return w - n.lr * direction, m, v, direction


def ulps(value: Tensor, exact: Tensor) -> float:
    """The largest distance from the exact value, in steps of the value's dtype there."""
    bits = {torch.float32: 23, torch.bfloat16: 7}[value.dtype]
    step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=1e-30))) - bits)
    return float(((value.double() - exact).abs() / step).max())


def bounded_by_neighbours(value: Tensor, exact: Tensor) -> bool:
    """Whether each bf16 value is one of the two neighbours of the exact one, but for fp32's own rounding."""
    return ulps(value, exact) <= 1.001


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 255, 1024, 2500])
@pytest.mark.parametrize("more", [{}, {"lr": 0.01, "decay": 0.1}, {"lr": 0.01, "decay": 0.1, "l2": True}])
def test_adam_to_nearest_is_that_of_fp64(dtype: torch.dtype, size: int, more: dict[str, Any]) -> None:
    w, g, m = (drawn(size, dtype=dtype, seed=seed) for seed in range(3))
    v = drawn(size, dtype=dtype, seed=3).square()
    expected = adam_in_fp64(w, g, m, v, numbers(**more))
    got = [t.clone() for t in (w, m, v)]
    adam_(got[0], g, Moment(got[1]), Moment(got[2]), numbers(**more), Noise(), None)
    for value, exact in zip(got, expected[:3], strict=True):
        # Where terms cancel, fp32's own error is more than an ulp of what is left.
        apart = (value.double() - exact).abs()
        unit = 2.0 ** (-23 if dtype == torch.float32 else -8)
        assert bool((apart <= unit * exact.abs() + 1e-6 * (1 + expected[3].abs())).all())
    moments = [m.clone(), v.clone()]
    direction = adam_direction(g, *map(Moment, moments), numbers(), Noise())
    _, _, square, exact = adam_in_fp64(w, g, m, v, numbers())
    assert direction.dtype == dtype
    terms = numbers().factor * (BETA1 * m.double().abs() + (1 - BETA1) * g.double().abs())
    unit = 2e-6 if dtype == torch.float32 else 2**-8  # of what is summed: it may cancel
    assert bool(((direction.double() - exact).abs() <= unit * terms / (square.sqrt() * numbers().root + EPS)).all())


def test_bf16_results_are_neighbours_and_right_on_average() -> None:
    size, rounds = 64, 400
    w, g, m = (drawn(size, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    v = drawn(size, dtype=torch.bfloat16, seed=3).square()
    n = numbers(lr=0.003, decay=0.1)
    expected = adam_in_fp64(w, g, m, v, n)[:3]
    copies = [t.repeat(rounds) for t in (w, m, v)]
    adam_(copies[0], g.repeat(rounds), Moment(copies[1]), Moment(copies[2]), n, Noise(17, 5), None)
    for value, exact in zip(copies, expected, strict=True):
        assert bounded_by_neighbours(value, exact.repeat(rounds))
        error = (value.double().view(rounds, size).mean(0) - exact).abs()
        # That of rounding to one of two neighbours: a sample has none of an event that is too rare for it.
        step = torch.exp2(torch.floor(torch.log2(exact.abs())) - 7)
        share = (exact / step).frac().abs()
        standard_error = step * (share * (1 - share) / rounds).sqrt()
        assert bool((error <= 6 * standard_error + 1e-2 * step).all())
    # Weight and moments do not round alike, and another seed rounds otherwise.
    ups = [(value.double() > exact.repeat(rounds)) for value, exact in zip(copies, expected, strict=True)]
    assert 0.2 < float((ups[0] ^ ups[1]).double().mean()) < 0.8
    again = [t.repeat(rounds) for t in (w, m, v)]
    adam_(again[0], g.repeat(rounds), Moment(again[1]), Moment(again[2]), n, Noise(18, 5), None)
    assert not torch.equal(again[0], copies[0])


def test_random_bits_belong_to_places() -> None:
    """A tensor in two parts comes to the bits of the whole, wherever it is cut."""
    w, g, m = (drawn(1500, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    v = m.float().square().bfloat16()
    n = numbers(lr=0.01)
    whole = [t.clone() for t in (w, m, v)]
    adam_(whole[0], g, Moment(whole[1]), Moment(whole[2]), n, Noise(3, 11), None)
    parts = [t.clone() for t in (w, m, v)]
    for start, stop in ((0, 333), (333, 1500)):
        cut = [t[start:stop] for t in parts]
        adam_(cut[0], g[start:stop], Moment(cut[1]), Moment(cut[2]), n, Noise(3, 11 + start), None)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("valid", [True, False])
def test_what_is_not_valid_changes_nothing(valid: bool) -> None:
    flag = torch.tensor(valid)
    w, g, m = (drawn(300, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    v = m.float().square().bfloat16()
    g[7] = torch.nan
    got = [t.clone() for t in (w, m, v)]
    adam_(got[0], g, Moment(got[1]), Moment(got[2]), numbers(lr=0.1), Noise(3), flag)
    assert torch.equal(got[0], w) is not valid
    assert torch.equal(got[1], m) is not valid
    assert bool(got[0].isnan()[7]) is valid
    assert int(got[0].isnan().sum()) == int(valid)
    matrix = drawn(20, 15, dtype=torch.bfloat16)
    target = matrix.clone()
    subtract_(target, Update(dense=drawn(20, 15), dense_rate=0.1), 0.0, True, Noise(3), flag)
    assert torch.equal(target, matrix) is not valid
    of_m, of_v = eight_bit(m.float(), signed=True), eight_bit(v.float(), signed=False)
    before = [t.clone() for t in (*of_m.written(), *of_v.written())]
    adam_(target.view(-1), drawn(300), of_m, of_v, numbers(lr=0.1), Noise(3), flag)
    assert all(map(torch.equal, before, (*of_m.written(), *of_v.written()))) is not valid


def test_infinities_and_nan_stay() -> None:
    w = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0], dtype=torch.bfloat16).repeat(40)
    target = w.view(16, 10).clone()
    subtract_(target, Update(dense=torch.zeros(16, 10), dense_rate=1.0), 0.0, True, Noise(3), None)
    assert torch.equal(target.view(-1).isnan(), w.isnan())
    assert torch.equal(target.view(-1).nan_to_num(), w.nan_to_num())


def direction_in_fp64(update: Update) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    if update.left is not None and update.right is not None:
        total = total + update.product_rate * (update.left.double() @ update.right.double())
    if update.dense is not None:
        term = update.dense.double()
        if update.row is not None:
            term = term * update.row.double()[:, None]
        if update.column is not None:
            term = term * update.column.double()
        total = total + update.dense_rate * term
    return total


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay_first", [True, False])
@pytest.mark.parametrize("terms", ["product", "dense", "scaled", "both"])
def test_an_update_is_subtracted(dtype: torch.dtype, decay_first: bool, terms: str) -> None:
    rows, columns, rank = 70, 133, 40
    weight = drawn(rows, columns, dtype=dtype)
    left = drawn(rank, rows, dtype=dtype, seed=1).T  # not contiguous
    right = drawn(rank, columns, dtype=dtype, seed=2)
    dense = drawn(rows, columns, dtype=dtype, seed=3)
    row, column = drawn(rows, seed=4).square(), drawn(columns, seed=5).square()
    update = {
        "product": Update(left, right, 0.01),
        "dense": Update(dense=dense, dense_rate=0.02),
        "scaled": Update(dense=dense, row=row, column=column, dense_rate=0.02),
        "both": Update(left, right, 0.01, dense, None, column, 0.02),
    }[terms]
    exact = direction_in_fp64(update)
    kept = 0.9 * weight.double() - exact if decay_first else 0.9 * (weight.double() - exact)
    target = weight.clone()
    subtract_(target, update, 0.1, decay_first, Noise(), None)
    unit = 2.0 ** (-23 if dtype == torch.float32 else -8)
    assert bool(((target.double() - kept).abs() <= unit * kept.abs() + 1e-6).all())
    if dtype == torch.bfloat16:
        target = weight.clone()
        subtract_(target, update, 0.1, decay_first, Noise(5, 3), None)
        assert bool(((target.double() - kept).abs() <= 2**-7 * kept.abs() + 1e-6).all())
        part = weight.clone()
        cut = Update(
            None if update.left is None else update.left[30:],
            update.right,
            update.product_rate,
            None if update.dense is None else update.dense[30:],
            None if update.row is None else update.row[30:],
            update.column,
            update.dense_rate,
        )
        subtract_(part[30:], cut, 0.1, decay_first, Noise(5, 3 + 30 * columns), None)
        assert torch.equal(part[30:], target[30:])


def eight_bit(values: Tensor, *, signed: bool) -> Moment:
    code = torch.tensor(_code_values(signed=signed))
    padded = torch.nn.functional.pad(values.float(), (0, -len(values) % 256)).view(-1, 256)
    scales = padded.abs().amax(1)
    divisor = torch.where(scales > 0, scales, 1.0)
    middles = (code[1:] + code[:-1]) / 2
    indices = torch.bucketize(padded / divisor[:, None], middles)
    return Moment(indices.view(-1)[: len(values)].to(torch.uint8), scales, code)


def read(moment: Moment) -> Tensor:
    scales = moment.scales.repeat_interleave(256)[: len(moment.values)]
    return moment.code[moment.values.long()] * scales


@pytest.mark.parametrize("size", [256, 1380, 3000])
def test_moments_of_8_bits_are_the_nearest_codes(size: int) -> None:
    spread = drawn(size, seed=9).abs() ** 4
    m, v = eight_bit(drawn(size) * spread, signed=True), eight_bit(spread**2, signed=False)
    m.values[: min(256, size - 1)] = int((m.code == 0).nonzero())  # a block of zeros
    m.scales[0] = 0.0
    w, g = drawn(size, seed=2), drawn(size, seed=3)
    g[:256] = 0.0
    n = numbers(lr=0.01, decay=0.1)
    exact = adam_in_fp64(w, g, read(m), read(v), n)
    expected_m, expected_v = (eight_bit(x.float(), signed=s) for x, s in ((exact[1], True), (exact[2], False)))
    got_m, got_v = (Moment(x.values.clone(), x.scales.clone(), x.code) for x in (m, v))
    target = w.clone()
    adam_(target, g, got_m, got_v, n, Noise(), None)
    assert torch.allclose(target.double(), exact[0], rtol=0, atol=2e-6)
    for got, expected in ((got_m, expected_m), (got_v, expected_v)):
        assert torch.allclose(got.scales, expected.scales, rtol=1e-6)
        apart = (got.values.int() - expected.values.int()).abs()
        assert int(apart.max()) <= 1
        assert float((apart > 0).double().mean()) < 0.002  # a middle that fp32 rounds to the other side
    direction = adam_direction(g, m, v, numbers(), Noise())
    assert torch.allclose(direction.double(), exact[3], rtol=2e-5, atol=1e-6)
    assert torch.equal(m.values, got_m.values)
    assert torch.equal(v.scales, got_v.scales)


def test_the_codes_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    size = 2048
    m, v = torch.zeros(size), torch.zeros(size)
    ours_m, ours_v = eight_bit(m, signed=True), eight_bit(v, signed=False)
    g = drawn(size)  # not so steep that its CPU's quantizer errs: docs/benchmarks/gpu.md
    adam_direction(g, ours_m, ours_v, numbers(1), Noise())
    for ours, exact in ((ours_m, 0.1 * g), (ours_v, 0.001 * g**2)):
        theirs, how = functional.quantize_blockwise(exact, code=ours.code, blocksize=256)
        assert torch.allclose(ours.scales, how.absmax, rtol=1e-5)
        apart = (ours.values.int() - theirs.int()).abs()
        near_zero = exact.abs() < 1e-4 * how.absmax.repeat_interleave(256)
        assert int(apart[~near_zero].max()) <= 1
        assert float((apart[~near_zero] > 0).double().mean()) < 0.03  # theirs is not always the nearest either


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_many_sums_are_one_launch(dtype: torch.dtype, count: int) -> None:
    sizes = (5, 5000, 0, 2048, 1, 300, 2049, 17, 4096)[:count]
    sums = [drawn(size, dtype=dtype, seed=size) for size in sizes]
    parts = [drawn(size, dtype=torch.bfloat16, seed=size + 1) for size in sizes]
    exact = [a.double() + b.double() for a, b in zip(sums, parts, strict=True)]
    rounded = [total.clone() for total in sums]
    add_all_(sums, parts, [-1] * count)
    unit = 2.0 ** (-23 if dtype == torch.float32 else -8)
    for total, expected in zip(sums, exact, strict=True):
        assert bool(((total.double() - expected).abs() <= unit * expected.abs() + 1e-7).all())
    add_all_(rounded, parts, list(range(count)))
    for total, expected in zip(rounded, exact, strict=True):
        assert bool(((total.double() - expected).abs() <= 2 * unit * expected.abs() + 1e-7).all())


def test_a_plan_sees_each_as_one_operation() -> None:
    with FakeTensorMode(), Seen() as seen:
        w, g, m, v = (torch.empty(2048, dtype=torch.bfloat16) for _ in range(4))
        adam_(w, g, Moment(m), Moment(v), numbers(), Noise(3), torch.empty((), dtype=torch.bool))
        assert adam_direction(g, Moment(m), Moment(v), numbers(), Noise(3)).shape == g.shape
        matrix = torch.empty(20, 10)
        subtract_(matrix, Update(torch.empty(20, 3), torch.empty(3, 10), 0.1), 0.0, True, Noise(), None)
        add_all_([w], [g], [1])
        byte, scale, code = torch.empty(2048, dtype=torch.uint8), torch.empty(8), torch.empty(256)
        moment = Moment(byte, scale, code)
        assert adam_direction(g, moment, moment, numbers(), Noise()).dtype == torch.bfloat16
    assert seen.ours == ["adam_", "adam_direction", "subtract_", "add_all_", "adam_direction"]
    # That of an update makes a place for its result, and tensors are made here.
    assert {name for name in seen.names if name not in seen.ours} <= {"empty", "empty_like"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_trial_is_the_same_whatever_its_caller_has_set(dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert capability.small_updates_are_right(torch.device("cpu"))
    finally:
        torch.set_default_dtype(before)


def test_sums_are_found_whatever_device_is_the_default() -> None:
    total, part = torch.ones(5), torch.ones(5)
    with torch.device("meta"):
        add_all_([total], [part], [-1])
    assert torch.equal(total, torch.full((5,), 2.0))


@pytest.mark.parametrize("shape", [(5_000_000, 3), (3, 9_000_000)])
def test_a_launch_has_as_many_programs_as_a_matrix_has_tiles(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid has 2³¹ programs in its first dimension, and 65,535 in any other."""
    grids: list[tuple[int, ...]] = []

    class Launched:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *arguments, **options: None

    monkeypatch.setattr(kernels, "subtract", Launched())
    weight = torch.empty(shape, device="meta")
    fused._launch_subtract(weight, (None, None, weight, None, None), None, [0.0, 1.0, 1.0], True, -1, 0)
    assert grids == [(math.ceil(shape[0] / 64) * math.ceil(shape[1] / 128),)]


def test_the_trial_that_decides_on_a_gpu_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capability.small_updates_are_right(torch.device("cpu"))
    monkeypatch.setattr(capability, "add_all_", lambda sums, parts, seeds: None)  # rounds nothing up
    assert not capability.small_updates_are_right(torch.device("cpu"))
    monkeypatch.undo()
    for operation in ("subtract_", "subtract_codes_"):
        monkeypatch.setattr(capability, operation, lambda *arguments, **options: None)
        assert not capability.small_updates_are_right(torch.device("cpu"))
        monkeypatch.undo()


def test_kernels_run_where_triton_does() -> None:
    assert runs_on(torch.device("cpu"))
    assert runs_on(torch.device("cuda"))  # of which a plan may be made here
    assert not runs_on(torch.device("meta"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_is_stored_rounded(dtype: torch.dtype) -> None:
    value = drawn(700)
    target = torch.zeros(700, dtype=dtype)
    fused.store_(target, value, Noise(), None)
    assert torch.equal(target, value.to(dtype))
    fused.store_(target, -value, Noise(3), torch.tensor(False))
    assert torch.equal(target, value.to(dtype))
    value = value[:70]
    many = torch.zeros(400, 70, dtype=dtype)
    fused.store_(many, value.expand(400, 70).contiguous(), Noise(3, 9), torch.tensor(True))
    if dtype == torch.float32:
        assert torch.equal(many[5], value)
    else:
        assert bounded_by_neighbours(many[7], value.double())
        error = (many.double().mean(0) - value).abs()
        # A rounding up or down has a deviation of half a step at most, and there are 400: six standard errors.
        assert bool((error <= 6 * 0.5 / 20 * 2**-7 * value.abs()).all())
    assert not capability.kernels_take(target[:70].double(), value)
    assert not capability.kernels_take(torch.zeros(70, 2, dtype=dtype)[:, 0], value)
