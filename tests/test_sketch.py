"""Random projections that are never stored: normal, independent, and the same wherever and however they are made."""

import hashlib
import math
from functools import cache

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from galore_pretrain.optim import sketch
from galore_pretrain.optim.sketch import gaussian
from galore_pretrain.tensors.ledger import Ledger

CPU = torch.device("cpu")


def draw(
    rows: int = 2048,
    rank: int = 512,
    *,
    start: int = 0,
    seed: int = 3,
    index: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return gaussian(start, start + rows, rank, seed=seed, draw=index, device=CPU, dtype=dtype)


@cache
def standard(seed: int = 3, index: int = 0) -> Tensor:
    """2048 × 512 entries of variance 1."""
    return draw(seed=seed, index=index) * math.sqrt(512)


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two samples, in standard errors of that of independent ones."""
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).mean() / a.std() / b.std()) * math.sqrt(a.numel())


@pytest.mark.parametrize("seed", [0, 3, 2**62])
def test_entries_have_the_moments_and_tails_of_a_normal_distribution(seed: int) -> None:
    x = standard(seed).double()
    error = 1 / math.sqrt(x.numel())
    assert abs(x.mean()) < 4 * error
    assert abs(x.var() - 1) < 4 * math.sqrt(2) * error
    assert abs((x**3).mean()) < 4 * math.sqrt(15) * error
    assert abs((x**4).mean() - 3) < 4 * math.sqrt(96) * error + 0.01  # tails end at 4.4
    for bound in (-3.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 3.0, 4.0):
        share = float((x > bound).double().mean())
        expected = math.erfc(bound / math.sqrt(2)) / 2
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected)) * error, bound
    assert x.abs().max() < 4.4


def test_every_row_and_every_column_has_mean_0_and_variance_1() -> None:
    x = standard()
    for over, count in ((0, 2048), (1, 512)):
        assert (x.mean(over).abs() * math.sqrt(count)).max() < 4.8
        assert ((x.var(over) - 1).abs() * math.sqrt(count / 2)).max() < 6


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 256])
def test_neighbouring_rows_and_columns_are_not_correlated(lag: int, power: int) -> None:
    """Nor are their squares. Four columns share a word."""
    x = standard() ** power
    assert abs(correlation(x[lag:], x[:-lag])) < 4
    assert abs(correlation(x[:, lag:], x[:, :-lag])) < 4
    assert abs(correlation(x[lag:, lag:], x[:-lag, :-lag])) < 4


@pytest.mark.parametrize("power", [1, 2])
def test_neighbouring_draws_and_seeds_are_not_correlated(power: int) -> None:
    x = standard() ** power
    for other in (standard(index=1), standard(index=2), standard(4), standard(2, 1)):
        assert abs(correlation(x, other**power)) < 4
        assert abs(correlation(x[1:], other[:-1] ** power)) < 4


def test_a_matrix_has_the_singular_values_of_a_gaussian_one() -> None:
    """All singular values lie in √(m/r) ± 1 (Marchenko and Pastur): no entries repeat and no rows depend on others."""
    values = torch.linalg.svdvals(draw(1024, 64).double())
    assert 0.95 * (math.sqrt(1024 / 64) - 1) < values.min()
    assert values.max() < 1.05 * (math.sqrt(1024 / 64) + 1)


def test_lengths_are_kept_in_the_mean() -> None:
    """Johnson and Lindenstrauss: E‖Pᵀg‖² = ‖g‖², with a relative deviation of √(2/r)."""
    g = torch.randn(512, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -3, 512)[:, None]
    ratios = [(draw(512, 32, index=i).T @ g).square().sum(0) / g.square().sum(0) for i in range(200)]
    mean = float(torch.stack(ratios).mean())
    assert abs(mean - 1) < 4 * math.sqrt(2 / 32 / 200)


@pytest.mark.parametrize("rank", [1, 3, 4, 6, 255, 256])
def test_rows_are_the_same_however_they_are_cut(rank: int) -> None:
    """2000 rows of 256 entries are made in several blocks."""
    whole = draw(2000, rank)
    parts = [draw(stop - start, rank, start=start) for start, stop in ((0, 1), (1, 700), (700, 700), (700, 2000))]
    assert torch.equal(torch.cat(parts), whole)
    assert len(whole.unique()) > min(whole.numel(), 2**16) // 2


def test_an_entry_does_not_depend_on_the_rank_but_for_its_length() -> None:
    assert torch.equal(draw(100, 16)[:, :4], draw(100, 4) / 2)
    assert torch.equal(draw(100, 4)[:, :1], draw(100, 1) / 2)


def test_bf16_entries_are_those_of_fp32_rounded() -> None:
    assert torch.equal(draw(100, 24, dtype=torch.bfloat16), draw(100, 24).bfloat16())


def test_the_hash_is_splitmix64() -> None:
    """The first two outputs from the seed 1234567, as published with the algorithm's ports."""
    found = sketch._hashed(torch.tensor([1, 2]), 1234567)
    assert found.tolist() == [6457827717110365317, 3203168211198807973]


def test_values_are_what_they_have_always_been() -> None:
    """A checkpoint holds no projection: a run that goes on would go on in another one."""
    corner = draw(2, 4, seed=1, index=2) * 2
    expected = [-0.28455707, -1.00501275, 0.52784526, -0.26588613, 0.91212159, -1.06069458, 0.20309095, -0.5436514]
    assert corner.flatten().tolist() == pytest.approx(expected, abs=1e-7)
    values = draw(3000, 64, start=5, seed=2**62 + 1, index=7) * 8
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest().startswith("3619c74ad4eb433d")


def test_the_values_of_an_entry_are_symmetric_and_of_variance_1() -> None:
    values = torch.tensor(sketch._quantile_values(), dtype=torch.float64)
    assert len(values) == 65536
    assert (values.diff() > 0).all()
    assert torch.equal(values, -values.flip(0))
    assert abs(values.square().mean() - 1) < 1e-12


def test_a_plan_makes_a_projection_of_fake_tensors_and_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch, "_tables", {})
    with FakeTensorMode():
        assert draw(300, 7).shape == (300, 7)
    assert not sketch._tables
    assert draw(300, 7).isfinite().all()
    assert gaussian(0, 3, 2, seed=0, draw=0, device=torch.device("meta")).shape == (3, 2)


def test_temporaries_are_smaller_than_what_is_made() -> None:
    draw(1, 1)
    with Ledger() as ledger:
        matrix = draw(8192, 256)
    assert ledger.peak < matrix.nbytes + 2 * 2**20


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_makes_the_same_bits(dtype: torch.dtype) -> None:
    there = gaussian(10, 3000, 255, seed=1, draw=2, device=torch.device("cuda"), dtype=dtype)
    here = gaussian(10, 3000, 255, seed=1, draw=2, device=CPU, dtype=dtype)
    assert torch.equal(there.cpu(), here)
