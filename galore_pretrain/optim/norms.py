"""The norms of an update's gradients, for clipping and to know which are finite."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from galore_pretrain.tensors.shards import local, shard_of
from galore_pretrain.tensors.values import gradient_norm

if TYPE_CHECKING:
    from galore_pretrain.optim.execution import PendingGradient, PendingGradients
    from galore_pretrain.optim.optimizer import RuleOptimizer


def norms_of(params: Iterable[Tensor], pending: "PendingGradients") -> Tensor:
    """Return the norm of each parameter's gradient, fp32 (number of parameters).

    It is the norm that was measured, or else that of the pending sum, or else that of ``p.grad``. It is 0 where
    there is no gradient, or one that is not finite, whose update is skipped.
    """
    pending.sums.flush()
    distributor = pending.distributor
    params = list(params)
    found = [pending.gradients.get(p) for p in params]
    norms = [_norm(p, gradient) for p, gradient in zip(params, found, strict=True)]
    norms = list(_of_finite(norms, found))
    indices_of_parts: list[int] = []
    for index, (p, gradient) in enumerate(zip(params, found, strict=True)):
        if distributor is not None and _is_of_shard(p, gradient):
            indices_of_parts.append(index)
    if distributor is not None and indices_of_parts:
        part_norms = [norms[index] for index in indices_of_parts]
        whole_norms = distributor.norms(part_norms)
        for index, norm in zip(indices_of_parts, whole_norms, strict=True):
            norms[index] = norm
    return torch.stack(norms)


# One by one, the norms of all gradients would be as many launches. Those that are shared out, and those that have
# been accumulated, come by other ways.
def measure_all(optimizer: "RuleOptimizer", params: Iterable[Tensor]) -> None:
    """Make the gradients of ``params`` pending on a GPU, with their norms found by one operation."""
    found: list[PendingGradient] = []
    for p in params:
        slot = optimizer.slots[p]
        if not slot.on_gpu or slot.is_shared:
            continue
        pending = optimizer.pending.pending_of(p)
        if pending is None or pending.host is not None:  # which is found while the sum is on the device
            continue
        if pending.known_finite is None and pending.own_norm is None:
            found.append(pending)
    if not found:
        return
    norms = torch._foreach_norm([pending.grad for pending in found], 2, torch.float32)
    for pending, norm in zip(found, norms, strict=True):
        pending.own_norm = norm


# All flags are found at once. On a GPU a gradient that came with its norm has none of its own yet.
def _of_finite(norms: Sequence[Tensor], gradients: Sequence["PendingGradient | None"]) -> Sequence[Tensor]:
    """Return fp32 ``norms`` with 0 for those of ``gradients`` that are not finite, and let each know whether it is."""
    unknown: list[PendingGradient] = []
    own_norms: list[Tensor] = []
    for pending in gradients:
        if pending is not None and pending.known_finite is None and pending.own_norm is not None:
            unknown.append(pending)
            own_norms.append(pending.own_norm)
    if unknown:
        for pending, flag in zip(unknown, (torch.stack(own_norms) < math.inf).unbind(), strict=True):
            pending.finite = flag
    stacked = torch.stack(list(norms))
    valid = stacked < math.inf
    always = torch.ones((), dtype=torch.bool, device=stacked.device)
    valid &= torch.stack([always if pending is None else pending.finite for pending in gradients])
    return torch.where(valid, stacked, 0.0).unbind()


def _norm(p: Tensor, pending: "PendingGradient | None") -> Tensor:
    """Return the norm of what this process has of the gradient of ``p``, fp32, a scalar."""
    if pending is None:
        if p.grad is None:
            return torch.zeros((), device=p.device)
        return gradient_norm(local(p.grad))
    if pending.norm is not None:
        return pending.norm
    if pending.own_norm is not None and pending.parts == 1 and not pending.compressed:
        return pending.own_norm
    return gradient_norm(pending.grad)


def _is_of_shard(p: Tensor, pending: "PendingGradient | None") -> bool:
    """Return whether `_norm` is the norm of a part of the gradient, and other processes have the other parts."""
    if pending is None:
        return shard_of(p) is not None
    if pending.step.shard is None:
        return False
    if pending.compressed and pending.norm is None:  # a compressed gradient can be whole where the full one is not
        return pending.offset_step.shard is not None
    return True
