"""When updates run: all of them after backward, or each inside it. Both call ``optimizer.update_param``."""

from typing import Protocol

import torch
from torch import Tensor


class Execution(Protocol):
    """What stands between the last backward pass of an update and the next forward pass."""

    def finish(self) -> Tensor | None:
        """Complete the update; the gradient norm before clipping, where one was computed."""
        ...


class GlobalStep:
    """Clip the norm of all gradients to ``grad_clip`` (0: off), update every parameter, drop the gradients."""

    def __init__(self, optimizer: torch.optim.Optimizer, grad_clip: float) -> None:
        self._optimizer, self._grad_clip = optimizer, grad_clip

    def finish(self) -> Tensor | None:
        norm = None
        if self._grad_clip > 0:
            grads = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            # In fp32 whatever the gradients are: torch's own function would compute and round the norm in bf16.
            norm = torch.stack([torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]).norm()
            coefficient = (self._grad_clip / (norm + 1e-6)).clamp(max=1.0)
            for grad in grads:
                grad.mul_(coefficient)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm


class Layerwise:
    """Update each parameter as soon as backward has its gradient, and drop that gradient: no full set ever exists.

    The learning rate must be in the groups before backward, which must run once an update.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        def update(p: Tensor) -> None:
            optimizer.update_param(p)  # type: ignore[attr-defined]
            p.grad = None

        self._hooks = [
            p.register_post_accumulate_grad_hook(update) for group in optimizer.param_groups for p in group["params"]
        ]

    def finish(self) -> None:
        """Nothing is left to do: the hooks have done it."""
