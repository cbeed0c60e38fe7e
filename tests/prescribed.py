"""Prescribed gradients: optimizers are compared on them, not through a model, which amplifies rounding."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import reject
from torch import Tensor

from galore_pretrain.optim import METHODS, OPTIONS, UpdateRule, build_rules
from galore_pretrain.tensors.rounding import RandomBits


def meant_for(row: str, **options: Any) -> dict[str, Any]:
    """Those of ``options`` of `build_rules` that a row has a use for."""
    arguments = {OPTIONS[flag].argument for flag in METHODS[row].options}
    return {name: value for name, value in options.items() if name in arguments}


def rules_that_go_together(row: str, numerics: str, **options: Any) -> tuple[UpdateRule, UpdateRule]:
    """The rules of `build_rules`; in a property test, what lazy refreshes or rounded bases refuse is no example."""
    try:
        return build_rules(row, numerics, **options)
    except ValueError as error:
        if str(error).startswith(("refresh 'lazy'", "basis_store")):
            reject()
        raise


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(parameters: list[Tensor], steps: int) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield [torch.randn(p.shape, generator=generator).to(p.dtype) for p in parameters]


def train(
    optimizer: torch.optim.Optimizer,
    parameters: list[Tensor],
    steps: int,
    lr: Callable[[int], float] | None = None,
) -> None:
    for i, grads in enumerate(gradients(parameters, steps)):
        for p, grad in zip(parameters, grads, strict=True):
            p.grad = grad
        if lr:
            for group in optimizer.param_groups:
                group["lr"] = lr(i)
        optimizer.step()


def random_bits(seed: int, table_seed: int = 0) -> RandomBits:
    """The streams of random bits of ``seed``, from a table of its own."""
    table = RandomBits.table(table_seed, torch.device("cpu"))
    return RandomBits(lambda: table, seed)
