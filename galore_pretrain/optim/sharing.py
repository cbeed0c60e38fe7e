"""Processes that make an update together exchange here what it takes: sums, finiteness, bases, whole tensors.

Every process of a group must make the same calls in the same order, or all of them hang. So no call may depend on what
one process alone knows, such as a gradient that is not finite.
"""

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

# Sums over replicas that are under way at a time: about a layer's, since each takes an fp32 copy of its gradient.
_UNDERWAY = 8


class Distributor:
    """Shares an update out over the processes of ``mesh``, which is of replicas × shards, or of shards alone.

    Gradients come summed over the shards. They come summed over the replicas too, unless ``sums_replicas``: then the
    sums are made here, in fp32. Where a rule projects, the low-rank gradients are summed: projection is linear, so the
    result is the same but for roundings, and a matrix of m × n takes r/min(m, n) of the bytes at rank r.
    """

    def __init__(self, mesh: Any, *, sums_replicas: bool = False) -> None:
        from torch import distributed

        self._world_size = mesh.size()
        self.rank = distributed.get_rank()
        self.replica: int | None = None
        self._shards = mesh.size(-1)
        self._shard_group = mesh.get_group(mesh.ndim - 1)
        self._replica_group: Any = None
        if sums_replicas and mesh.ndim > 1:
            self._replica_group = mesh.get_group(0)
            self.replica = mesh.get_local_rank(0)
        # Sums that are under way, the oldest first, by the gradient's id: (gradient, fp32 sum, handle to wait for).
        self._underway: dict[int, tuple[PendingGradient, Tensor, Any]] = {}

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> "Distributor | None":
        """Return a distributor for the processes that share ``params``; None where none of these is a DTensor.

        ValueError where they lie on several meshes.
        """
        found: Any = None
        for p in params:
            mesh = getattr(p, "device_mesh", None)
            if found is not None and mesh is not None and mesh != found:
                raise ValueError(f"parameters lie on several meshes, {found} and {mesh}; give each an optimizer")
            found = found or mesh
        return None if found is None else cls(found)

    @property
    def stream_suffix(self) -> str:
        """Name this replica, so that its sums are rounded by other random bits than those of other replicas."""
        if self.replica is None:
            return ""
        return f" of replica {self.replica}"

    @property
    def may_differ(self) -> bool:
        """Say whether gradients can differ from process to process before `sync`."""
        return self._shards > 1 or self._replica_group is not None

    def start_sum(self, pending: "PendingGradient") -> None:
        """Begin to sum a gradient over the replicas, if that is done here. It must not be used before `sync`."""
        if self._replica_group is None or pending.summed:
            return
        from torch import distributed

        while len(self._underway) >= _UNDERWAY:
            oldest = next(iter(self._underway))
            self._end_sum(oldest)
        pending.summed = True
        total = pending.grad.float().contiguous()
        group = self._replica_group
        work = distributed.all_reduce(total, group=group, async_op=True)
        self._underway[id(pending)] = (pending, total, work)

    def _end_sum(self, key: int) -> None:
        """Wait for a sum that is under way, and write it to its gradient, rounded with the replicas' common bits."""
        pending, total, work = self._underway.pop(key)
        work.wait()
        is_finite = torch.linalg.vector_norm(total).isfinite()  # parts that are finite can have a sum that is not
        pending.finite = pending.finite & is_finite
        pending.own_norm = None  # which was that of this replica's gradient
        if total is not pending.grad:
            pending.offset_step.store(pending.grad, total, "replicas")

    def discard(self) -> None:
        """Wait for the sums that are under way, and forget them."""
        for _, _, work in self._underway.values():
            work.wait()
        self._underway.clear()

    # A gradient counts as finite if it is finite on every process: else some would skip an update that others make. The
    # flags of all gradients (number of gradients) go in one message: its latency costs more than its bytes.
    def sync(self, gradients: Sequence["PendingGradient"]) -> None:
        """Sum the gradients that are not summed yet, and let all processes know which are finite everywhere."""
        for pending in gradients:
            self.start_sum(pending)
        for pending in gradients:
            if id(pending) in self._underway:
                self._end_sum(id(pending))
        if not self.may_differ:
            return
        unsynced = [pending for pending in gradients if not pending.synced]
        if not unsynced:
            return
        flags = torch.stack([pending.finite for pending in unsynced])
        for pending, is_finite in zip(unsynced, self.agreed(flags), strict=True):
            pending.finite = is_finite
            pending.synced = True

    def agreed(self, flags: Tensor) -> Tensor:
        """Return which of boolean ``flags`` (any shape) are true on every process that makes these updates."""
        if not self.may_differ:
            return flags
        from torch import distributed

        group = None  # all processes
        if self._replica_group is None:  # replicas have equal gradients, so each can ask its own shards
            group = self._shard_group
        counts = (~flags).float()  # of processes on which a flag is false
        distributed.all_reduce(counts, group=group)
        return counts == 0

    def norms(self, part_norms: Sequence[Tensor]) -> Tensor:
        """Return the norm of each whole tensor from the norm of this process's part of it, fp32; 0 where it overflows.

        ``part_norms`` are scalars, and the result has one element for each.
        """
        from torch import distributed

        squares = torch.stack([norm.square() for norm in part_norms])
        distributed.all_reduce(squares, group=self._shard_group)
        is_finite = squares.isfinite()
        squares = torch.where(is_finite, squares, 0.0)
        return squares.sqrt_()

    # A decomposition takes longer than sending its result, so the bases that are due are dealt out: a round gives one
    # matrix to each process. A process gathers the whole gradient (m × n) of its matrix alone, so one is in memory at a
    # time. All gradients of a round are gathered before any process decomposes: the others would wait for it otherwise.
    def refresh_bases(self, gradients: Iterable["PendingGradient"]) -> None:
        """Renew the bases that are due. One process finds each, in the whole gradient, and sends it to the others."""
        due = [pending for pending in gradients if pending.refresh_due]
        for start in range(0, len(due), self._world_size):
            batch = due[start : start + self._world_size]
            found_here = self._find_bases_here(batch)
            for owner, pending in enumerate(batch):
                bases = found_here
                if bases is None or owner != self.rank:
                    bases = pending.rule.empty_bases(pending.state)
                new_bases = self._broadcast_bases(owner, bases)
                pending.set_bases(new_bases)

    def _find_bases_here(self, batch: Sequence["PendingGradient"]) -> NewBases | None:
        """Gather gradient i of ``batch`` to process i, and return the bases of this process's gradient, if any."""
        assigned: tuple[PendingGradient, Tensor] | None = None
        for owner, pending in enumerate(batch):
            whole = self._gather_to(owner, pending.grad, pending.step.shard)
            if whole is not None:
                assigned = (pending, whole)
        if assigned is None:
            return None
        pending, whole = assigned
        return pending.rule.find_bases(whole, pending.state, pending.step)

    def _broadcast_bases(self, owner: int, bases: NewBases) -> NewBases:
        """Return the bases of ``owner`` on every process. On the others, ``bases`` are written over."""
        from torch import distributed

        left, right, found, overlap = bases
        if left is not None:
            left = left.float().contiguous()
            distributed.broadcast(left, src=owner)
        if right is not None:
            right = right.float().contiguous()
            distributed.broadcast(right, src=owner)
        numbers = found.float()
        if overlap is not None:
            numbers = torch.stack((numbers, overlap))
        distributed.broadcast(numbers, src=owner)
        if overlap is not None:
            numbers, overlap = numbers.unbind()
        return NewBases(left, right, numbers > 0, overlap)

    def gather(self, part: Tensor, shard: Shard) -> Tensor:
        """Return, on every process, the whole tensor of which each has a ``part``."""
        from torch import distributed

        padded = _padded(part, shard)
        parts = [torch.empty_like(padded) for _ in range(shard.count)]
        distributed.all_gather(parts, padded, group=self._shard_group)
        return _joined(parts, shard).contiguous()

    def _gather_to(self, owner: int, part: Tensor, shard: Shard | None) -> Tensor | None:
        """Return, on ``owner``, the whole tensor of which each process has a ``part``; None elsewhere."""
        from torch import distributed

        is_owner = owner == self.rank
        if shard is None:
            return part if is_owner else None
        if owner // self._shards != self.rank // self._shards:  # another replica has the owner, and gathers there
            return None
        padded = _padded(part, shard)
        if not is_owner:
            distributed.gather(padded, dst=owner, group=self._shard_group)
            return None
        parts = [torch.empty_like(padded) for _ in range(shard.count)]
        distributed.gather(padded, parts, dst=owner, group=self._shard_group)
        return _joined(parts, shard)


def _padded(part: Tensor, shard: Shard) -> Tensor:
    """Return ``part`` with zeros behind it, as long as the longest part: messages of a gathering are alike."""
    shape = list(shard.shape)
    shape[shard.dim] = shard.length
    padded = part.new_zeros(shape)
    length = part.shape[shard.dim]
    padded.narrow(shard.dim, 0, length).copy_(part)
    return padded


def _joined(parts: Sequence[Tensor], shard: Shard) -> Tensor:
    """Return the whole tensor from the padded parts of all processes; the padding is at its end."""
    padded = torch.cat(list(parts), shard.dim)
    length = shard.shape[shard.dim]
    return padded.narrow(shard.dim, 0, length)


# Gradient and state are gathered, so that the rule sees the whole tensor (m × n) as one process would. All processes
# make the same update of it, and each keeps its part of the direction and of the state.
def update_gathered(
    distributor: Distributor | None,
    pending: "PendingGradient",
    weight: Tensor,
    decay: float,
) -> Direction:
    """Return the direction for this process's part of a tensor, by a rule that needs the whole tensor.

    ``weight`` is this process's part. Where the rule decays by ``l2``, ``decay`` · ``weight`` is added to the gradient.
    """
    rule = pending.rule
    shard = pending.step.shard
    part = pending.state
    assert shard is not None
    assert distributor is not None
    layouts = {name: rule.layout(name, part, shard) for name in part}
    whole: State = {}
    for name, layout in layouts.items():
        if layout is None:
            whole[name] = part[name]
        else:
            whole[name] = distributor.gather(part[name], layout)
    grad = distributor.gather(pending.grad, shard)
    if decay and rule.decay == "l2":
        # No name for the whole weight, which would keep it during the update.
        grad = torch.add(grad.float(), distributor.gather(weight, shard), alpha=decay)
    step = replace(pending.step, shard=None)
    rule.start(whole, step)
    direction = rule.update(grad, whole, step)
    for name, layout in layouts.items():
        if layout is not None:
            new_part = layout.of(whole[name])
            part[name].copy_(new_part)
    return direction.of(shard)
