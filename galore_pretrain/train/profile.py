"""Where the time of an update goes: a table of its parts, and torch's trace of it."""

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
_WARM_UP = 2  # updates of a process that are not looked at: libraries load, allocators and caches fill
_PARTS = ("data", "forward", "backward", "optimizer", "refresh", "logging", "evaluation", "checkpoint")
_MEANING = {
    "data": "waiting for text",
    "backward": "without the updates inside it",
    "optimizer": "projecting, moments, weights",
    "refresh": "new bases",
    "evaluation": "between updates",
    "checkpoint": "between updates",
}


class Profile:
    """Times ``updates`` updates of a run after the first two, and writes ``folder``/table.txt and trace.json.gz.

    `span` says what is being done: time inside another span counts for the inner one alone. On a GPU each span waits
    for the device, so updates under the profiler are slower than others.
    """

    def __init__(self, updates: int, folder: Path, device: torch.device, optimizer: RuleOptimizer) -> None:
        self._updates, self._folder, self._device = updates, folder, device
        self._done, self._since, self._seconds = -_WARM_UP, 0.0, 0.0
        self._spent: defaultdict[str, float] = defaultdict(float)
        self._stack: list[str] = []
        self._torch: Any = None
        self._optimizer = optimizer

    def observe(self, name: str, p: Tensor | None, work: Callable[[], None]) -> None:
        """Do a piece of the optimizer's work, as a span of its own: a new basis, or else an update's other work."""
        with self.span("refresh" if name == "refresh" else "optimizer"):
            work()

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Time what is done inside as ``part`` of an update."""
        self._switch()
        self._stack.append(part)
        with record_function(part) if self._torch else contextlib.nullcontext():
            try:
                yield
            finally:
                self._switch()
                self._stack.pop()

    def _switch(self) -> None:
        if self._device.type == "cuda" and self._torch:
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._stack:
            self._spent[self._stack[-1]] += now - self._since
        self._since = now

    def update_done(self) -> str | None:
        """Count an update; return the table after the last of those that are looked at."""
        self._done += 1
        if self._done == 0:
            activities = [ProfilerActivity.CPU]
            activities += [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
            self._optimizer.observer = self
            self._torch = profile(activities=activities)
            self._torch.__enter__()
            self._spent.clear()
            self._seconds = time.perf_counter()
        return self.close() if self._done == self._updates else None

    def close(self) -> str | None:
        """Write what was seen, if that is not done; the table."""
        self._optimizer.observer = None
        seen, self._torch = self._torch, None
        if seen is not None:
            self._seconds = time.perf_counter() - self._seconds
            seen.__exit__(None, None, None)
        if self._done <= 0:
            return f"--profile: the run ended with its first {_WARM_UP} updates, which do not count"
        if seen is None:
            return None
        table = self._table(seen)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "table.txt").write_text(table + "\n")
            seen.export_chrome_trace(str(self._folder / "trace.json.gz"))
        except (OSError, RuntimeError) as error:  # no reason to stop
            log.warning("%s cannot be written (%s)", self._folder, error)
        return table

    def _table(self, seen: Any) -> str:
        updates = min(self._done, self._updates)
        named = sum(self._spent.values())
        spent = {**{part: self._spent[part] for part in _PARTS}, "other": max(0.0, self._seconds - named)}
        apart = spent["evaluation"] + spent["checkpoint"]
        lines = [
            f"{updates} updates, {1000 * (self._seconds - apart) / updates:.1f} ms each without what is between them"
        ]
        for part, seconds in spent.items():
            share = f"{1000 * seconds / updates:9.1f} ms {100 * seconds / self._seconds:5.1f} %"
            lines.append(f"{part:<11}{share}   {_MEANING.get(part, '')}".rstrip())
        sort = "self_device_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        heaviest = seen.key_averages().table(sort_by=sort, row_limit=10, max_name_column_width=48)
        return "\n".join([*lines, "", "the ten heaviest operations, by their own time:", str(heaviest)])
