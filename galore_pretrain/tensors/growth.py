"""The factors of an update's channels, limited in their growth, by one small kernel in place of many operations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.tensors.fused import on_device
from galore_pretrain.tensors.operations import operation

_SIZE = 1024  # channels that the program looks at together


@dataclass(frozen=True)
class FactorRule:
    """Says how factors follow from norms, as `channel_factors` describes it."""

    multiple: float
    growth: float
    share: float
    eps: float
    channelwise: bool

    def numbers(self) -> list[float]:
        """Return the numbers as the kernel takes them."""
        return [self.multiple, self.growth, self.share, self.eps]


# With norms l of the low-rank gradient's channels, d of the inner rule's direction and g of the gradient's, all of c
# channels, and y the norm of the update before:
#
#     s_j = multiple · d_j / (l_j + eps)                  x² = Σ s_j² (g_j² − share · l_j²)
#     factor_j = s_j · min(1, growth · y / x)
#
# Where not channelwise, s is one number, of the norms of all channels together. An update after none, or after one of
# zeros (y = 0), is not limited. What is then its norm takes the place of y.
def channel_factors(
    low: Tensor, direction: Tensor, grad: Tensor, last: Tensor, valid: Tensor | None, rule: FactorRule
) -> Tensor:
    """Return the factors of the channels (fp32), and overwrite ``last``, the norm of the update before.

    The first three are the channels' norms, or numbers whose magnitudes are, in bf16 or fp32. ``last`` is an fp32
    scalar, which stays as it is where ``valid``, a boolean scalar, is false. It runs where `capability.runs_on` says
    that kernels do.
    """
    factors: Tensor = _op()(low, direction, grad, last, valid, rule.numbers(), rule.channelwise)
    return factors


@cache
def _op() -> Callable[..., Any]:
    """Return the operation, registered when it is first needed."""
    return operation("channel_factors", _factors, _place, ("last",))


def _place(low: Tensor, *arguments: Any) -> Tensor:
    """Return a place for the factors."""
    return torch.empty(low.shape, dtype=torch.float32, device=low.device)


def _factors(
    low: Tensor,
    direction: Tensor,
    grad: Tensor,
    last: Tensor,
    valid: Tensor | None,
    numbers: list[float],
    channelwise: bool,
) -> Tensor:
    """Launch the kernel."""
    from galore_pretrain.tensors import kernels

    factors = _place(low)
    # An infinite growth times a last norm of 0 is no number, which limits nothing, as it ought to be.
    multiple, growth, share, eps = numbers
    with on_device(low.device):
        kernels.channel_factors[(1,)](
            factors,
            low,
            direction,
            grad,
            last,
            None if valid is None else valid.view(torch.uint8),
            low.numel(),
            multiple,
            growth,
            share,
            eps,
            HAS_VALID=valid is not None,
            CHANNELWISE=channelwise,
            SIZE=_SIZE,
        )
    return factors
