"""Measure where the time of an update goes: a table of its parts, and torch's trace of it."""

import contextlib
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from galore_pretrain.optim import RuleOptimizer

log = logging.getLogger(__name__)
_WARM_UP = 2  # first updates of a process, which are not timed: libraries load, allocators and caches fill
_PARTS = ("data", "forward", "backward", "optimizer", "refresh", "logging", "evaluation", "checkpoint")
_MEANING = {
    "data": "waiting for text",
    "backward": "without the updates inside it",
    "optimizer": "projecting, moments, weights",
    "refresh": "new bases",
    "evaluation": "between updates",
    "checkpoint": "between updates",
}


# Spans nest: the optimizer's span lies inside the backward pass where updates are layerwise. A stack holds the spans
# that are open. Whenever one opens or closes, the time since the last such moment goes to the span that was innermost
# until then. So every moment counts for one part alone, and the parts and "other" add up to the whole.
class Profile:
    """Times ``updates`` updates of a run after the first two, and writes ``folder``/table.txt and trace.json.gz.

    `span` says what is being done: time inside another span counts for the inner one alone. On a GPU each span waits
    for the device, so updates under the profiler are slower than others.
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
        self._stack: list[str] = []
        self._profiler: Any = None

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
        if self._device.type == "cuda" and self._profiler:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._stack:
            innermost = self._stack[-1]
            self._spent[innermost] += now - self._since
        self._since = now

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
        self._seconds = time.perf_counter()

    def close(self) -> str | None:
        """Stop timing and write the files; return the table, or None if that was done before."""
        self._optimizer.observer = None
        profiler = self._profiler
        self._profiler = None
        if profiler is not None:
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

    def _table(self, profiler: Any) -> str:
        """Lay out the milliseconds an update of each part, its share of the time, and torch's heaviest operations."""
        updates = min(self._done, self._updates)
        spent = {part: self._spent[part] for part in _PARTS}
        spent["other"] = max(0.0, self._seconds - sum(self._spent.values()))
        in_updates = self._seconds - (spent["evaluation"] + spent["checkpoint"])
        lines = [f"{updates} updates, {1000 * in_updates / updates:.1f} ms each without what is between them"]
        for part, seconds in spent.items():
            milliseconds = 1000 * seconds / updates
            percent = 100 * seconds / self._seconds
            meaning = _MEANING.get(part, "")
            lines.append(f"{part:<11}{milliseconds:9.1f} ms {percent:5.1f} %   {meaning}".rstrip())
        sort_key = "self_cpu_time_total"
        if self._device.type == "cuda":
            sort_key = "self_device_time_total"
        heaviest = profiler.key_averages().table(sort_by=sort_key, row_limit=10, max_name_column_width=48)
        lines += ["", "the ten heaviest operations, by their own time:", str(heaviest)]
        return "\n".join(lines)
