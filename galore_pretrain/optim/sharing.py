"""Gradients on their way to an update, and what the processes that make it together tell each other of them first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.optim.galore import GaLore, NewBases
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.shards import Shard

_UNDERWAY = 8  # sums over replicas that are waited for at a time: a layer's, so that their copies take little


@dataclass
class Waiting:
    """The sum of the gradients of an update so far: low-rank if ``projected``. ``finite``, a scalar: whether all of
    them were, on all processes once that is ``agreed``. ``norm`` is that of the whole gradient, where it was measured
    (of the part at hand). ``rule`` and ``state`` are those that will use it."""

    grad: Tensor
    step: Step
    finite: Tensor
    rule: UpdateRule
    state: State
    projected: bool = False
    norm: Tensor | None = None
    parts: int = 1
    agreed: bool = False
    summed: bool = False

    @property
    def place(self) -> Step:
        """The update, counted from where ``grad`` begins in the whole tensor."""
        if self.projected and isinstance(self.rule, GaLore):
            return self.rule.low_step(self.state, self.step)
        return self.step.placed()

    @property
    def is_due(self) -> bool:
        """Whether a new basis is to be found in ``grad``."""
        return isinstance(self.rule, GaLore) and not self.projected and self.rule.is_due(self.step)

    def project(self) -> None:
        """Keep the low-rank gradient alone, in the basis in use."""
        if isinstance(self.rule, GaLore) and not self.projected:
            self.grad, self.projected = self.rule.project(self.grad, self.state, self.step.shard), True

    def settle(self) -> None:
        """The same, in a new basis if one is due."""
        if isinstance(self.rule, GaLore) and not self.projected:
            self.grad = self.rule.settle(self.grad, self.state, self.step.only_if(self.finite))
            self.projected = True


class Pool:
    """The processes that make one update together: those of ``mesh``, which is of replicas × shards, or shards alone.

    Gradients come summed over the shards; over the replicas too, unless ``sums_replicas``: then that is done here, in
    fp32, of low-rank gradients where they are projected. Projection is linear, so the result is the same but for
    roundings, and of a matrix m × n of rank r it takes r/min(m, n) of the bytes.
    """

    def __init__(self, mesh: Any, *, sums_replicas: bool = False) -> None:
        from torch import distributed

        self.ranks = range(mesh.size())
        self.me, self._shards = distributed.get_rank(), mesh.size(-1)
        self._group = mesh.get_group(mesh.ndim - 1)
        self._replicas = mesh.get_group(0) if sums_replicas and mesh.ndim > 1 else None
        self.replica = mesh.get_local_rank(0) if self._replicas is not None else None
        self._underway: dict[int, tuple[Waiting, Tensor, Any]] = {}  # by what they are of, the oldest first

    @classmethod
    def of(cls, params: Sequence[Tensor]) -> "Pool | None":
        """Those that share ``params``; None where this process is alone."""
        meshes = [mesh for p in params if (mesh := getattr(p, "device_mesh", None)) is not None]
        return cls(meshes[0]) if meshes else None

    @property
    def may_differ(self) -> bool:
        """Whether one process can have a gradient that another has not."""
        return self._shards > 1 or self._replicas is not None

    def start_sum(self, waiting: Waiting) -> None:
        """Begin to sum over the replicas, if that is to be done here; the gradient must not be used before `agree`."""
        if self._replicas is None or waiting.summed:
            return
        from torch import distributed

        while len(self._underway) >= _UNDERWAY:
            self._end_sum(next(iter(self._underway)))
        waiting.summed = True
        total = waiting.grad.float().contiguous()
        work = distributed.all_reduce(total, group=self._replicas, async_op=True)
        self._underway[id(waiting)] = waiting, total, work

    def _end_sum(self, key: int) -> None:
        waiting, total, work = self._underway.pop(key)
        work.wait()
        waiting.finite = waiting.finite & torch.linalg.vector_norm(total).isfinite()
        if total is not waiting.grad:
            waiting.place.store(waiting.grad, total, "replicas")

    def discard(self) -> None:
        """Forget the sums that are on their way."""
        for _, _, work in self._underway.values():
            work.wait()
        self._underway.clear()

    def agree(self, found: Sequence[Waiting]) -> None:
        """Sum what is not summed; a gradient that is not finite on one process is so on all. One message."""
        for waiting in found:
            self.start_sum(waiting)
        for waiting in found:
            if id(waiting) in self._underway:
                self._end_sum(id(waiting))
        asked = [waiting for waiting in found if not waiting.agreed] if self.may_differ else []
        if not asked:
            return
        from torch import distributed

        bad = torch.stack([~waiting.finite for waiting in asked]).float()
        distributed.all_reduce(bad, group=self._group if self._replicas is None else None)
        for waiting, count in zip(asked, bad, strict=True):
            waiting.finite, waiting.agreed = count == 0, True

    def norms(self, parts: Sequence[Tensor]) -> Tensor:
        """The norm of each tensor from those of the ``parts`` that the processes hold, fp32. 0 where it overflows."""
        from torch import distributed

        total = torch.stack([part.square() for part in parts])
        distributed.all_reduce(total, group=self._group)
        return torch.where(total.isfinite(), total, 0.0).sqrt_()

    def renew(self, found: Iterable[Waiting]) -> None:
        """The bases that are due, each found by one process in the whole gradient and sent to the others."""
        due = [waiting for waiting in found if waiting.is_due]
        for start in range(0, len(due), len(self.ranks)):
            new: NewBases | None = None
            work = list(zip(due[start : start + len(self.ranks)], self.ranks, strict=False))
            for waiting, whole in [(w, self._gather(w.grad, w.step.shard, owner)) for w, owner in work]:
                assert isinstance(waiting.rule, GaLore)
                new = new if whole is None else waiting.rule.find(whole, waiting.state)
            for waiting, owner in work:
                rule, state = waiting.rule, waiting.state
                assert isinstance(rule, GaLore)
                sent = new if owner == self.me and new is not None else rule.blank(state)
                left, right = (basis if basis is None else basis.float().contiguous() for basis in sent[:2])
                better = sent.found.float()
                self._send([part for part in (left, right, better) if part is not None], owner)
                rule.adopt(NewBases(left, right, better > 0), state, waiting.step.only_if(waiting.finite))
                waiting.project()

    def _gather(self, part: Tensor, shard: Shard | None, owner: int) -> Tensor | None:
        """On ``owner``, the whole tensor of which each process has a ``part``; None elsewhere."""
        from torch import distributed

        if shard is None:
            return part if owner == self.me else None
        if owner // self._shards != self.me // self._shards:  # another replica's
            return None
        shape = list(shard.shape)
        shape[shard.dim] = shard.length
        padded = part.new_zeros(shape)
        padded.narrow(shard.dim, 0, part.shape[shard.dim]).copy_(part)
        parts = [torch.empty_like(padded) for _ in range(shard.count)] if owner == self.me else None
        distributed.gather(padded, parts, dst=owner, group=self._group)
        return torch.cat(parts, shard.dim).narrow(shard.dim, 0, shard.shape[shard.dim]) if parts else None

    def _send(self, tensors: Sequence[Tensor], owner: int) -> None:
        """``tensors``, in place, become on all what they are on ``owner``."""
        from torch import distributed

        for tensor in tensors:
            distributed.broadcast(tensor, src=owner)
