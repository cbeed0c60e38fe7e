"""An execution decides when updates run, all after backward or each inside it; gradients wait here until then.

Both executions give gradients to the same `PendingGradients` and call the same ``optimizer.update_param``. They differ
only in when they do so.
"""

import math
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from galore_pretrain.optim.host_sums import HostSum, HostSums
from galore_pretrain.optim.moments import State
from galore_pretrain.optim.norms import measure_all, norms_of
from galore_pretrain.optim.overlap import overlaps_of_refresh, subspace_overlap
from galore_pretrain.optim.rule import NewBases, UpdateRule
from galore_pretrain.optim.slots import Slot
from galore_pretrain.optim.sums import Sums
from galore_pretrain.optim.update import Step
from galore_pretrain.optim.weights import add_rounded
from galore_pretrain.tensors.coded import codes_of
from galore_pretrain.tensors.place import is_gpu
from galore_pretrain.tensors.rounding import derive_seed
from galore_pretrain.tensors.shards import local
from galore_pretrain.tensors.values import gradient_norm

if TYPE_CHECKING:
    from galore_pretrain.optim.optimizer import RuleOptimizer
    from galore_pretrain.optim.sharing import Distributor

_MOST_UNCOUNTED = 4096  # updates of a tensor, whose flags are kept one by one
_PATIENCE = 100  # steps after which a warning tells of skips that nobody has read


def _is_autocast() -> bool:
    """Return whether the caller is inside ``torch.autocast``."""
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


@contextmanager
def own_precision() -> Iterator[None]:
    """Leave ``torch.autocast`` meanwhile: an update computes in the dtypes that its rule says, whoever calls it."""
    if not _is_autocast():
        yield
        return
    with ExitStack() as contexts:
        for device in ("cpu", "cuda"):
            contexts.enter_context(torch.autocast(device, enabled=False))
        yield


@dataclass(frozen=True)
class Skips:
    """Counts what was left out: updates of one tensor that were skipped, and bases that were not renewed."""

    skipped: int = 0
    failed_refreshes: int = 0


class SkipCounts:
    """Counts `Skips` on the device where they happen, so that nobody waits for it."""

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}  # (skipped, failed refreshes), int64
        self._steps: list[Step] = []  # that are still to be counted
        self._steps_since_taken = 0

    def count(self, step: Step) -> None:
        """Count what ``step`` left out. It must have a ``valid`` or ``failures``."""
        self._steps.append(step)
        if len(self._steps) >= _MOST_UNCOUNTED:
            self._gather()

    # The flags of many tensors are added by a few operations, where one by one would take five each.
    def _gather(self) -> None:
        """Add what the steps left out, all at once."""
        devices: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}
        for step in self._steps:
            for flag in step.failures:
                devices.setdefault(flag.device, ([], []))[1].append(flag)
            if step.valid is not None:
                devices.setdefault(step.valid.device, ([], []))[0].append(step.valid)
        self._steps.clear()
        for device, (valid, failures) in devices.items():
            skipped = failed = torch.zeros((), dtype=torch.int64, device=device)
            if valid:
                skipped = (~torch.stack(valid)).sum()
            if failures:
                failed = torch.stack(failures).sum()
            counts = torch.stack([skipped, failed])
            if device in self._counts:
                counts = self._counts[device] + counts
            self._counts[device] = counts

    def take(self) -> Skips:
        """Return the counts and begin anew. Waits for the device."""
        if self._steps:
            self._gather()
        self._steps_since_taken = 0
        skipped = 0
        failed_refreshes = 0
        for counts in self._counts.values():
            values = counts.tolist()
            skipped += values[0]
            failed_refreshes += values[1]
        self._counts.clear()
        return Skips(skipped, failed_refreshes)

    def end_step(self) -> None:
        """Note that ``optimizer.step`` ends, and warn its caller of skips where nobody took the counts for long."""
        self._gather()
        self._steps_since_taken += 1
        if self._steps_since_taken < _PATIENCE:
            return
        skips = self.take()
        if skips != Skips():
            warnings.warn(
                f"in the last {_PATIENCE} steps, {skips.skipped} gradients were not finite and their tensors skipped, "
                f"and {skips.failed_refreshes} bases could not be renewed",
                stacklevel=3,
            )


@dataclass(slots=True)
class PendingGradient:
    """Holds what has been summed so far of the gradient of one parameter, ``param``, for one update.

    ``grad`` is m × n, or what the rule's `compress` made of that once it is ``compressed``. ``state`` and ``step`` are
    those of the update. ``refresh_due`` says that new bases are still to be found in it. ``finite``, a scalar, says
    whether all of it was finite: on this process, and on all once it is ``synced``. On a GPU that is found when
    somebody asks, from ``own_norm``, the norm of the whole sum. ``norm`` is that of the full gradient at hand, where it
    was measured. ``parts`` counts the gradients in the sum. ``summed`` says that its sum over replicas was begun.
    ``first_half`` is a copy of what half of the micro-batches came to, where the noise of the bases is to be measured.
    ``overlaps`` holds what was measured of a refresh, by the key of its metric. ``host`` is the sum on the host, where
    it lies there: then ``grad`` has values between `HostSums.bring` and `HostSums.put_back` alone.
    """

    param: Tensor
    slot: Slot
    grad: Tensor
    step: Step
    known_finite: Tensor | None
    state: State
    refresh_due: bool
    compressed: bool = False
    norm: Tensor | None = None
    own_norm: Tensor | None = None
    parts: int = 1
    synced: bool = False
    summed: bool = False
    first_half: Tensor | None = None
    overlaps: dict[str, Tensor] | None = None
    host: HostSum | None = None

    @property
    def finite(self) -> Tensor:
        """Return whether all of the gradient was finite, a boolean scalar."""
        if self.known_finite is None:
            self.measure()
            assert self.own_norm is not None
            self.known_finite = self.own_norm < math.inf
        return self.known_finite

    @finite.setter
    def finite(self, value: Tensor) -> None:
        self.known_finite = value

    def measure(self) -> None:
        """Find the norm of the sum, where nothing is known of it yet."""
        if self.known_finite is None and self.own_norm is None:
            self.own_norm = gradient_norm(self.grad)

    def measure_sum(self) -> None:
        """Find the norm of the full gradient, to which nothing more is added."""
        self.norm = gradient_norm(self.grad)
        if self.known_finite is None:
            self.own_norm = self.norm

    @property
    def rule(self) -> UpdateRule:
        """Return the rule of the update."""
        return self.slot.rule

    @property
    def offset_step(self) -> Step:
        """Return the step that counts elements from where ``grad`` begins in the whole tensor."""
        if self.slot.shard is None:
            return self.step
        if self.compressed:
            return self.rule.compressed_step(self.state, self.step)
        return self.step.placed()

    @property
    def turns_bases(self) -> bool:
        """Return whether the bases that are due replace those of an earlier refresh, and not the random first ones."""
        if self.rule.probes(self.step):
            return False
        left, right = self.rule.bases(self.state)
        first = self.rule.next_refresh(Step(count=1, phase=self.step.phase))
        has_bases = left is not None or right is not None
        return has_bases and first != self.step.count

    def compress(self) -> None:
        """Keep the compressed gradient alone, in the bases in use."""
        if self.slot.projects and not self.compressed:
            if self.known_finite is None:
                self.measure()
            self.grad = self.slot.rule.compress(self.grad, self.state, self.step)
            self.compressed = True

    def refresh(self) -> None:
        """Find new bases in the gradient, which must be whole, and keep the compressed one alone."""
        if self.step.shard is not None:
            raise ValueError("new bases need the whole gradient: `PendingGradients.refresh` finds those of all")
        noise = self._measured_noise()
        bases = self.rule.find_bases(self.grad, self.state, self.step)
        self.set_bases(bases, noise)

    def set_bases(self, new: NewBases, noise: Tensor | None = None) -> None:
        """Take the new bases that were found in the gradient, and keep the compressed one alone.

        ``noise`` is the overlap that the bases of both halves of the gradient have, where it was measured.
        """
        step = self.step.where_valid(self.finite)
        if self.turns_bases:
            overlap = new.overlap
            if overlap is None:
                overlap = subspace_overlap(self.rule.bases(self.state), new[:2])
            overlap = torch.where(self.finite & new.found, overlap, torch.nan)
            self.overlaps = overlaps_of_refresh(overlap, noise)
        self.rule.set_bases(new, self.state, step)
        self.slot.keep_schedule(self.state)
        self.refresh_due = False
        self.compress()

    # Both halves start from the basis in use, as the refresh itself does. They are doubled, so that each is as large as
    # the whole, on which the turn of a tracked basis depends.
    def _measured_noise(self) -> Tensor | None:
        """Return the overlap of the bases that both halves of the gradient have, NaN where one has none."""
        if self.first_half is None:
            return None
        second_half = self.grad - self.first_half
        second = self.rule.find_bases(second_half.mul_(2), self.state, self.step)
        del second_half
        first = self.rule.find_bases(self.first_half.mul_(2), self.state, self.step)
        self.first_half = None
        overlap = subspace_overlap(first[:2], second[:2])
        return torch.where(first.found & second.found, overlap, torch.nan)


class PendingGradients:
    """Accumulates gradients until their update, and brings them into the form in which an update takes them.

    Four things happen to a gradient: it is summed over micro-batches and over processes, searched for new bases if they
    are due, and compressed. It is compressed as early as no basis is due, else after its bases were found. `take` does
    what is still missing. Gradients are detached first of all, so that autograd records nothing, and need not be turned
    off for each. ``gradients`` holds what was accumulated of each parameter. ``host_sums`` keeps sums of full gradients
    on the host, where that was asked for: those of matrices, beside which vectors' are nothing. ``refreshes_saved``
    counts the bases that lazy refreshes did not find, less those that they found besides, since it was read.
    """

    def __init__(self, optimizer: "RuleOptimizer", distributor: "Distributor | None" = None) -> None:
        self.distributor = distributor
        self._optimizer = optimizer
        self.sums = Sums()
        self.host_sums: HostSums | None = None
        self.gradients: dict[Tensor, PendingGradient] = {}
        self.refreshes_saved = 0

    def get(self, p: Tensor) -> PendingGradient | None:
        """Return what was accumulated for ``p``, or None."""
        return self.gradients.get(p)

    @property
    def sums_replicas(self) -> bool:
        """Return whether gradients are summed over replicas here, as `RuleOptimizer.sum_over_replicas` asked for."""
        return self.distributor is not None and self.distributor.replica is not None

    @property
    def is_first(self) -> bool:
        """Return whether this process is alone, or the first of those that share an update."""
        return self.distributor is None or self.distributor.rank == 0

    def waits_for_all(self, p: Tensor) -> bool:
        """Return whether the update of ``p`` waits for the end of backward, where several processes make an update."""
        if self.distributor is None:
            return False
        slot = self._optimizer.slots[p]
        # All three take messages, which all processes must send in one order.
        if slot.projects or slot.gathers or self._optimizer.is_due(p):
            return True
        # Messages of a group are sent one after another. A vector's would keep backward waiting for the sums over
        # replicas that are under way, and its gradient takes little memory.
        return self.sums_replicas and p.ndim < 2

    # `p.grad` is dropped here, so that no gradient is in memory twice. The first of an update is kept as it is, further
    # ones are added to it; a bf16 sum is rounded stochastically. Where the rule projects and no new basis is due, each
    # is compressed before it is added, which takes r/min(m, n) of the memory: compressing is linear.
    def accumulate(self, p: Tensor, *, compress: bool, measure: bool = False) -> None:
        """Add ``p.grad`` to what is pending for ``p``, and drop it. Do nothing where there is none.

        ``compress`` keeps a compressed sum where the rule projects and no new basis is due at this update. ``measure``
        keeps the norm of ``p.grad``. Sums are in the gradient's dtype.
        """
        if p.grad is None or p.numel() == 0:
            return
        total = self.gradients.get(p)
        part = self._part(p, total)
        p.grad = None
        if measure:
            part.measure()
            part.norm = part.own_norm
            if part.norm is None:
                part.norm = gradient_norm(part.grad)
        if compress and not part.refresh_due:
            part.compress()
        if total is None:
            if compress and not part.compressed:  # layerwise: the rest of the storage is to be freed meanwhile
                _own_storage(part)
            self.gradients[p] = part
            if self.host_sums is not None and lies_on_host(p) and not part.compressed:
                self.host_sums.begin_sum(part)
            return
        self._bring(total)
        total.parts += 1
        stream = f"sum {total.parts}"
        if total.slot.has_kernels and self.distributor is None and self.sums.takes(total, part):
            self.sums.add(total, part, stream)
            return
        finite, part_finite = total.known_finite, part.known_finite
        if finite is None or part_finite is None:
            finite, part_finite = total.finite, part.finite
        total.known_finite = finite & part_finite
        if total.step.bits is None or total.grad.dtype != torch.bfloat16:
            total.grad.add_(part.grad)
            return
        if self.distributor is not None:
            stream += self.distributor.stream_suffix
        add_rounded(total.grad, part.grad, part.offset_step, stream)

    def _part(self, p: Tensor, total: PendingGradient | None) -> PendingGradient:
        """Return ``p.grad`` as a part of the update whose earlier parts are summed in ``total``.

        For the first part, ``total`` is None, and the rule prepares its state (`UpdateRule.start`).
        """
        grad = p.grad
        assert grad is not None
        if grad.layout != torch.strided:
            raise ValueError(f"a gradient is {grad.layout}; only dense ones are supported (Embedding(sparse=False))")
        slot = self._optimizer.slots[p]
        if p.device != slot.device:
            slot.move(p.device)
        grad = _local_gradient(grad, p) if slot.is_shared else grad.detach()
        if grad.ndim == 0:
            grad = grad.view(1)
        # ``norm < inf`` is one operation, `isfinite` four. On a CPU in the gradient's own dtype: bf16 has fp32's range,
        # and fp32 would cost eight times as much. A GPU waits for each launch: there the norm is found when it is asked
        # for, which may be of a sum, or of all gradients at once. What is not finite is not so in a sum either.
        finite: Tensor | None = None
        if not slot.on_gpu:
            finite = torch.linalg.vector_norm(grad) < math.inf
        if total is None:
            return self._start(p, slot, grad, finite)
        return PendingGradient(
            param=p,
            slot=total.slot,
            grad=grad,
            step=total.step,
            known_finite=finite,
            state=total.state,
            refresh_due=total.refresh_due,
        )

    def _start(self, p: Tensor, slot: Slot, grad: Tensor, finite: Tensor | None) -> PendingGradient:
        """Begin an update of ``p``: let its rule prepare the state, and return ``grad`` with state and step."""
        optimizer = self._optimizer
        state = optimizer.tensors(p)
        count = int(optimizer.state[p]["step"]) + 1  # a number, but others save tensors
        lr = optimizer.param_groups[slot.group]["lr"]
        bits = None
        if p.dtype == torch.bfloat16 or codes_of(p) is not None:
            bits = optimizer.random_bits(p, count)
        step = Step(
            count=count,
            lr=float(lr),
            seed=slot.seed,
            phase=slot.phase,
            bits=bits,
            shard=slot.shard,
            kernels=slot.has_kernels,
        )
        if not slot.gathers:  # else the rule starts with the whole state, in `update_gathered`
            slot.rule.start(state, step)
        refresh_due = slot.finds_bases(state, step)
        self._count_saved(slot.rule, state, step, refresh_due)
        return PendingGradient(
            param=p,
            slot=slot,
            grad=grad,
            step=step,
            known_finite=finite,
            state=state,
            refresh_due=refresh_due,
        )

    def _count_saved(self, rule: UpdateRule, state: State, step: Step, finds_bases: bool) -> None:
        """Count a refresh that the rule's schedule leaves out, and against it a basis that is only compared."""
        if rule.schedule(state) is None:
            return
        if finds_bases and rule.probes(step):
            self.refreshes_saved -= 1
        elif not finds_bases and rule.next_refresh(step) == step.count:
            self.refreshes_saved += 1

    # On a CPU the answer can be looked at: a gradient that is finite needs no further care. A GPU would have to be
    # waited for, so the step carries the answer along as ``valid``, and looks at it on the device whenever it stores.
    def take(self, p: Tensor) -> PendingGradient | None:
        """Remove and return the gradient of ``p`` in the form in which an update takes it; None where there is none.

        A gradient is dropped too where this raises.
        """
        if self.sums.waiting:
            self.sums.flush()
        pending = self.gradients.pop(p, None)
        if pending is None:
            if p.grad is None:
                return None
            pending = self._part(p, None)
        if self.distributor is not None:
            self.distributor.sync([pending])
        self._bring(pending)
        self._finalize(pending)
        finite = pending.known_finite
        if finite is None:
            finite = pending.finite
        can_look = type(finite) is Tensor and finite.device.type == "cpu"  # inline: a call less for each parameter
        if not (can_look and finite):
            pending.step = pending.step.where_valid(finite)
        return pending

    def _finalize(self, pending: PendingGradient) -> None:
        """Find the bases that are due in a gradient, and compress it."""
        if self.sums.waiting:  # of which this gradient may be one
            self.sums.flush()
        if pending.refresh_due or (pending.slot.projects and not pending.compressed):
            self._bring(pending)
        if pending.refresh_due:
            _observe(self._optimizer, "refresh", pending.param, pending.refresh)
        if not pending.compressed:
            pending.compress()
        if self.host_sums is not None and pending.compressed:
            self.host_sums.leave(pending)

    def _bring(self, pending: PendingGradient) -> None:
        """Have the sum of a gradient on the device, if it lies on the host."""
        if self.host_sums is not None and pending.host is not None:
            self.host_sums.bring(pending)

    def put_back(self, p: Tensor, *, measure: bool) -> None:
        """Write the sum of ``p`` back to the host, where it lies there and was added to.

        ``measure`` finds its norm before, as nothing more is to be added.
        """
        pending = self.gradients.get(p)
        if self.host_sums is None or pending is None or pending.host is None:
            return
        if self.host_sums.is_here(pending):
            pending.norm = None
            if measure:
                pending.measure_sum()
            self.host_sums.put_back(pending)

    def measure_on_host(self, params: Iterable[Tensor]) -> None:
        """Find the norms of those sums on the host to which the last micro-batch had nothing to add."""
        if self.host_sums is None:
            return
        for p in params:
            pending = self.gradients.get(p)
            if pending is not None and pending.host is not None and pending.norm is None:
                self.host_sums.bring(pending)
                pending.measure_sum()
                self.host_sums.keep(pending)

    def expect(self, params: Iterable[Tensor], *, compressed_alone: bool = False) -> None:
        """Say in which order sums on the host will be needed; those that are compressed, or all."""
        if self.host_sums is None:
            return
        sums: list[HostSum] = []
        for p in params:
            pending = self.gradients.get(p)
            if pending is None or pending.host is None:
                continue
            if pending.slot.projects or not compressed_alone:
                sums.append(pending.host)
        self.host_sums.expect(sums)

    def copied(self, pending: PendingGradient) -> Tensor:
        """Return a copy of what was summed of a gradient so far."""
        if self.host_sums is None or pending.host is None:
            return pending.grad.clone()
        self.host_sums.bring(pending)
        copy = pending.grad.clone()
        self.host_sums.keep(pending)
        return copy

    def release(self, pending: PendingGradient) -> None:
        """Drop the sum of a gradient on the host, if it has one there: nobody reads it any more."""
        if self.host_sums is not None:
            self.host_sums.forget(pending)

    def pending_of(self, p: Tensor) -> PendingGradient | None:
        """Return what is pending for ``p``. Where nothing is, ``p.grad`` becomes pending, if there is one."""
        pending = self.gradients.get(p)
        if pending is None and p.grad is not None:
            pending = self._part(p, None)
            self.gradients[p] = pending
        return pending

    def _pending_of_all(self, params: Iterable[Tensor]) -> list[PendingGradient]:
        """Return what is pending for each of ``params`` that has a gradient."""
        gradients: list[PendingGradient] = []
        for p in params:
            pending = self.pending_of(p)
            if pending is not None:
                gradients.append(pending)
        return gradients

    def finalize(self, p: Tensor) -> None:
        """Find the bases of ``p`` that are due, and compress what is pending for it."""
        pending = self.gradients.get(p)
        if pending is not None:
            self._finalize(pending)

    def start_sum(self, p: Tensor) -> None:
        """Begin to sum what is pending for ``p`` over the replicas, where that is done here."""
        pending = self.gradients.get(p)
        if self.distributor is not None and pending is not None:
            self.distributor.start_sum(pending)

    def sync(self, params: Iterable[Tensor]) -> None:
        """Sum gradients and let all processes know which are finite, where several make an update."""
        if self.distributor is not None and self.distributor.may_differ:
            gradients = self._pending_of_all(params)
            self.distributor.sync(gradients)

    def refresh(self, params: Iterable[Tensor]) -> None:
        """Find the bases that are due, each by one process, where several make an update."""
        if self.distributor is not None:
            gradients = self._pending_of_all(params)
            work = partial(self.distributor.refresh_bases, gradients)
            _observe(self._optimizer, "refresh", None, work)

    def compress_all(self, params: Iterable[Tensor]) -> None:
        """Compress every gradient, after new bases were found where they are due."""
        params = list(params)
        for p in params:
            self.accumulate(p, compress=True)
            if self.distributor is None:
                self.finalize(p)
        if self.distributor is not None:
            self.sync(params)
            self.refresh(params)
            for p in params:
                self.finalize(p)

    def discard(self, params: Iterable[Tensor] | None = None) -> None:
        """Drop the gradients of ``params``, accumulated or not; by default those of all, and the sums under way."""
        dropped = params
        if dropped is None:
            dropped = [p for group in self._optimizer.param_groups for p in group["params"]]
        self.sums.flush()
        for p in dropped:
            pending = self.gradients.pop(p, None)
            if pending is not None:
                self.release(pending)
            p.grad = None
        if params is None and self.host_sums is not None:
            self.host_sums.forget_all()
        if params is None and self.distributor is not None:
            self.distributor.discard()


def _local_gradient(grad: Tensor, p: Tensor) -> Tensor:
    """Return what this process holds of a gradient, laid out as ``p`` is. (Sequence parallelism leaves sums.)"""
    placements: Any = p.placements  # type: ignore[attr-defined]
    if grad.placements != placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=placements)  # type: ignore[attr-defined]
    return local(grad)


def _observe(optimizer: "RuleOptimizer", name: str, p: Tensor | None, work: Callable[[], None]) -> None:
    """Do ``work``, by way of the optimizer's observer if there is one."""
    if optimizer.observer is None:
        work()
    else:
        optimizer.observer.observe(name, p, work)


def lies_on_host(p: Tensor) -> bool:
    """Return whether a sum of full gradients of ``p`` lies on the host where sums do: vectors' are not worth it."""
    return p.ndim > 1


def _own_storage(part: PendingGradient) -> None:
    """Copy a gradient that is a piece of a larger storage: FSDP2 reduces a layer's into one, which must not be kept."""
    storage = part.grad.untyped_storage()
    if storage.nbytes() > part.grad.nbytes:
        part.grad = part.grad.clone()


def are_zero(params: Iterable[Tensor], distributor: "Distributor | None") -> bool:
    """Return whether there are gradients in ``params``, all of zeros, on all processes. Waits for the device."""
    gradients = [local(p.grad) for p in params if p.grad is not None]
    if not gradients:
        return False
    device = gradients[0].device
    are_zero = torch.stack([~grad.any().to(device) for grad in gradients]).all()
    if distributor is not None:
        are_zero = distributor.agreed(are_zero)
    return bool(are_zero)


@dataclass(frozen=True)
class Outcome:
    """Tells what came of an update.

    ``grad_norm`` is the norm that was clipped, of the full gradients or of the compressed ones, or None where none was.
    ``skipped`` counts the tensors that were left alone because their gradient was not finite, ``failed_refreshes`` the
    bases that could not be renewed, ``refreshes_saved`` those that lazy refreshes did not find. ``overlaps`` says how
    far refreshes turned the bases, by the key of the metric; it is empty where none did.
    """

    grad_norm: float | None = None
    skipped: int = 0
    failed_refreshes: int = 0
    refreshes_saved: int = 0
    overlaps: Mapping[str, float] = field(default_factory=dict)


class Execution(ABC):
    """Decides when updates are made: the base of both executions, `GlobalStep` and `Layerwise`.

    A caller calls `begin` before each backward pass of an update, and `complete` after the last, which may come earlier
    than `begin` was told. The norm of all gradients is clipped to ``grad_clip`` (0: off). ``projected`` takes the norm
    of compressed gradients where the rule projects; nothing is left of the full ones once they are compressed.
    ``host_sums`` keeps sums of full gradients over several micro-batches on the host; without it, on the device.
    """

    def __init__(
        self,
        optimizer: "RuleOptimizer",
        grad_clip: float = 0.0,
        *,
        projected: bool = False,
        host_sums: HostSums | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._pending = optimizer.pending
        self._pending.host_sums = host_sums
        self._grad_clip = grad_clip
        self._projected = projected
        self._micro_batch = 0
        self._micro_batches = 1
        self._norm: Tensor | None = None
        self._params: list[Tensor] = []
        for group in optimizer.param_groups:
            self._params.extend(group["params"])
        self._on_gpu = any(is_gpu(p.device) for p in self._params)
        # Python's garbage collector cannot look into a tensor's hooks. A hook that held this object, and so all
        # parameters, would keep a model in memory for good.
        weak_self = weakref.ref(self)

        @torch._disable_dynamo  # see `RuleOptimizer.step`; backward may be called from a compiled function
        def hook(p: Tensor) -> None:
            execution = weak_self()
            if execution is None:
                return
            if torch.is_autocast_enabled(p.device.type):
                with own_precision():
                    execution._hook(p)
            else:  # without a context: a call less for each parameter
                execution._hook(p)

        self._run_hook = hook
        self._hooked: set[Tensor] = set()
        self._handles: list[Any] = []
        self._hook_trained()
        weakref.finalize(self, _remove, self._handles)

    def _hook_trained(self) -> None:
        """Hook the parameters that are trained now: torch hooks none that is frozen, and others may thaw it later."""
        for p in self._params:
            if p.requires_grad and p not in self._hooked:
                self._handles.append(p.register_post_accumulate_grad_hook(self._run_hook))
                self._hooked.add(p)

    @abstractmethod
    def _hook(self, p: Tensor) -> None:
        """Take the gradient of ``p`` as soon as a backward pass has finished ``p.grad``."""

    @torch._disable_dynamo  # see `RuleOptimizer.step`
    def begin(self, micro_batch: int, micro_batches: int) -> None:
        """Say that the next backward pass is number ``micro_batch`` (from 0) of an update's ``micro_batches``.

        The first takes the groups as they are then: an update is made by what schedulers have left in them.
        """
        self._micro_batch = micro_batch
        self._micro_batches = micro_batches
        if self._pending.sums.waiting:
            self._pending.sums.flush()
        if micro_batch == 0:
            self._optimizer.follow_groups()
            self._hook_trained()
        elif micro_batch == micro_batches // 2 and self._pending.distributor is None:
            due: list[PendingGradient] = []
            for pending in self._pending.gradients.values():
                if pending.refresh_due:
                    due.append(pending)
            if due:
                _keep_first_half(due, self._pending)
        if self._pending.host_sums is not None:
            self._begin_on_host(self._pending.host_sums)

    def _begin_on_host(self, host_sums: HostSums) -> None:
        """Have memory for the sums of an update on the host, or fetch the first that will be added to."""
        if self._micro_batch > 0:
            host_sums.expect_as_arrived()
            return
        sizes: list[int] = []
        if self._pending.distributor is not None:
            raise ValueError("sums on the host are those of one process: several send messages of sums on the device")
        for p in self._params:
            is_summed = self._micro_batches > 1 and p.requires_grad
            if is_summed and lies_on_host(p) and self._keeps_full_sum(p):
                sizes.append(p.nbytes)
        host_sums.prepare(sizes)

    @abstractmethod
    def _keeps_full_sum(self, p: Tensor) -> bool:
        """Return whether the gradients of ``p`` are summed as they are in this update, and not compressed."""

    @torch._disable_dynamo  # see `RuleOptimizer.step`
    @torch.no_grad()
    def complete(self) -> None:
        """Make the updates that are still to be made, after the last backward pass. Waits for no device."""
        observer = self._optimizer.observer
        with own_precision():
            if observer is None:
                self._complete()
            else:
                observer.observe("complete", None, self._complete)

    # The coefficient min(1, clip / ‖G‖) needs the norms of all gradients, and is multiplied into each at its update.
    # Where processes share an update, gradients are summed first. Bases are renewed before the norm of compressed
    # gradients is found, and after that of full ones, which compressing would lose.
    def _complete(self) -> None:
        """Find the clipping coefficient, and update all parameters that still have a gradient."""
        if self._pending.sums.waiting:
            self._pending.sums.flush()
        if self._grad_clip > 0 and self._compresses_first():
            self._pending.expect(self._params, compressed_alone=True)
            self._pending.compress_all(self._params)
        shares = self._pending.distributor is not None
        if shares:
            self._pending.sync(self._params)
        self._norm = None
        coefficient: Tensor | None = None
        if self._on_gpu:
            measure_all(self._optimizer, self._params)
        if self._grad_clip > 0:
            self._pending.measure_on_host(self._params)
            self._norm = norms_of(self._params, self._pending).norm()
            # The 1e-6 is that of torch's clip_grad_norm_.
            coefficient = (self._grad_clip / (self._norm + 1e-6)).clamp(max=1.0)
        if shares:
            self._pending.refresh(self._params)
        self._pending.expect(self._params)
        try:
            for p in self._params:
                if p.grad is not None or p in self._pending.gradients:
                    self._optimizer.update_param(p, coefficient)
                    p.grad = None
        except BaseException:
            self._pending.discard()  # else the next update would find what this one has left
            raise

    def _put_back(self, p: Tensor) -> None:
        """Let the sum of ``p`` go back to the host, if it lies there; a whole one with the norm that is clipped."""
        if self._pending.host_sums is None:
            return
        is_last = self._micro_batch == self._micro_batches - 1
        clips_compressed = self._projected and self._optimizer.slots[p].projects
        measures = is_last and self._grad_clip > 0 and not clips_compressed
        self._pending.put_back(p, measure=measures)

    @abstractmethod
    def _compresses_first(self) -> bool:
        """Return whether `_complete` has to compress what is pending before it finds the norm that is clipped."""

    def outcome(self) -> Outcome:
        """Return what came of the update that was completed. Waits for the device."""
        skips = self._optimizer.read_skips()
        grad_norm: float | None = None
        if self._norm is not None:
            grad_norm = float(self._norm)
        overlaps: dict[str, float] = {}
        if self._optimizer.overlaps.overlaps:
            overlaps = self._optimizer.overlaps.take()
        saved = self._pending.refreshes_saved
        self._pending.refreshes_saved = 0
        return Outcome(grad_norm, skips.skipped, skips.failed_refreshes, saved, overlaps)

    def discard(self) -> None:
        """Drop the gradients of an update that is not to be made."""
        self._optimizer.discard()
        # Else the next update would report what this one left.
        self._optimizer.read_skips()
        self._optimizer.overlaps.take()
        self._pending.refreshes_saved = 0

    def _accumulate(self, p: Tensor, *, compress: bool, measure: bool = False) -> None:
        """Accumulate ``p.grad``, by way of the observer if there is one."""
        observer = self._optimizer.observer
        if observer is None:  # not through `_observe`: a call less for each parameter
            self._pending.accumulate(p, compress=compress, measure=measure)
            return
        work = partial(
            self._pending.accumulate,
            p,
            compress=compress,
            measure=measure,
        )
        observer.observe("accumulate", p, work)


# Two halves of one gradient are at the same weights: what their bases differ by is noise. They are halves, and not two
# micro-batches, since the size of those is a matter of memory. One matrix of those due is measured, to keep the cost of
# two more decompositions small, and one of the smallest, to keep that of the copy small. Equal ones are drawn by the
# number of the update, which a resumed run knows too.
@torch.no_grad()
def _keep_first_half(due: Iterable[PendingGradient], gradients: PendingGradients) -> None:
    """Keep what half of the micro-batches came to for one of the matrices whose bases are ``due``, if any turns."""
    measurable: list[PendingGradient] = []
    for pending in due:
        if pending.turns_bases and not pending.rule.draws_bases:
            measurable.append(pending)
    if not measurable:
        return
    least = min(pending.grad.numel() for pending in measurable)
    smallest = [pending for pending in measurable if pending.grad.numel() == least]
    number = derive_seed(smallest[0].step.count)
    drawn = smallest[number % len(smallest)]
    drawn.first_half = gradients.copied(drawn)


def _remove(handles: list[Any]) -> None:
    """Take hooks off their tensors."""
    for handle in handles:
        handle.remove()


class GlobalStep(Execution):
    """Makes all updates after the last backward pass."""

    def _hook(self, p: Tensor) -> None:
        """Add a gradient to its sum, where it is one of several."""
        if self._micro_batches > 1:  # torch would add them up in the gradient's dtype, rounded to nearest
            self._accumulate(p, compress=False)
            self._put_back(p)

    def _compresses_first(self) -> bool:
        """Return whether the projected norm is clipped: what is pending is of full gradients here."""
        return self._projected

    def _keeps_full_sum(self, p: Tensor) -> bool:
        """Return true: every sum is one of full gradients, until the update."""
        return True


class Layerwise(Execution):
    """Makes each update, where nothing else is needed, as soon as the last backward pass has its gradient.

    The gradient is then dropped, so no full set of gradients ever exists. Three things differ from that plain case:

    * With several micro-batches, sums are kept compressed where the rule projects: GaLore is linear in the gradient
      between two bases. Only matrices whose basis is due keep a full sum.
    * Clipping has to see all norms before the first update, so gradients wait, compressed, for the end. With one
      micro-batch the norm of the full gradient is known, with several only the ``projected`` one.
    * Where several processes make an update, compressed gradients wait for the end too. There all processes agree on
      what was finite, and share out the bases that are due.

    The learning rate must be in the groups before backward.
    """

    def _hook(self, p: Tensor) -> None:
        """Update ``p`` at once where that can be done; else add the gradient to what waits."""
        is_last = self._micro_batch == self._micro_batches - 1
        clips = self._grad_clip > 0
        waits = self._pending.distributor is not None and self._pending.waits_for_all(p)
        if self._micro_batches > 1 or clips or waits:
            measures = clips and self._micro_batches == 1 and not self._projected
            self._accumulate(p, compress=True, measure=measures)
        if not is_last:
            self._put_back(p)
            return
        if waits:
            self._pending.start_sum(p)
        elif clips:
            work = partial(self._pending.finalize, p)
            _observe(self._optimizer, "compress", p, work)
            self._put_back(p)
        else:
            self._optimizer.update_param(p)
            p.grad = None

    def _compresses_first(self) -> bool:
        """Return whether gradients that wait are compressed when the update completes.

        They wait as they are where processes share the update, and where it ends before its last micro-batch.
        """
        ends_early = self._micro_batch < self._micro_batches - 1
        return ends_early or self._pending.distributor is not None

    def _keeps_full_sum(self, p: Tensor) -> bool:
        """Return whether the sum of ``p`` is one of full gradients: it is not projected, or its basis is due."""
        return not self._optimizer.slots[p].projects or self._optimizer.is_due(p)

    def begin(self, micro_batch: int, micro_batches: int) -> None:
        """Say which backward pass is next. ValueError where the norm that is to be clipped will not be known."""
        clips_full_norm = self._grad_clip > 0 and not self._projected
        if micro_batches > 1 and clips_full_norm and self._optimizer.projects:
            raise ValueError(
                "layerwise updates of several micro-batches know no norm of the full gradient: clip the projected one"
            )
        super().begin(micro_batch, micro_batches)
