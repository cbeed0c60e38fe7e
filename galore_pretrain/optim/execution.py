"""When updates run: all of them after backward, or each inside it; and the gradients that wait until then.

Both executions give a gradient to the same `PendingGradients` and call the same ``optimizer.update_param``. They differ
in when.
"""

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_pretrain.optim.moments import State
from galore_pretrain.optim.rule import Decay, NewBases, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.weights import add_rounded
from galore_pretrain.tensors.shards import Shard, local, shard_of
from galore_pretrain.tensors.values import gradient_norm

if TYPE_CHECKING:
    from galore_pretrain.optim.optimizer import RuleOptimizer
    from galore_pretrain.optim.sharing import Distributor

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Skips:
    """Counts what was left out: updates of one tensor that were skipped, and bases that were not renewed."""

    skipped: int = 0
    failed_refreshes: int = 0


class SkipCounts:
    """Counts `Skips` on the device where they happen, so that nobody waits for it."""

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}  # (skipped, failed refreshes)

    def count(self, step: Step) -> None:
        """Count what ``step`` left out."""
        device = step.failures[0].device if step.valid is None else step.valid.device
        none = torch.zeros((), dtype=torch.bool, device=device)
        skipped = none if step.valid is None else ~step.valid
        new = torch.stack([skipped.long(), torch.stack([none, *step.failures]).sum()])
        self._counts[new.device] = self._counts[new.device] + new if new.device in self._counts else new

    def take(self) -> Skips:
        """Return the counts and begin anew. Waits for the device."""
        if not self._counts:
            return Skips()
        counts = [count.tolist() for count in self._counts.values()]
        self._counts.clear()
        return Skips(*(sum(values) for values in zip(*counts, strict=True)))


@dataclass(slots=True)
class Slot:
    """A parameter's place in the optimizer: its group, its index among all, its rule, and which part of it is here.

    ``seed`` is that of its random numbers. ``is_shared``: other processes have a part in the parameter, or a copy.
    ``gathers``: the rule needs more of the tensor than the part that is here, so it is gathered for each update. The
    rule's answers that never change are kept beside it.
    """

    group: int
    index: int
    seed: int
    rule: UpdateRule
    shard: Shard | None
    is_shared: bool
    gathers: bool
    projects: bool = field(init=False)
    scope: Scope = field(init=False)
    decay: Decay = field(init=False)

    def __post_init__(self) -> None:
        self.projects, self.scope, self.decay = self.rule.projects, self.rule.scope, self.rule.decay

    @property
    def phase(self) -> float:
        """The place in [0, 1) of the parameter's refreshes among all: evenly spread, whatever the groups."""
        return self.index * _GOLDEN % 1.0


@dataclass(slots=True)
class PendingGradient:
    """The sum of the gradients of ``param`` in an update so far, on its way to that update.

    ``state`` and ``step`` are those that will use it. ``refresh_due``: new bases are still to be found in it.
    ``compressed``: it is what the rule's `compress` returned. ``finite``, a scalar: whether all of it was finite, on
    all processes once it is ``synced``. ``norm`` is that of the full gradient at hand, where it was measured.
    """

    param: Tensor
    slot: Slot
    grad: Tensor
    step: Step
    finite: Tensor
    state: State
    refresh_due: bool
    compressed: bool = False
    norm: Tensor | None = None
    parts: int = 1
    synced: bool = False
    summed: bool = False

    @property
    def rule(self) -> UpdateRule:
        """The rule that will use it."""
        return self.slot.rule

    @property
    def offset_step(self) -> Step:
        """The step that counts elements from where ``grad`` begins in the whole tensor."""
        if self.slot.shard is None:
            return self.step
        return self.rule.compressed_step(self.state, self.step) if self.compressed else self.step.placed()

    def compress(self) -> None:
        """Keep the compressed gradient alone, in the bases in use."""
        if self.slot.projects and not self.compressed:
            self.grad = self.slot.rule.compress(self.grad, self.state, self.step)
            self.compressed = True

    def refresh(self) -> None:
        """Find new bases in the gradient, which must be whole, and keep the compressed one alone."""
        if self.step.shard is not None:
            raise ValueError("new bases need the whole gradient: `PendingGradients.refresh` finds those of all")
        self.set_bases(self.rule.find_bases(self.grad, self.state))

    def set_bases(self, new: NewBases) -> None:
        """Take the new bases that were found in the gradient, and keep the compressed one alone."""
        self.rule.set_bases(new, self.state, self.step.where_valid(self.finite))
        self.refresh_due = False
        self.compress()


class PendingGradients:
    """Accumulates gradients until their update, and brings them into the form in which an update takes them.

    The order of what happens to one is kept here, whoever asks: it is accumulated, summed over processes, searched for
    new bases if they are due, compressed. `take` does what of that is still to be done.
    """

    def __init__(self, optimizer: "RuleOptimizer", distributor: "Distributor | None" = None) -> None:
        self._optimizer, self.distributor = optimizer, distributor
        self._pending: dict[Tensor, PendingGradient] = {}

    def __contains__(self, p: Tensor) -> bool:
        """Whether something was accumulated for ``p``."""
        return p in self._pending

    def get(self, p: Tensor) -> PendingGradient | None:
        """Return what was accumulated for ``p``."""
        return self._pending.get(p)

    def waits_for_all(self, p: Tensor) -> bool:
        """Whether the gradient of ``p`` is not used before an update's last, where several processes make one.

        What is compressed or gathered waits, as all must do that in one order; and where sums over replicas are under
        way, what is small, which would have to wait for them.
        """
        if self.distributor is None:
            return False
        slot = self._optimizer.slots[p]
        return slot.projects or slot.gathers or (self.distributor.replica is not None and p.ndim < 2)

    # A gradient is one tensor less as soon as it is here: `p.grad` is dropped. The first of an update is kept as it is,
    # further ones are added to it, a bf16 sum rounded stochastically. Where the rule projects and no new basis is due,
    # each is compressed before it is added, which takes r/min(m, n) of the memory: compressing is linear.
    @torch.no_grad()
    def accumulate(self, p: Tensor, *, compress: bool, measure: bool = False) -> None:
        """Add ``p.grad`` to what is pending for ``p`` and drop it; does nothing where there is none.

        ``compress`` keeps a compressed sum where the rule projects and no new basis is due at this update. ``measure``
        finds the norm of ``p.grad`` before it is dropped. Sums are in the gradient's dtype.
        """
        if p.grad is None or p.numel() == 0:
            return
        total = self._pending.get(p)
        part = self._part(p, total)
        p.grad = None
        if measure:
            part.norm = gradient_norm(part.grad)
        if compress and not part.refresh_due:
            part.compress()
        if total is None:
            if compress and not part.compressed:
                _own_storage(part)
            self._pending[p] = part
            return
        total.parts += 1
        total.finite = total.finite & part.finite
        if total.step.bits is None or total.grad.dtype != torch.bfloat16:
            total.grad.add_(part.grad)
            return
        replica = "" if self.distributor is None else self.distributor.stream_suffix
        add_rounded(total.grad, part.grad, part.offset_step, f"sum {total.parts}{replica}")

    def _part(self, p: Tensor, total: PendingGradient | None) -> PendingGradient:
        """Return ``p.grad`` as a part of the update whose other parts are ``total``."""
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise ValueError(f"a gradient is {grad.layout}; only dense ones are supported (Embedding(sparse=False))")
        slot = self._optimizer.slots[p]
        grad = local(grad) if slot.is_shared else grad.detach()
        if grad.ndim == 0:
            grad = grad.view(1)
        # ``norm < inf`` is one operation, `isfinite` four. In the gradient's own dtype: bf16 has fp32's range, and fp32
        # would cost eight times as much.
        finite = torch.as_tensor(torch.linalg.vector_norm(grad) < math.inf)
        if total is None:
            return self._start(p, slot, grad, finite)
        return PendingGradient(p, total.slot, grad, total.step, finite, total.state, total.refresh_due)

    def _start(self, p: Tensor, slot: Slot, grad: Tensor, finite: Tensor) -> PendingGradient:
        """Return the pending gradient of an update of ``p`` whose first part is ``grad``."""
        optimizer = self._optimizer
        state = optimizer.tensors(p)
        count = optimizer.state[p]["step"] + 1
        step = Step(
            count=count,
            lr=float(optimizer.param_groups[slot.group]["lr"]),
            seed=slot.seed,
            phase=slot.phase,
            bits=optimizer.random_bits(p, count) if p.dtype == torch.bfloat16 else None,
            shard=slot.shard,
        )
        if not slot.gathers:
            slot.rule.start(state, step)
        return PendingGradient(p, slot, grad, step, finite, state, slot.rule.next_refresh(step) == count)

    # Where the gradient can be seen to be finite, nothing has to look at it again; where a GPU would have to be waited
    # for, the step carries the question along, and answers it whenever something is kept.
    def take(self, p: Tensor) -> PendingGradient | None:
        """Remove and return the gradient of ``p`` in the form in which an update takes it; None where there is none."""
        pending = self._of(p)
        if pending is None:
            return None
        if self.distributor is not None:
            self.distributor.sync([pending])
        self._finalize(pending)
        self._pending.pop(p, None)
        is_seen = type(pending.finite) is Tensor and pending.finite.device.type == "cpu"
        if not (is_seen and pending.finite):
            pending.step = pending.step.where_valid(pending.finite)
        return pending

    def _finalize(self, pending: PendingGradient) -> None:
        """Find the bases that are due in a gradient, and keep the compressed one alone."""
        if pending.refresh_due:
            self._optimizer.observed("refresh", pending.param, pending.refresh)
        if not pending.compressed:
            pending.compress()

    def _of(self, p: Tensor) -> PendingGradient | None:
        """Return what is pending for ``p``, or else its gradient; that is then pending."""
        pending = self._pending.get(p)
        if pending is None and p.grad is not None:
            pending = self._pending[p] = self._part(p, None)
        return pending

    def _all(self, params: Iterable[Tensor]) -> Iterator[PendingGradient]:
        """Yield what is pending for each, or else its gradient, where there is one."""
        for p in params:
            if (pending := self._of(p)) is not None:
                yield pending

    @torch.no_grad()
    def compress(self, p: Tensor) -> None:
        """Find the bases of ``p`` that are due, and keep the compressed gradient alone."""
        if (pending := self._pending.get(p)) is not None:
            self._finalize(pending)

    @torch.no_grad()
    def start_sum(self, p: Tensor) -> None:
        """Begin to sum what is pending for ``p`` over the replicas, where that is done here."""
        if self.distributor is not None and (pending := self._pending.get(p)) is not None:
            self.distributor.start_sum(pending)

    @torch.no_grad()
    def sync(self, params: Iterable[Tensor]) -> None:
        """Sum gradients and let all know which are not finite, where processes share an update."""
        if self.distributor is not None and self.distributor.may_differ:
            self.distributor.sync(list(self._all(params)))

    @torch.no_grad()
    def refresh(self, params: Iterable[Tensor]) -> None:
        """Find the bases that are due, each by one process, where processes share an update."""
        if self.distributor is not None:
            pending = list(self._all(params))
            self._optimizer.observed("refresh", None, partial(self.distributor.refresh_bases, pending))

    @torch.no_grad()
    def compress_all(self, params: Iterable[Tensor]) -> None:
        """Keep of every gradient the compressed one alone, new bases found where they are due."""
        params = list(params)
        for p in params:
            self.accumulate(p, compress=True)
            if self.distributor is None:
                self.compress(p)
        if self.distributor is not None:
            self.sync(params)
            self.refresh(params)
            for p in params:
                self.compress(p)

    def norms(self, params: Iterable[Tensor]) -> Tensor:
        """Return the norm of each gradient, fp32 (number of parameters).

        It is that of the one that was measured, of the sum that is pending, or of ``p.grad``. 0 where there is none, or
        one that is not finite, whose update is skipped.
        """
        norms, shared = [], []
        for p in params:
            pending = self._pending.get(p)
            norm = _norm(p, pending)
            valid = norm.isfinite() if pending is None else pending.finite & norm.isfinite()
            norms.append(torch.where(valid, norm, 0.0))
            shared.append(self.distributor is not None and _is_part(p, pending))
        if self.distributor is None or not any(shared):
            return torch.stack(norms)
        roots = iter(self.distributor.norms([norm for norm, part in zip(norms, shared, strict=True) if part]))
        return torch.stack([next(roots) if part else norm for norm, part in zip(norms, shared, strict=True)])

    def discard(self, params: Iterable[Tensor] | None = None) -> None:
        """Drop the gradients of ``params``, accumulated or not; of all by default, with the sums under way."""
        for p in self._optimizer.slots if params is None else params:
            self._pending.pop(p, None)
            p.grad = None
        if params is None and self.distributor is not None:
            self.distributor.discard()


def _own_storage(part: PendingGradient) -> None:
    """Copy a gradient that is a piece of a larger storage: FSDP2 reduces a layer's into one, which must not be kept."""
    if part.grad.untyped_storage().nbytes() > part.grad.nbytes:
        part.grad = part.grad.clone()


def _norm(p: Tensor, pending: PendingGradient | None) -> Tensor:
    """Return the norm of what a parameter has of a gradient."""
    if pending is not None:
        return gradient_norm(pending.grad) if pending.norm is None else pending.norm
    return torch.zeros((), device=p.device) if p.grad is None else gradient_norm(local(p.grad))


def _is_part(p: Tensor, pending: PendingGradient | None) -> bool:
    """Whether that norm is of a part of the tensor, and other processes have the others."""
    if pending is None:
        return shard_of(p) is not None
    if pending.compressed and pending.norm is None:
        return pending.step.shard is not None and pending.offset_step.shard is not None
    return pending.step.shard is not None


@dataclass(frozen=True)
class Outcome:
    """Tells what came of an update.

    ``grad_norm`` is that of all gradients before clipping, where one was computed. ``skipped`` counts tensors that were
    left alone because their gradient was not finite, ``failed_refreshes`` the bases that could not be renewed.
    """

    grad_norm: float | None = None
    skipped: int = 0
    failed_refreshes: int = 0


class Execution(ABC):
    """Stands between the backward passes of an update and the next forward pass: what both executions share.

    The norm of all gradients is clipped to ``grad_clip`` (0: off). ``projected`` takes the norm of compressed gradients
    where the rule projects, which leaves nothing of the full ones once they are compressed.
    """

    def __init__(self, optimizer: "RuleOptimizer", grad_clip: float = 0.0, *, projected: bool = False) -> None:
        self._optimizer, self._pending = optimizer, optimizer.pending
        self._grad_clip, self._projected = grad_clip, projected
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
        """Do what is to be done when a backward pass has added to ``p.grad`` all that it will."""

    def begin(self, micro_batch: int, micro_batches: int) -> None:
        """Say that the next backward pass is number ``micro_batch`` (from 0) of an update's."""
        self._micro_batch, self._micro_batches = micro_batch, micro_batches

    def complete(self) -> None:
        """Make the updates that are still to be made. Waits for no device."""
        if self._optimizer.observer is None:
            self._complete()
        else:
            self._optimizer.observed("complete", None, self._complete)

    def _complete(self) -> None:
        if self._grad_clip > 0 and self._compresses_first():
            self._pending.compress_all(self._params)
        shares = self._pending.distributor is not None
        if shares:
            self._pending.sync(self._params)
        coefficient = self._norm = None
        if self._grad_clip > 0:
            self._norm = self._pending.norms(self._params).norm()
            coefficient = (self._grad_clip / (self._norm + 1e-6)).clamp(max=1.0)
        if shares:
            self._pending.refresh(self._params)
        for p in self._params:
            if p.grad is not None or p in self._pending:
                self._optimizer.update_param(p, coefficient)
                p.grad = None

    @abstractmethod
    def _compresses_first(self) -> bool:
        """Whether gradients are to be compressed before their norm is found."""

    def outcome(self) -> Outcome:
        """Return what came of the update that was completed. Waits for the device."""
        faults = self._optimizer.read_skips()
        return Outcome(None if self._norm is None else float(self._norm), faults.skipped, faults.failed_refreshes)

    def discard(self) -> None:
        """Drop the gradients of an update that is not to be made."""
        self._optimizer.discard()
        self._optimizer.read_skips()  # of an update that is not made

    def _accumulate(self, p: Tensor, *, compress: bool, measure: bool = False) -> None:
        if self._optimizer.observer is None:
            self._pending.accumulate(p, compress=compress, measure=measure)
            return
        work = partial(self._pending.accumulate, p, compress=compress, measure=measure)
        self._optimizer.observed("accumulate", p, work)


def _remove(handles: list[Any]) -> None:
    """Take hooks off their tensors."""
    for handle in handles:
        handle.remove()


class GlobalStep(Execution):
    """Makes all updates after the last backward pass."""

    def _hook(self, p: Tensor) -> None:
        if self._micro_batches > 1:  # torch would add them up in the gradient's dtype, rounded to nearest
            self._accumulate(p, compress=False)

    def _compresses_first(self) -> bool:
        return self._projected


class Layerwise(Execution):
    """Makes each update as soon as the last backward pass has its gradient, which is then dropped.

    So no full set of gradients ever exists. The sum over micro-batches is kept compressed where the rule projects
    (GaLore is linear in the gradient between two bases); only matrices whose basis is due keep a full one. Clipping has
    to see all norms before the first update, so updates wait, compressed, for the end: of one micro-batch the full norm
    is known, of several only the ``projected``. The learning rate must be in the groups before backward. Where several
    processes make an update, compressed gradients wait for its end too: there all agree on what was finite, and share
    out the bases that are due.
    """

    def _hook(self, p: Tensor) -> None:
        is_last = self._micro_batch == self._micro_batches - 1
        clips = self._grad_clip > 0
        waits = self._pending.distributor is not None and self._pending.waits_for_all(p)
        if self._micro_batches > 1 or clips or waits:
            measure = clips and self._micro_batches == 1 and not self._projected
            self._accumulate(p, compress=True, measure=measure)
        if not is_last:
            return
        if waits:
            self._pending.start_sum(p)
        elif clips:
            self._optimizer.observed("compress", p, partial(self._pending.compress, p))
        else:
            self._optimizer.update_param(p)
            p.grad = None

    def _compresses_first(self) -> bool:
        return self._optimizer.is_shared

    def begin(self, micro_batch: int, micro_batches: int) -> None:
        """Say which backward pass is next. ValueError where the norm that is to be clipped will not be known."""
        if micro_batches > 1 and self._grad_clip > 0 and not self._projected and self._optimizer.projects:
            raise ValueError(
                "layerwise updates of several micro-batches know no norm of the full gradient: clip the projected one"
            )
        super().begin(micro_batch, micro_batches)
