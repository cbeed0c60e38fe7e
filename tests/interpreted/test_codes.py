"""The kernel that changes codes under Triton's interpreter, against the composed update and fp64."""

import math
from typing import Any

import pytest
import torch
from operations import Operations
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from galore_pretrain.model.coded import code_matrices
from galore_pretrain.model.head import mean_loss
from galore_pretrain.model.llama import build_model
from galore_pretrain.optim import GlobalStep, Layerwise, build_optimizer
from galore_pretrain.tensors import capability
from galore_pretrain.tensors.coded import Coded, codes_of
from galore_pretrain.tensors.fused import Noise, Update, subtract_codes_

SHAPES = [(5, 300, None), (70, 300, 128), (3, 130, 256), (1, 1, None)]
SEEDS = 6


def drawn(*shape: int, seed: int = 0, scale: float = 0.02) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def coded(rows: int, columns: int, group: int | None) -> Coded:
    made = Coded.empty(rows, columns, group)
    made.write(drawn(rows, columns))
    return made


def changed(made: Coded, update: Update, seed: int, decay: float = 0.0, valid: Tensor | None = None) -> Coded:
    new = Coded(made.codes.clone(), made.scales.clone(), made.group)
    subtract_codes_(new.codes, new.scales, new.group, update, decay, True, Noise(seed, 11), valid)
    return new


def updates(rows: int, columns: int, size: float) -> list[Update]:
    product = Update(drawn(rows, 7, seed=1, scale=size), drawn(7, columns, seed=2, scale=1.0), 0.5)
    dense = Update(
        dense=drawn(rows, columns, seed=3, scale=size),
        row=drawn(rows, seed=4, scale=1.0),
        column=drawn(columns, seed=5, scale=1.0),
        dense_rate=0.25,
    )
    return [product, dense]


def multiplied_out(update: Update) -> Tensor:
    if update.left is not None and update.right is not None:
        return update.product_rate * update.left.double() @ update.right.double()
    assert update.dense is not None
    assert update.row is not None
    assert update.column is not None
    return update.dense_rate * update.row.double()[:, None] * update.dense.double() * update.column.double()


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
@pytest.mark.parametrize("size", [1e-4, 0.02])
def test_codes_are_neighbours_of_the_exact_update(rows: int, columns: int, group: int | None, size: float) -> None:
    made = coded(rows, columns, group)
    for update in updates(rows, columns, size):
        exact = (1 - 0.01) * made.read().double() - multiplied_out(update)
        composed = Coded(made.codes.clone(), made.scales.clone(), made.group)
        change = (exact - made.read().double()).float()
        composed.change(
            lambda steps, c=change: steps.add_(made.in_steps(c.clone())), torch.zeros_like(made.codes).int()
        )
        total = torch.zeros(rows, columns, dtype=torch.float64)
        for seed in range(SEEDS):
            new = changed(made, update, seed, decay=0.01)
            step = new._spread(new.scales.double())
            assert bool(((new.read().double() - exact).abs() <= 1.001 * step).all())
            assert torch.allclose(new.scales.float(), composed.scales.float(), rtol=2**-7)
            assert int(new.codes.abs().max()) <= 127
            total += (new.read().double() - exact) / step
        # A rounding up or down has a deviation of half a step at most.
        assert abs(float(total.mean()) / SEEDS) <= 6 * 0.5 / math.sqrt(SEEDS * rows * columns) + 1e-5


@pytest.mark.parametrize(("rows", "columns", "group"), SHAPES)
def test_an_update_of_nothing_changes_no_byte(rows: int, columns: int, group: int | None) -> None:
    made = coded(rows, columns, group)
    nothing = Update(torch.zeros(rows, 3), torch.zeros(3, columns), 1.0)
    for seed in range(SEEDS):
        new = changed(made, nothing, seed)
        assert torch.equal(new.codes, made.codes)
        assert torch.equal(new.scales, made.scales)


def test_what_is_not_valid_changes_nothing() -> None:
    made = coded(5, 300, None)
    update = Update(torch.full((5, 3), math.nan), torch.ones(3, 300), 1.0)
    new = changed(made, update, 1, 0.1, torch.tensor(False))
    assert torch.equal(new.codes, made.codes)
    assert torch.equal(new.scales, made.scales)
    sound = updates(5, 300, 0.02)[0]
    assert not torch.equal(changed(made, sound, 1, 0.1, torch.tensor(True)).codes, made.codes)


def test_on_fake_tensors_nothing_is_computed() -> None:
    with FakeTensorMode():
        made = Coded.empty(4, 300, None)
        update = Update(dense=torch.empty(4, 300))
        with Operations() as seen:
            subtract_codes_(made.codes, made.scales, 300, update, 0.0, True, Noise(1))
    assert seen.names == ["galore_pretrain.subtract_codes_.default"]


def trained(row: str, execution: Any, count: int) -> list[list[Tensor]]:
    """What codes stand for after each update."""
    config = LlamaConfig(
        hidden_size=16, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2, vocab_size=50
    )  # fmt: skip
    model = build_model(config, dtype=torch.bfloat16, change=lambda made: code_matrices(made, None))
    options = {"rank": 4, "update_proj_gap": 2} if row.startswith("galore") else {}
    optimizer = build_optimizer(model, row, lr=0.01, weight_decay=0.1, **options)
    running = execution(optimizer)
    rows = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    found = []
    for _ in range(count):
        running.begin(0, 1)
        mean_loss(model, rows[:, :-1], rows[:, 1:], 16).backward()
        running.complete()
        held = [codes_of(p) for p in model.parameters()]
        found.append([coded.read() for coded in held if coded is not None])
    return found


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize(("row", "count"), [("adamw", 2), ("galore_adamw", 3), ("scale", 2)])
def test_methods_train_by_the_kernel_as_composed(row: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases of GaLore are found anew by the third update."""
    by_kernel = trained(row, GlobalStep, count)
    assert all(map(torch.equal, by_kernel[-1], trained(row, Layerwise, count)[-1]))
    monkeypatch.setattr(capability, "runs_on", lambda device: False)
    for ours, theirs in zip(by_kernel[0], trained(row, GlobalStep, 1)[0], strict=True):
        step = theirs.abs().amax(1, keepdim=True) / 64
        assert bool(((ours - theirs).abs() <= 1.1 * step).all())  # two neighbours, by other random bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "group"), [*SHAPES, (9, 70, 17)])
def test_a_kernel_reads_what_single_operations_do(
    rows: int, columns: int, group: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = coded(rows, columns, group)
    by_kernel = made.read(dtype)
    monkeypatch.setattr(capability, "runs_on", lambda device: False)
    assert by_kernel.dtype == dtype
    assert torch.equal(by_kernel, made.read(dtype))
