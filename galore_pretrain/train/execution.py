"""When updates run: all of them after backward, or each inside it. Both call ``optimizer.update_param``."""

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from galore_pretrain.optim import RuleOptimizer


@dataclass(frozen=True)
class Outcome:
    """What came of an update: the norm of all gradients before clipping, where one was computed; the tensors that were
    skipped because their gradient was not finite; the bases that could not be renewed."""

    grad_norm: float | None = None
    skipped: int = 0
    failed_refreshes: int = 0


class Execution(Protocol):
    """What stands between the backward passes of an update and the next forward pass."""

    def begin(self, micro_batch: int, micro_batches: int) -> None:
        """The next backward pass is number ``micro_batch`` (from 0) of an update's."""
        ...

    def complete(self) -> None:
        """Make the updates that are still to be made. Waits for no device."""
        ...

    def outcome(self) -> Outcome:
        """What came of the update that was completed. Waits for the device."""
        ...

    def discard(self) -> None:
        """Drop the gradients of an update that is not to be made."""
        ...


class _Updates(ABC):
    """What both executions share: the hooks, and the updates that wait for the end."""

    def __init__(self, optimizer: "RuleOptimizer", grad_clip: float = 0.0, *, projected: bool = False) -> None:
        self._optimizer, self._grad_clip, self._projected = optimizer, grad_clip, projected
        self._micro_batch, self._micro_batches = 0, 1
        self._norm: Tensor | None = None
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        # A tensor's hooks are nothing that Python's collector sees through: one that held this object, and so all
        # parameters, would keep a model in memory for good.
        method = weakref.WeakMethod(self._hook)

        def hook(p: Tensor) -> None:
            if (alive := method()) is not None:
                alive(p)

        handles = [p.register_post_accumulate_grad_hook(hook) for p in self._params]
        weakref.finalize(self, _remove, handles)

    @abstractmethod
    def _hook(self, p: Tensor) -> None:
        """Called when a backward pass has added to ``p.grad`` all that it will."""

    def begin(self, micro_batch: int, micro_batches: int) -> None:
        self._micro_batch, self._micro_batches = micro_batch, micro_batches

    def complete(self) -> None:
        coefficient = self._norm = None
        self._optimizer.agree(self._params)
        if self._grad_clip > 0:
            self._norm = self._optimizer.norms(self._params).norm()
            coefficient = (self._grad_clip / (self._norm + 1e-6)).clamp(max=1.0)
        self._optimizer.renew(self._params)
        for p in self._params:
            self._optimizer.update_param(p, coefficient)
            p.grad = None

    def _settle(self) -> None:
        """Where several processes make an update: keep the low-rank gradients alone of what was gathered."""
        self._optimizer.agree(self._params)
        self._optimizer.renew(self._params)
        for p in self._params:
            self._optimizer.settle(p)

    def outcome(self) -> Outcome:
        faults = self._optimizer.take_faults()
        return Outcome(None if self._norm is None else float(self._norm), faults.skipped, faults.failed_refreshes)

    def discard(self) -> None:
        self._optimizer.discard()
        self._optimizer.take_faults()  # of an update that is not made


def _remove(handles: list[Any]) -> None:
    """Take hooks off their tensors."""
    for handle in handles:
        handle.remove()


class GlobalStep(_Updates):
    """All updates after the last backward pass.

    The norm of all gradients is clipped to ``grad_clip`` (0: off); ``projected`` takes the norm of the low-rank
    gradients where the rule projects, which leaves nothing of the full ones once they are projected.
    """

    def _hook(self, p: Tensor) -> None:
        if self._micro_batches > 1:  # torch would add them up in the gradient's dtype, rounded to nearest
            self._optimizer.gather(p, project=False)

    def complete(self) -> None:
        if self._grad_clip > 0 and self._projected:
            for p in self._params:
                self._optimizer.gather(p, project=True)
                if not self._optimizer.is_shared:
                    self._optimizer.settle(p)
            self._settle()
        super().complete()


class Layerwise(_Updates):
    """Each update as soon as the last backward pass has its gradient, which is then dropped: no full set ever exists.

    The sum over micro-batches is kept low-rank where the rule projects (GaLore is linear in the gradient between two
    bases); only matrices whose basis is due keep a full one. Clipping has to see all norms before the first update, so
    updates wait, low-rank, for the end: of one micro-batch the full norm is known, of several only the ``projected``.
    The learning rate must be in the groups before backward. Where several processes make an update, low-rank gradients
    wait for its end too: there all agree on what was finite, and share out the bases that are due.
    """

    def _hook(self, p: Tensor) -> None:
        optimizer, last = self._optimizer, self._micro_batch == self._micro_batches - 1
        waits = optimizer.waits_for_all(p)
        if self._micro_batches > 1 or self._grad_clip > 0 or waits:
            measured = self._grad_clip > 0 and self._micro_batches == 1 and not self._projected
            optimizer.gather(p, project=True, measure=measured)
        if last and waits:
            optimizer.start_sum(p)
        elif last and self._grad_clip > 0:
            optimizer.settle(p)
        elif last:
            optimizer.update_param(p)
            p.grad = None

    def complete(self) -> None:
        if self._optimizer.is_shared and self._grad_clip > 0:
            self._settle()
        super().complete()

    def begin(self, micro_batch: int, micro_batches: int) -> None:
        if micro_batches > 1 and self._grad_clip > 0 and not self._projected and self._optimizer.projects:
            raise ValueError(
                "layerwise updates of several micro-batches know no norm of the full gradient: clip the projected one"
            )
        super().begin(micro_batch, micro_batches)
