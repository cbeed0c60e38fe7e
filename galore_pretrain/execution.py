"""When updates run: all of them after backward, or each inside it. Both call ``optimizer.update_param``."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from galore_pretrain.optim.step import gradient_norm


@dataclass(frozen=True)
class Finished:
    """The norm of all gradients before clipping, where one was computed; the tensors whose update was skipped because
    their gradient was not finite; the bases that could not be renewed."""

    grad_norm: float | None = None
    skipped: int = 0
    failed_refreshes: int = 0


class Execution(Protocol):
    """What stands between the last backward pass of an update and the next forward pass."""

    def finish(self) -> Finished:
        """Complete the update, and say what came of it. Waits for the device, once."""
        ...


class GlobalStep:
    """Clip the norm of all gradients to ``grad_clip`` (0: off), update every parameter, drop the gradients."""

    def __init__(self, optimizer: Any, grad_clip: float) -> None:
        self._optimizer, self._grad_clip = optimizer, grad_clip

    def finish(self) -> Finished:
        norm = None
        if self._grad_clip > 0:
            grads = [p.grad for group in self._optimizer.param_groups for p in group["params"] if p.grad is not None]
            # In fp32 whatever the gradients are: torch's own function would round the norm to bf16.
            norms = torch.stack([gradient_norm(grad) for grad in grads])
            # One tensor that is not finite is skipped, and must not take the others with it.
            norm = torch.where(norms.isfinite(), norms, 0.0).norm()
            coefficient = (self._grad_clip / (norm + 1e-6)).clamp(max=1.0)
            for grad, coefficient_of_one in zip(
                grads, torch.where(norms.isfinite(), coefficient, torch.nan), strict=True
            ):
                grad.mul_(coefficient_of_one)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        faults = self._optimizer.take_faults()
        return Finished(None if norm is None else float(norm), faults.skipped, faults.failed_refreshes)


class Layerwise:
    """Update each parameter as soon as backward has its gradient, and drop that gradient: no full set ever exists.

    The learning rate must be in the groups before backward, which must run once an update.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer

        def update(p: Tensor) -> None:
            optimizer.update_param(p)
            p.grad = None

        self._hooks = [
            p.register_post_accumulate_grad_hook(update) for group in optimizer.param_groups for p in group["params"]
        ]

    def finish(self) -> Finished:
        """Nothing is left to do: the hooks have done it."""
        faults = self._optimizer.take_faults()
        return Finished(None, faults.skipped, faults.failed_refreshes)
