"""Sums of gradients over micro-batches on a GPU."""

from typing import TYPE_CHECKING

import torch

from galore_pretrain.tensors.capability import kernels_take
from galore_pretrain.tensors.fused import add_all_

if TYPE_CHECKING:
    from galore_pretrain.optim.execution import PendingGradient

_WAITING_BYTES = 1 << 26  # of gradients that are added by one launch


# One by one, the sums of a micro-batch's gradients would be a dozen launches each. So parts wait until there are some,
# which one launch then adds. They take no more memory than that.
class Sums:
    """Adds parts of gradients to their sums on a GPU, many by one launch."""

    def __init__(self) -> None:
        self.waiting: list[tuple[PendingGradient, PendingGradient, int]] = []  # (sum, part, seed of its random bits)
        self._totals: set[int] = set()  # which sums these are, by their ids
        self._bytes = 0

    def takes(self, total: "PendingGradient", part: "PendingGradient") -> bool:
        """Return whether a part can be added so: both as they came, in dtypes and layouts that the kernel knows."""
        if total.compressed or part.compressed:
            return False
        return kernels_take(total.grad, part.grad)

    def add(self, total: "PendingGradient", part: "PendingGradient", stream: str) -> None:
        """Add ``part`` to ``total`` by the next launch; in bf16, rounded by the bits of ``stream``."""
        is_rounded = total.step.bits is not None and total.grad.dtype == torch.bfloat16
        seed = total.step.noise(stream).seed if is_rounded else -1
        if total.host is not None:  # it is on the device for now alone
            add_all_([total.grad], [part.grad], [seed])
            total.known_finite = total.own_norm = None
            return
        kind = (total.grad.device, total.grad.dtype, part.grad.dtype, is_rounded)
        if self.waiting:
            other, other_part, other_seed = self.waiting[-1]
            is_other_kind = kind != (other.grad.device, other.grad.dtype, other_part.grad.dtype, other_seed >= 0)
            if is_other_kind or id(total) in self._totals:  # programs of one launch have no order
                self.flush()
        self.waiting.append((total, part, seed))
        self._totals.add(id(total))
        self._bytes += part.grad.nbytes
        total.known_finite = total.own_norm = None
        if self._bytes >= _WAITING_BYTES:
            self.flush()

    def flush(self) -> None:
        """Add all parts that wait."""
        if not self.waiting:
            return
        totals, parts, seeds = zip(*self.waiting, strict=True)
        add_all_([total.grad for total in totals], [part.grad for part in parts], seeds)
        self.waiting.clear()
        self._totals.clear()
        self._bytes = 0
