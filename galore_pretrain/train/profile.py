"""Measure where the time of an update goes: a table of its parts, and torch's trace of it."""

import contextlib
import itertools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from galore_pretrain.optim import RuleOptimizer

log = logging.getLogger(__name__)
_WARM_UP = 2  # first updates of a process, which are not timed: libraries load, allocators and caches fill
_PARTS = ("data", "forward", "backward", "optimizer", "refresh", "logging", "evaluation", "checkpoint")
_OTHER = "other"  # than one of the parts
_MEANING = {
    "data": "waiting for text",
    "backward": "without the updates inside it",
    "optimizer": "projecting, moments, weights",
    "refresh": "new bases",
    "evaluation": "between updates",
    "checkpoint": "between updates",
}


class DeviceClock:
    """Tells how long a GPU spends on each part, by events in its queue: nobody waits before `read` is called."""

    def __init__(self) -> None:
        self._marks: list[tuple[str, torch.cuda.Event]] = []  # the part that ends there, and when the device does so

    def mark(self, part: str) -> None:
        """Say that the work handed to the device since the last mark was ``part``."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def read(self) -> dict[str, float]:
        """Return the seconds from mark to mark, by part. Waits for the device, which works or idles in them."""
        spent: defaultdict[str, float] = defaultdict(float)
        if self._marks:
            self._marks[-1][1].synchronize()
        for (_, before), (part, after) in itertools.pairwise(self._marks):
            spent[part] += before.elapsed_time(after) / 1000
        return spent


# Spans nest: the optimizer's span lies inside the backward pass where updates are layerwise. A stack holds the spans
# that are open. Whenever one opens or closes, the time since the last such moment goes to the span that was innermost
# until then. So every moment counts for one part alone, and the parts and "other" add up to the whole.
class Profile:
    """Times ``updates`` updates of a run after the first two, and writes ``folder``/table.txt and trace.json.gz.

    `span` says what is being done: time inside another span counts for the inner one alone. A GPU is not waited for. So
    there are two times of a part on it: that of the program, which hands out work, and that of the device, which does
    the work or idles.
    """

    def __init__(self, updates: int, folder: Path, device: torch.device, optimizer: RuleOptimizer) -> None:
        self._updates = updates
        self._folder = folder
        self._device = device
        self._optimizer = optimizer
        self._done = -_WARM_UP  # updates, of those that are timed
        self._since = 0.0  # when a span last opened or closed
        self._seconds = 0.0  # that the timed updates took; until the last has ended, when the first began
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._device_spent: dict[str, float] = {}
        self._stack: list[str] = []
        self._profiler: Any = None
        self._device_clock = DeviceClock() if device.type == "cuda" else None

    def observe(self, name: str, p: Tensor | None, work: Callable[[], None]) -> None:
        """Do a piece of the optimizer's work as a span of its own: a new basis, or else an update's other work."""
        part = "refresh" if name == "refresh" else "optimizer"
        with self.span(part):
            work()

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Time what is done inside as ``part`` of an update."""
        self._switch()
        self._stack.append(part)
        named = record_function(part) if self._profiler else contextlib.nullcontext()
        with named:
            try:
                yield
            finally:
                self._switch()
                self._stack.pop()

    def _switch(self) -> None:
        """Count the time since the last switch for the innermost open span."""
        now = time.perf_counter()
        innermost = self._stack[-1] if self._stack else _OTHER
        self._spent[innermost] += now - self._since
        self._since = now
        if self._device_clock and self._profiler:
            self._device_clock.mark(innermost)

    def update_done(self) -> str | None:
        """Count an update; return the table after the last of those that are timed."""
        self._done += 1
        if self._done == 0:
            self._start()
        if self._done == self._updates:
            return self.close()
        return None

    def _start(self) -> None:
        """Begin to time, once the warm-up is over."""
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._optimizer.observer = self
        self._profiler = profile(activities=activities)
        self._profiler.__enter__()
        self._spent.clear()
        if self._device_clock:
            self._device_clock.mark(_OTHER)
        self._seconds = self._since = time.perf_counter()

    def close(self) -> str | None:
        """Stop timing and write the files; return the table, or None if that was done before."""
        self._optimizer.observer = None
        profiler = self._profiler
        self._profiler = None
        if profiler is not None:
            self._device_spent = self._read_device()
            self._seconds = time.perf_counter() - self._seconds
            profiler.__exit__(None, None, None)
        if self._done <= 0:
            return f"--profile: the run ended with its first {_WARM_UP} updates, which do not count"
        if profiler is None:
            return None
        table = self._table(profiler)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "table.txt").write_text(table + "\n")
            profiler.export_chrome_trace(str(self._folder / "trace.json.gz"))
        except (OSError, RuntimeError) as error:  # a run does not stop for a profile
            log.warning("%s cannot be written (%s)", self._folder, error)
        return table

    def _read_device(self) -> dict[str, float]:
        """Return the device's seconds by part, up to now; none of a CPU."""
        if self._device_clock is None:
            return {}
        self._device_clock.mark(_OTHER)
        return self._device_clock.read()

    def _table(self, profiler: Any) -> str:
        """Lay out the milliseconds an update of each part, its share of the time, and torch's heaviest operations."""
        updates = min(self._done, self._updates)
        spent = {part: self._spent[part] for part in _PARTS}
        spent[_OTHER] = max(0.0, self._seconds - sum(spent.values()))
        in_updates = self._seconds - (spent["evaluation"] + spent["checkpoint"])
        lines = [f"{updates} updates, {1000 * in_updates / updates:.1f} ms each without what is between them"]
        for part, seconds in spent.items():
            milliseconds = 1000 * seconds / updates
            percent = 100 * seconds / self._seconds
            line = f"{part:<11}{milliseconds:9.1f} ms {percent:5.1f} %"
            if self._device_clock is not None:
                line += f"   device {1000 * self._device_spent.get(part, 0.0) / updates:9.1f} ms"
            lines.append(f"{line}   {_MEANING.get(part, '')}".rstrip())
        sort_key = "self_cpu_time_total"
        if self._device_clock is not None:
            sort_key = "self_device_time_total"
            lines += ["", _of_idle_time(profiler.events(), sum(self._device_spent.values()))]
        heaviest = profiler.key_averages().table(sort_by=sort_key, row_limit=10, max_name_column_width=48)
        lines += ["", "the ten heaviest operations, by their own time:", str(heaviest)]
        return "\n".join(lines)


def _of_idle_time(events: Iterable[Any], seconds: float) -> str:
    """Say how much of ``seconds`` the device had nothing to do, by torch's ``events`` of the profile."""
    intervals: list[tuple[float, float]] = []
    for event in events:
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            intervals.append((event.time_range.start, event.time_range.end))
    busy = union_length(intervals) / 1e6
    idle = max(0.0, 1 - busy / seconds) if seconds else 0.0
    return f"the device was idle for {100 * idle:.1f} % of the time: it waited for the program"


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Return the length of what at least one of the intervals covers, each from a start to an end."""
    covered = 0.0
    last_end = -math.inf
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    return covered
