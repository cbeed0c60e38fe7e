"""The kernels of a loss and of random numbers under Triton's interpreter, against torch's own operations."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from galore_pretrain.model.head import _HeadLoss
from galore_pretrain.model.lowrank import Dropout
from galore_pretrain.model.position import TrainingPosition
from galore_pretrain.optim import sketch
from galore_pretrain.tensors import capability
from galore_pretrain.tensors.draws import dropout_mask, gaussian_
from galore_pretrain.tensors.entropy import cross_entropy_

DTYPES = (torch.float32, torch.bfloat16)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def composed(logits: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    leaf = logits.double().requires_grad_()
    losses = F.cross_entropy(leaf, labels, reduction="none", ignore_index=-100)
    (losses.sum() * scale).backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return losses.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [1, 50, 8192, 20_001])
def test_a_loss_and_its_gradient_are_those_of_fp64(dtype: torch.dtype, vocabulary: int) -> None:
    """A row goes by pieces of 8,192 logits."""
    logits = 4 * drawn(3, vocabulary, dtype=dtype)
    labels = torch.tensor([vocabulary - 1, -100, 0])
    expected_losses, expected = composed(logits, labels, 0.25)
    losses = cross_entropy_(logits, labels, 0.25)
    assert losses.dtype == torch.float32
    assert torch.allclose(losses.double(), expected_losses, atol=1e-5)
    tolerance = 1e-6 if dtype == torch.float32 else 2.0**-8
    assert bool(((logits.double() - expected).abs() <= tolerance * expected.abs() + 1e-7).all())
    assert bool((logits[1] == 0).all())


@pytest.mark.parametrize("vocabulary", [50, 20_001])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(vocabulary: int, bad: float) -> None:
    logits = drawn(3, vocabulary)
    logits[1, 3] = bad
    losses = cross_entropy_(logits, torch.tensor([1, 2, 3]), 1.0)
    assert torch.isnan(losses).tolist() == [False, True, False]
    assert bool(torch.isnan(logits[1]).any())
    assert bool(torch.isfinite(logits[[0, 2]]).all())
    logits = drawn(2, vocabulary)
    logits[:, : vocabulary - 2] = -math.inf  # a token that cannot come has no gradient
    losses = cross_entropy_(logits, torch.tensor([vocabulary - 1, vocabulary - 2]), 1.0)
    assert bool(torch.isfinite(losses).all())
    assert bool((logits[:, : vocabulary - 2] == 0).all())


def test_the_loss_of_a_head_is_the_composed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = drawn(700, 24, seed=1)
    labels = torch.randint(-1, 700, (90,), generator=torch.Generator().manual_seed(2))
    labels[labels < 0] = -100

    def found() -> list[Tensor]:
        hidden, matrix = drawn(90, 24).requires_grad_(), weight.clone().requires_grad_()
        loss: Any = _HeadLoss.apply(hidden, matrix, labels, 1 / 80)  # type: ignore[no-untyped-call]
        loss.backward()
        assert hidden.grad is not None
        assert matrix.grad is not None
        return [loss.detach(), hidden.grad, matrix.grad]

    by_kernel = found()
    calls: list[Tensor] = []
    monkeypatch.setattr("galore_pretrain.model.head.runs_on", calls.append)
    for ours, theirs in zip(by_kernel, found(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    assert calls


@pytest.mark.parametrize("start", [0, 1, 2047, 2048, 5000, (1 << 31) - 5])
def test_a_mask_is_the_same_however_rows_are_cut(start: int) -> None:
    whole = dropout_mask(torch.empty(9000), start, 7, 20_000)
    assert torch.equal(whole[2500:], dropout_mask(torch.empty(6500), start + 2500, 7, 20_000))
    assert torch.equal(whole[:1], dropout_mask(torch.empty(1), start, 7, 20_000))
    assert not torch.equal(whole, dropout_mask(torch.empty(9000), start, 8, 20_000))


@pytest.mark.parametrize("limit", [0, 1, 6554, 65_535])
def test_a_mask_drops_its_share(limit: int) -> None:
    mask = dropout_mask(torch.empty(100, 1000), 0, 3, limit)
    assert mask.dtype == torch.bool
    p = limit / 65536
    error = 6 * math.sqrt(p * (1 - p) / mask.numel())
    assert abs(float(mask.double().mean()) - p) <= error
    if limit == 6554:
        neighbours = (mask[:, 1:] & mask[:, :-1]).double().mean()
        rows = (mask[1:] & mask[:-1]).double().mean()
        for both in (neighbours, rows):  # independent, as far as this many tell
            assert abs(float(both) - p * p) <= 6 * math.sqrt(p * p / mask.numel())


def test_dropout_of_a_layer_does_not_depend_on_micro_batches() -> None:
    position = TrainingPosition()
    dropout = Dropout("layer", 0.1, 0, position)
    x = drawn(6, 5, 33)
    position.update, position.row = 3, 0
    whole, probability = dropout.mask(x.requires_grad_())
    position.row = 4
    part, _ = dropout.mask(x[4:])
    assert torch.equal(whole[4:], part)
    assert probability == round(0.1 * 65536) / 65536
    x.masked_fill(whole, 0).sum().backward()  # type: ignore[no-untyped-call]
    assert torch.equal(x.grad == 0, whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("start", "stop", "rank"), [(0, 1, 1), (3, 40, 9), (100_000, 100_010, 128)])
def test_a_random_projection_has_the_bits_of_the_composed_one(
    start: int, stop: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"seed": 5, "draw": 9, "device": torch.device("cpu"), "dtype": dtype}
    by_kernel = sketch.gaussian(start, stop, rank, **options)
    monkeypatch.setattr(sketch, "runs_on", lambda device: False)
    assert torch.equal(by_kernel, sketch.gaussian(start, stop, rank, **options))


def test_on_fake_tensors_nothing_is_computed() -> None:
    with FakeTensorMode():
        losses = cross_entropy_(torch.empty(4, 9, dtype=torch.bfloat16), torch.zeros(4, dtype=torch.int64), 1.0)
        assert (losses.shape, losses.dtype) == ((4,), torch.float32)
        mask = dropout_mask(torch.empty(4, 9, 2), 0, 1, 5)
        assert (mask.shape, mask.dtype) == ((4, 9, 2), torch.bool)
        gaussian_(torch.empty(4, 9), torch.empty(1 << 16), 0, 1)


@pytest.mark.parametrize("operation", ["cross_entropy_", "dropout_mask", "gaussian_"])
def test_the_trial_sees_what_is_wrong(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert capability._loss_is_right(cpu)
    wrong: dict[str, Any] = {
        "cross_entropy_": lambda logits, labels, scale: torch.zeros(len(logits)),
        "dropout_mask": lambda like, *numbers: torch.zeros(like.shape, dtype=torch.bool),
        "gaussian_": lambda matrix, *others: matrix.zero_(),
    }
    monkeypatch.setattr(capability, operation, wrong[operation])
    assert not capability._loss_is_right(cpu)
