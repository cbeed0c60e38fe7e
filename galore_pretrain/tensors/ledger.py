"""A ledger of every tensor of a step: what memory is held for, and when it is most."""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from galore_pretrain.tensors.operations import device_asked_for
from galore_pretrain.tensors.silence import silenced

KINDS = ("weights", "moments", "bases", "gradients", "sums", "activations", "temporaries")
"""What memory is held for. ``sums``: low-rank sums of gradients that wait for their update."""
HOST = "host"
"""The kind of what lies in the memory of a device's host. It is counted apart."""


def allocated_peak(work: Callable[[], object]) -> int:
    """Return the most bytes that torch's allocator on the CPU had given out, and not got back, during ``work``.

    The profiler's events say it. They know nothing of tensors, nor of `Ledger`, which this function is there to check.
    """
    # Cycles that earlier work has left behind would be freed at some time during this, and that memory taken off.
    gc.collect()
    profile = torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with silenced(2):  # the profiler tells of its start and end, unasked
        profile.start()
    try:
        work()
    finally:
        with silenced(2):
            profile.stop()
    results: Any = profile.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = 0
    peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # of a block that is given back, it is negative
        peak = max(peak, held)
    return peak


@dataclass(slots=True)
class _Entry:
    """A storage that is alive: its size in bytes when it was last read, and what it is held for."""

    reference: weakref.ref[torch.UntypedStorage]
    size: int
    kind: str


# Memory belongs to storages, not to tensors: views share one. So the ledger enters the storage of each tensor that an
# operation returns, once. A weak reference tells it when the last tensor of a storage is gone, and the bytes are taken
# off again. What is held is thus known at any time, by kind, and is compared with the maximum whenever it has grown.
#
# FSDP2 frees and refills the storages of gathered weights by resizing them, which is no operation. It refills one just
# before an operation writes into it, and there the ledger reads its size again. It notices a freed one when it reads
# all sizes again: before it accepts a new maximum, and where an episode begins. Between these it may count too much but
# never too little, so no maximum is missed.
class Ledger(TorchDispatchMode):
    """Counts the bytes of every tensor that is made while it is active, until its storage is freed.

    It works on real tensors and on fake ones, which take no memory. ``peak`` is the largest sum in bytes, ``at_peak``
    its parts by kind, and ``point_of_peak`` what ``point`` said then; ``highs`` has the parts of the largest sum at
    each point. A new tensor is of the kind that `kind` set last. With none set, it is an activation where autograd
    records and a temporary elsewhere; `assign` corrects it later. With ``resizes``, storages may also grow and shrink
    without an operation, as those of weights that FSDP2 gathers. Only then are all sizes read again, which takes a
    tenth of a plan's time. ``host_peak`` is the largest sum of what is of the kind `HOST`, which is in no other sum.
    """

    def __init__(self, *, resizes: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.at_peak = dict.fromkeys(KINDS, 0)
        self.highs: dict[str, dict[str, int]] = {}
        self.point = ""
        self.point_of_peak = ""
        self.host_peak = 0
        self._host_now = 0
        self._resizes = resizes
        self._kind: str | None = None
        self._entries: dict[int, _Entry] = {}  # by the id of their storage
        self._bytes_of = dict.fromkeys(KINDS, 0)
        # The largest sum, and its parts, since the current episode began.
        self._high = 0
        self._at_high = dict(self._bytes_of)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: else torch wraps each call of `__torch_dispatch__`, so that nothing of it is compiled."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = device_asked_for(func, args)
        if device is not None:
            return device
        result = func(*args, **(kwargs or {}))
        outputs = _storages(result)
        for storage in outputs:
            self._enter(storage)
        if not outputs:
            # An operation that returns no tensor writes into its arguments. FSDP2 fills gathered weights by one.
            for storage in _storages((args, kwargs)):
                self._read_size(storage)
        return result

    @property
    def point(self) -> str:
        """Say where in an update what is counted belongs."""
        return self._point

    @point.setter
    def point(self, point: str) -> None:
        self._point = point
        self._high_at_point = sum(self.highs.get(point, {}).values())

    @contextmanager
    def kind(self, kind: str) -> Iterator[None]:
        """Say that every tensor made in this context is of ``kind``."""
        before = self._kind
        self._kind = kind
        try:
            yield
        finally:
            self._kind = before

    def assign(self, tensor: Tensor, kind: str) -> None:
        """Say that ``tensor``, which was counted as another kind, is of ``kind``."""
        entry = self._find(_storage(tensor))
        if entry is not None:
            self._count(entry.kind, -entry.size)
            self._count(kind, entry.size)
            entry.kind = kind

    def episode(self, work: Callable[[], None]) -> dict[str, int]:
        """Do ``work``, and return by how many bytes of each kind its maximum exceeded what was held before it."""
        self._read_all_sizes()
        before = dict(self._bytes_of)
        self._high = self.now
        self._at_high = before
        work()
        return {kind: self._at_high[kind] - before[kind] for kind in KINDS}

    def replay(self, episode: Mapping[str, int]) -> None:
        """Count as if the work of that `episode` were done once more, now. It must leave nothing behind."""
        self._update_maximum(episode)

    def _enter(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that an operation has returned, until it is freed."""
        if self._find(storage) is not None:
            self._read_size(storage)
            return
        kind = self._kind
        if kind is None:
            kind = "activations" if torch.is_grad_enabled() else "temporaries"
        key = id(storage)

        def leave(_: object) -> None:
            entry = self._entries.pop(key)
            self._count(entry.kind, -entry.size)

        size = storage.nbytes()
        self._entries[key] = _Entry(weakref.ref(storage, leave), size, kind)
        self._count(kind, size)
        self._update_maximum()

    def _count(self, kind: str, size: int) -> None:
        """Count ``size`` bytes more of a kind."""
        if kind == HOST:
            self._host_now += size
            self.host_peak = max(self.host_peak, self._host_now)
            return
        self.now += size
        self._bytes_of[kind] += size

    def _find(self, storage: torch.UntypedStorage) -> _Entry | None:
        # Python may give the id of a storage that is gone to another one.
        entry = self._entries.get(id(storage))
        if entry is None or entry.reference() is not storage:
            return None
        return entry

    def _read_size(self, storage: torch.UntypedStorage) -> None:
        entry = self._find(storage)
        if entry is not None and storage.nbytes() != entry.size:
            self._resize(entry, storage.nbytes())
            self._update_maximum()

    def _read_all_sizes(self) -> None:
        if not self._resizes:
            return
        for entry in list(self._entries.values()):
            storage = entry.reference()
            if storage is not None and storage.nbytes() != entry.size:
                self._resize(entry, storage.nbytes())

    def _resize(self, entry: _Entry, size: int) -> None:
        self._count(entry.kind, size - entry.size)
        entry.size = size

    def _update_maximum(self, more: Mapping[str, int] | None = None) -> None:
        """Compare what is held now, and ``more`` bytes of each kind, with the maxima of the episode and of all time."""
        more = more or {}
        extra = sum(more.values())
        if self.now + extra <= min(self._high, self._high_at_point):
            return
        self._read_all_sizes()
        total = self.now + extra
        if total <= min(self._high, self._high_at_point):
            return
        parts = dict(self._bytes_of)
        for kind, size in more.items():
            parts[kind] += size
        if total > self._high_at_point:
            self._high_at_point = total
            self.highs[self.point] = parts
        if total > self._high:
            self._high = total
            self._at_high = parts
        if total > self.peak:
            self.peak = total
            self.at_peak = parts
            self.point_of_peak = self.point


def _storages(values: Any) -> list[torch.UntypedStorage]:
    """Return the storages of the tensors among nested ``values``, but for those on ``meta``, which take no memory."""
    tensors = [value for value in tree_leaves(values) if isinstance(value, Tensor)]
    return [_storage(tensor) for tensor in tensors if tensor.device.type != "meta"]


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    # A DTensor's own storage has the whole tensor's size and no memory; this process's part is its local tensor.
    local_tensor: Tensor = getattr(tensor, "_local_tensor", tensor)
    return local_tensor.untyped_storage()
