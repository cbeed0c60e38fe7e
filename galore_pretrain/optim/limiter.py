"""The norm-growth limiter of Fira (arXiv 2410.01673, §4.2), which APOLLO (arXiv 2412.05270, §4) uses as well."""

import torch
from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.growth import FactorRule, channel_factors
from galore_pretrain.tensors.values import channel_norms

LAST_NORM = "last_norm"
"""The name of the state tensor that keeps the norm of the last update: a scalar, whole on every process."""


def last_norm(like: Tensor) -> State:
    """Return the limiter's state before the first update, on the device of ``like``: an fp32 scalar, 0."""
    return {LAST_NORM: torch.zeros((), dtype=torch.float32, device=like.device)}


# Let x be an update's norm, y the one before it and γ the growth that is allowed. The update is multiplied by
# min(1, γ y / x), and what is then its norm becomes the next y. The first update has no y, and is left as it is. So is
# one after an update of zeros, which would otherwise hold all that follow at zero.
def limit_growth(norm: Tensor, state: State, step: Step, growth: float) -> Tensor:
    """Return the factor in (0, 1] by which an update of that ``norm`` is multiplied, and keep the norm it then has.

    ``norm`` is that of the whole update of one parameter, a scalar in fp32. ``growth`` (γ) is how much larger than its
    predecessor it may be; ``inf`` never limits.
    """
    allowed = growth * state[LAST_NORM]
    is_too_large = (allowed > 0) & (norm > allowed)
    factor = torch.where(is_too_large, allowed / norm, 1.0)
    step.store(state[LAST_NORM], norm * factor)
    return factor


def limited_by_kernel(
    grad: Tensor, low_norms: Tensor, direction: Tensor, over: int, state: State, step: Step, rule: FactorRule
) -> Tensor:
    """Return the factor of each channel of ``grad``, limited as `limit_growth` does, by one operation.

    ``grad`` (m × n) was projected along dimension ``over``. ``low_norms`` are the norms of the channels of what came of
    that, and ``direction`` is what the inner rule made of it. It runs where ``step.kernels`` says so.
    """
    if direction.shape[over] == 1:  # the norm of one number is its magnitude, which the kernel takes
        direction_norms = direction.flatten()
    else:
        direction_norms = channel_norms(direction, over)
    grad_norms = channel_norms(grad, over)
    return channel_factors(low_norms, direction_norms, grad_norms, state[LAST_NORM], step.valid, rule)
