"""The cross-entropy of many rows and its gradient, by one kernel that reads the logits from memory once."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.tensors.fused import on_device
from galore_pretrain.tensors.operations import operation

_PIECE = 1 << 13  # logits of a row that are looked at together, by 8 warps: none of their registers is spilled


def cross_entropy_(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Return the cross-entropy of each row of ``logits``, and overwrite them by ``scale`` times its gradient.

    ``logits`` are rows × vocabulary, contiguous, in bf16 or fp32, ``labels`` int64. Of a row whose label is negative,
    both are 0. The losses are in fp32, and so is all arithmetic; the gradient is rounded to nearest. It runs where
    `capability.runs_on` says that kernels do.
    """
    losses: Tensor = _op()(logits, labels, scale)
    return losses


@cache
def _op() -> Callable[..., Any]:
    """Return the operation, registered when it is first needed."""
    return operation("cross_entropy_", _launch, _losses_of, ("logits",))


def _losses_of(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Return a place for the loss of each row."""
    del labels, scale
    return logits.new_empty(len(logits), dtype=torch.float32)


def _launch(logits: Tensor, labels: Tensor, scale: float) -> Tensor:
    """Launch the kernel, a program for each row."""
    from galore_pretrain.tensors import kernels

    losses = _losses_of(logits, labels, scale)
    rows, columns = logits.shape
    if not rows:
        return losses
    with on_device(logits.device):
        kernels.cross_entropy[(rows,)](
            logits,
            labels,
            losses,
            columns,
            scale,
            SIZE=_PIECE,
            num_warps=8,
        )
    return losses
