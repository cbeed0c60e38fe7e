"""What the processes that make an update together tell each other: sums, what is finite, bases, whole tensors."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import Direction, NewBases
from galore_pretrain.tensors.shards import Shard

if TYPE_CHECKING:
    from galore_pretrain.optim.execution import PendingGradient

_UNDERWAY = 8  # sums over replicas that are waited for at a time: a layer's, so that their copies take little


class Distributor:
    """Shares an update out over the processes of ``mesh``, which is of replicas × shards, or shards alone.

    Gradients come summed over the shards. They come summed over the replicas too, unless ``sums_replicas``: then that
    is done here, in fp32, of low-rank gradients where they are projected. Projection is linear, so the result is the
    same but for roundings, and of a matrix m × n of rank r it takes r/min(m, n) of the bytes.
    """

    def __init__(self, mesh: Any, *, sums_replicas: bool = False) -> None:
        from torch import distributed

        self.ranks = range(mesh.size())
        self.rank, self._shards = distributed.get_rank(), mesh.size(-1)
        self._group = mesh.get_group(mesh.ndim - 1)
        self._replicas = mesh.get_group(0) if sums_replicas and mesh.ndim > 1 else None
        self.replica = mesh.get_local_rank(0) if self._replicas is not None else None
        self._underway: dict[int, tuple[PendingGradient, Tensor, Any]] = {}  # by gradient, the oldest first

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> "Distributor | None":
        """Return that of the processes which share ``params``; None where this process is alone."""
        meshes = [mesh for p in params if (mesh := getattr(p, "device_mesh", None)) is not None]
        return cls(meshes[0]) if meshes else None

    @property
    def stream_suffix(self) -> str:
        """Return what tells the random bits of this replica's sums from those of others."""
        return "" if self.replica is None else f" of replica {self.replica}"

    @property
    def may_differ(self) -> bool:
        """Whether one process can have a gradient that another has not."""
        return self._shards > 1 or self._replicas is not None

    def start_sum(self, pending: "PendingGradient") -> None:
        """Begin to sum over the replicas, if that is done here. The gradient must not be used before `sync`."""
        if self._replicas is None or pending.summed:
            return
        from torch import distributed

        while len(self._underway) >= _UNDERWAY:
            self._end_sum(next(iter(self._underway)))
        pending.summed = True
        total = pending.grad.float().contiguous()
        work = distributed.all_reduce(total, group=self._replicas, async_op=True)
        self._underway[id(pending)] = pending, total, work

    def _end_sum(self, key: int) -> None:
        pending, total, work = self._underway.pop(key)
        work.wait()
        pending.finite = pending.finite & torch.linalg.vector_norm(total).isfinite()
        if total is not pending.grad:
            pending.offset_step.store(pending.grad, total, "replicas")

    def discard(self) -> None:
        """Forget the sums that are under way."""
        for _, _, work in self._underway.values():
            work.wait()
        self._underway.clear()

    def sync(self, gradients: Sequence["PendingGradient"]) -> None:
        """Sum what is not summed yet, and let all know what is not finite on one process. One message."""
        for pending in gradients:
            self.start_sum(pending)
        for pending in gradients:
            if id(pending) in self._underway:
                self._end_sum(id(pending))
        asked = [pending for pending in gradients if not pending.synced] if self.may_differ else []
        if not asked:
            return
        from torch import distributed

        bad = torch.stack([~pending.finite for pending in asked]).float()
        distributed.all_reduce(bad, group=self._group if self._replicas is None else None)
        for pending, count in zip(asked, bad, strict=True):
            pending.finite, pending.synced = count == 0, True

    def norms(self, parts: Sequence[Tensor]) -> Tensor:
        """Return the norm of each tensor from those of the ``parts`` that the processes hold, fp32. 0 for overflow."""
        from torch import distributed

        total = torch.stack([part.square() for part in parts])
        distributed.all_reduce(total, group=self._group)
        return torch.where(total.isfinite(), total, 0.0).sqrt_()

    def refresh_bases(self, gradients: Iterable["PendingGradient"]) -> None:
        """Renew the bases that are due. Each is found by one process in the whole gradient and sent to the others."""
        due = [pending for pending in gradients if pending.refresh_due]
        for start in range(0, len(due), len(self.ranks)):
            found: NewBases | None = None
            work = list(zip(due[start : start + len(self.ranks)], self.ranks, strict=False))
            wholes = [(pending, self._gather_to(owner, pending.grad, pending.step.shard)) for pending, owner in work]
            for pending, whole in wholes:
                if whole is not None:
                    found = pending.rule.find_bases(whole, pending.state)
            for pending, owner in work:
                mine = found if owner == self.rank else None
                new = self._broadcast_bases(owner, mine or pending.rule.empty_bases(pending.state))
                pending.set_bases(new)

    def _broadcast_bases(self, owner: int, bases: NewBases) -> NewBases:
        """Return the bases of ``owner``; elsewhere, ``bases`` are there to be written into."""
        left, right = (None if basis is None else basis.float().contiguous() for basis in bases[:2])
        found = bases.found.float()
        self._send([tensor for tensor in (left, right, found) if tensor is not None], owner)
        return NewBases(left, right, found > 0)

    def gather(self, part: Tensor, shard: Shard) -> Tensor:
        """Return, on every process, the whole tensor of which each has a ``part``."""
        from torch import distributed

        padded = self._padded(part, shard)
        parts = [torch.empty_like(padded) for _ in range(shard.count)]
        distributed.all_gather(parts, padded, group=self._group)
        return torch.cat(parts, shard.dim).narrow(shard.dim, 0, shard.shape[shard.dim]).contiguous()

    def _gather_to(self, owner: int, part: Tensor, shard: Shard | None) -> Tensor | None:
        """Return, on ``owner``, the whole tensor of which each process has a ``part``; None elsewhere."""
        from torch import distributed

        if shard is None:
            return part if owner == self.rank else None
        if owner // self._shards != self.rank // self._shards:  # another replica's
            return None
        padded = self._padded(part, shard)
        parts = [torch.empty_like(padded) for _ in range(shard.count)] if owner == self.rank else None
        distributed.gather(padded, parts, dst=owner, group=self._group)
        return torch.cat(parts, shard.dim).narrow(shard.dim, 0, shard.shape[shard.dim]) if parts else None

    def _padded(self, part: Tensor, shard: Shard) -> Tensor:
        """Return ``part`` with zeros behind it, as long as the longest: messages of a gathering are alike."""
        shape = list(shard.shape)
        shape[shard.dim] = shard.length
        padded = part.new_zeros(shape)
        padded.narrow(shard.dim, 0, part.shape[shard.dim]).copy_(part)
        return padded

    def _send(self, tensors: Sequence[Tensor], owner: int) -> None:
        """Make ``tensors``, in place, on all what they are on ``owner``."""
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor, src=owner)


# Gradient and state are gathered, so that the rule sees the whole tensor as one process would. All processes make the
# same update of it, and each keeps its part of the direction and of the state.
def update_gathered(
    distributor: Distributor | None, pending: "PendingGradient", weight: Tensor, decay: float
) -> Direction:
    """Return the direction of the part of a tensor that is here, by a rule that needs the whole of it.

    ``weight`` is this process's part. Where the rule decays by ``l2``, ``decay`` · it is added to the gradient.
    """
    rule, shard, own = pending.rule, pending.step.shard, pending.state
    assert shard is not None
    assert distributor is not None
    layouts = {name: rule.layout(name, own, shard) for name in own}
    whole: State = {}
    for name, layout in layouts.items():
        whole[name] = own[name] if layout is None else distributor.gather(own[name], layout)
    grad = distributor.gather(pending.grad, shard)
    if decay and rule.decay == "l2":
        grad = torch.add(grad.float(), distributor.gather(weight, shard), alpha=decay)
    step = replace(pending.step, shard=None)
    rule.start(whole, step)
    direction = rule.update(grad, whole, step).of(shard)
    for name, layout in layouts.items():
        if layout is not None:
            own[name].copy_(layout.of(whole[name]))
    return direction
