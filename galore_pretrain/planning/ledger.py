"""A ledger of every tensor of a step: what memory is held for, and when it is most."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

KINDS = ("weights", "moments", "bases", "gradients", "sums", "activations", "temporaries")
"""What memory is held for. ``sums``: low-rank sums of gradients that wait for their update."""


def allocated_peak(work: Callable[[], object]) -> int:
    """The largest sum of what torch's allocator on the CPU gave out during ``work`` and did not get back.

    Found from the profiler's events: it knows nothing of tensors, nor of `Ledger`, which it is there to check.
    """
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes: Iterable[int] = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(sizes, initial=0))


class Ledger(TorchDispatchMode):
    """Counts the bytes of every tensor that is made while it is active, until its storage is freed.

    Works on real tensors and on fake ones, which take no memory. ``peak`` is the largest sum, ``at_peak`` what it
    was made of, and ``moment_of_peak`` what `moment` said then. A new tensor is of the kind that `kind` set last; with
    none set, an activation where autograd records and a temporary elsewhere; `assign` corrects it later. With
    ``resizes``, storages may also grow and shrink without an operation, as those of weights that FSDP2 gathers.
    """

    def __init__(self, *, resizes: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._resizes = resizes
        self.now = self.peak = 0
        self.at_peak = dict.fromkeys(KINDS, 0)
        self.moment = self.moment_of_peak = ""
        self._held = dict.fromkeys(KINDS, 0)
        self._live: dict[int, list[Any]] = {}  # id of a storage -> [weak reference, bytes, kind]
        self._kind: str | None = None
        self._high, self._held_high = 0, dict(self._held)  # since the current episode began

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [value for value in tree_leaves(out) if isinstance(value, Tensor)]
        for tensor in outputs:
            self._enter(tensor)
        if not outputs:  # what it has done, it has done to its arguments
            for value in tree_leaves((args, kwargs)):
                if isinstance(value, Tensor):
                    self._read_size(getattr(value, "_local_tensor", value).untyped_storage())
        return out

    @contextmanager
    def kind(self, kind: str) -> Iterator[None]:
        """Say that what is made meanwhile is of this kind."""
        before, self._kind = self._kind, kind
        try:
            yield
        finally:
            self._kind = before

    def assign(self, tensor: Tensor, kind: str) -> None:
        """``tensor`` turned out to be of this kind."""
        tensor = getattr(tensor, "_local_tensor", tensor)
        if (entry := self._live.get(id(tensor.untyped_storage()))) is not None:
            self._held[entry[2]] -= entry[1]
            self._held[kind] += entry[1]
            entry[2] = kind

    def _entry(self, storage: torch.UntypedStorage) -> list[Any] | None:
        entry = self._live.get(id(storage))
        return entry if entry is not None and entry[0]() is storage else None

    def _enter(self, tensor: Tensor) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # what a DTensor has here
        key = id(storage)
        if self._entry(storage) is not None:
            self._read_size(storage)
            return
        kind = self._kind or ("activations" if torch.is_grad_enabled() else "temporaries")
        size = storage.nbytes()

        def leave(_: Any) -> None:
            entry = self._live.pop(key)
            self.now -= entry[1]
            self._held[entry[2]] -= entry[1]

        self._live[key] = [weakref.ref(storage, leave), size, kind]
        self.now += size
        self._held[kind] += size
        self._note({})

    def episode(self, work: Callable[[], None]) -> dict[str, int]:
        """Do ``work``; by how many bytes of each kind its highest moment exceeded its beginning."""
        self._read_sizes()
        before, self._high, self._held_high = dict(self._held), self.now, dict(self._held)
        work()
        return {kind: self._held_high[kind] - before[kind] for kind in KINDS}

    def replay(self, episode: Mapping[str, int]) -> None:
        """Count as if the work of such an episode, which leaves nothing behind, were done now."""
        self._note(episode)

    def _note(self, more: Mapping[str, int]) -> None:
        """Whether what is held now, and so much more, is more than ever."""
        if self.now + sum(more.values()) <= self._high:
            return
        self._read_sizes()
        total = self.now + sum(more.values())
        if total > self._high:
            self._high, self._held_high = total, {kind: size + more.get(kind, 0) for kind, size in self._held.items()}
            if total > self.peak:
                self.peak, self.at_peak, self.moment_of_peak = total, self._held_high, self.moment

    # FSDP2 frees and fills the storages of gathered weights by resizing them, of which dispatch hears nothing. It fills
    # one just before an operation writes to it, and there its size is read again. That one was freed is found when all
    # sizes are read again: before a new highest moment is believed, and where an episode begins. Until then too much is
    # counted, never too little.
    def _read_sizes(self) -> None:
        if self._resizes:
            for entry in list(self._live.values()):
                if (storage := entry[0]()) is not None and storage.nbytes() != entry[1]:
                    self._resize(entry, storage.nbytes())

    def _read_size(self, storage: torch.UntypedStorage) -> None:
        if (entry := self._entry(storage)) is not None and storage.nbytes() != entry[1]:
            self._resize(entry, storage.nbytes())
            self._note({})

    def _resize(self, entry: list[Any], size: int) -> None:
        self.now += size - entry[1]
        self._held[entry[2]] += size - entry[1]
        entry[1] = size
