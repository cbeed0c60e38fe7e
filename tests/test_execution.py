"""Layerwise and global execution of the same update, and the accumulation of micro-batches."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from galore_pretrain.model.head import mean_loss
from galore_pretrain.optim import REGISTRY, build_optimizer
from galore_pretrain.optim.execution import GlobalStep, Layerwise
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.sgd import SGD
from prescribed import meant_for


def train(model: LlamaForCausalLM, row: str, layerwise: bool, numerics: str, steps: int = 8) -> list[float]:
    options: dict[str, Any] = meant_for(row, rank=4, update_proj_gap=3)
    optimizer = build_optimizer(model, row, lr=0.01, weight_decay=0.1, numerics=numerics, seed=3, **options)
    execution: Any = Layerwise(optimizer) if layerwise else GlobalStep(optimizer, grad_clip=0.0)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        ids = torch.randint(0, 1024, (2, 33), generator=generator)
        loss = mean_loss(model, ids[:, :-1], ids[:, 1:], 64)
        losses.append(loss.item())
        loss.backward()  # type: ignore[no-untyped-call]
        execution.complete()
        assert all(p.grad is None for p in model.parameters())
    return losses


@pytest.mark.parametrize("numerics", ["sound", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", REGISTRY)
def test_layerwise_equals_global_bitwise(
    row: str, dtype: torch.dtype, numerics: str, build_tiny: Callable[..., LlamaForCausalLM]
) -> None:
    one, other = build_tiny(dtype=dtype), build_tiny(dtype=dtype)
    start = [p.detach().clone() for p in one.parameters()]
    assert train(one, row, False, numerics) == train(other, row, True, numerics)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    if (row, dtype, numerics) != (
        "sgd",
        torch.bfloat16,
        "reference",
    ):  # nearest bf16 loses all of SGD's steps from 1.0
        assert not any(torch.equal(a, b) for a, b in zip(one.parameters(), start, strict=True)), (
            "a parameter never moved"
        )


def test_clipping_scales_all_gradients(build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    model = build_tiny()
    optimizer = build_optimizer(model, "sgd", lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    ids = torch.arange(66).view(2, 33)
    mean_loss(model, ids[:, :-1], ids[:, 1:], 64).backward()  # type: ignore[no-untyped-call]
    execution = GlobalStep(optimizer, grad_clip=0.01)
    execution.complete()
    norm = execution.outcome().grad_norm
    assert norm is not None
    assert norm > 0.01
    moved = torch.stack([(p - q).norm() for p, q in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_the_norm_of_bf16_gradients_is_computed_in_fp32() -> None:
    p = torch.zeros(1000, dtype=torch.bfloat16, requires_grad=True)
    optimizer = RuleOptimizer([{"params": [p], "rule": SGD()}], lr=0.0)
    p.grad = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = p.grad.double().norm().item()
    execution = GlobalStep(optimizer, grad_clip=1.0)
    execution.complete()
    norm = execution.outcome().grad_norm
    assert norm is not None
    assert norm == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("row", ["galore_adamw", "adamw"])
def test_frozen_matrices_stay(row: str, build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    """``matrix_lr_scale=0`` is the control of every comparison; bf16 weights must not drift by rounding either."""
    model = build_tiny(dtype=torch.bfloat16)
    optimizer = build_optimizer(model, row, lr=0.1, matrix_lr_scale=0.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    ids = torch.arange(66).view(2, 33)
    for _ in range(3):
        mean_loss(model, ids[:, :-1], ids[:, 1:], 64).backward()  # type: ignore[no-untyped-call]
        GlobalStep(optimizer, 0.0).complete()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("proj" in name)


@pytest.mark.parametrize("mode", [GlobalStep, Layerwise])
def test_a_model_ends_with_its_execution(mode: Any, build_tiny: Callable[..., LlamaForCausalLM]) -> None:
    """Its hooks hold nothing: several runs in one process would keep all their models otherwise."""
    model = build_tiny()
    optimizer = build_optimizer(model, "adamw", lr=0.1)
    execution = mode(optimizer)
    ids = torch.randint(0, 1024, (2, 33))
    mean_loss(model, ids[:, :-1], ids[:, 1:], 64).backward()
    execution.complete()
    weight = weakref.ref(model.lm_head.weight)
    before = model.lm_head.weight.detach().clone()
    del execution
    gc.collect()
    mean_loss(model, ids[:, :-1], ids[:, 1:], 64).backward()
    assert torch.equal(before, model.lm_head.weight)
    assert not model.lm_head.weight._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    del model, optimizer
    gc.collect()
    assert weight() is None
