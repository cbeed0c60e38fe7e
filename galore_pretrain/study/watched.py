"""A run that is watched while it goes on: its lines are read on from where the last look ended, and kept as curves."""

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from galore_pretrain.config.options import texts_of
from galore_pretrain.study.results import Result, json_object, read_config

_MOST_POINTS = 120  # of a curve: more of them show noise
_LATEST = 50  # updates of which the speed is told
_PATIENCE = 60.0  # seconds beyond ten updates, or an evaluation that is due, after which a run is called silent
_PATIENCE_AT_FIRST = 600.0  # before the first update, when text is read and weights are made
_PATIENCE_AT_LAST = 600.0  # behind the last update, when the model is written

_WRITTEN = (".lock", "config.json", "metrics.jsonl", "summary.json")  # whose times tell when a run did something last

CURVES = (
    "loss",
    "eval_perplexity",
    "eval_score",
    "lr",
    "tokens_per_second",
    "peak_memory_bytes",
    "subspace_overlap",
    "subspace_overlap_paired",
    "subspace_overlap_noise",
)
"""The keys of ``metrics.jsonl`` that are kept as curves."""

SKIPPED = "skipped"
"""The curve of how many updates were skipped so far."""

STARTING, RUNNING, SILENT, SAVING, ENDED = "starting", "running", "silent", "saving", "ended"
"""The states of a run. A silent one has written no line for longer than it should: it was stopped, or is stuck."""


@dataclass
class Point:
    """A point of a curve: of ``count`` neighbouring values, the last x, the sum of y, and the range of y."""

    x: float
    total: float
    count: int
    low: float
    high: float

    @property
    def mean(self) -> float:
        """Return the mean of y."""
        return self.total / self.count

    def join(self, later: "Point") -> None:
        """Take in the values of a later point."""
        self.x = later.x
        self.total += later.total
        self.count += later.count
        self.low = min(self.low, later.low)
        self.high = max(self.high, later.high)


# Whenever there are too many points, each two neighbours become one, which from then on is of twice as many values. So
# a run of any length costs the same memory, and a value costs the same time whenever it comes.
@dataclass
class Curve:
    """Keeps a curve of any length as 120 points at most, evenly spread over its values."""

    points: list[Point] = field(default_factory=list)
    _values_a_point: int = 1

    def add(self, x: float, y: float) -> None:
        """Add a value behind all others."""
        value = Point(x, y, 1, y, y)
        if self.points and self.points[-1].count < self._values_a_point:
            self.points[-1].join(value)
            return
        if len(self.points) == _MOST_POINTS:
            self._halve()
        self.points.append(value)

    def _halve(self) -> None:
        """Make one point of each two."""
        halved = self.points[::2]
        for point, later in zip(halved, self.points[1::2], strict=True):
            point.join(later)
        self.points = halved
        self._values_a_point *= 2


class WatchedRun:
    """A run's folder, which `look` reads on.

    ``config``, ``environment`` and ``summary`` are as in `Result`. ``last`` is the last line of an update, and
    ``evaluation`` the last one that was evaluated; both are empty before. ``curves`` has the values of `CURVES` and
    `SKIPPED` by update. ``saved`` and ``failed`` count refreshes that were left out, and that found no basis.
    ``changed`` is when the run wrote last, in seconds since 1970. ``planned`` is what was planned of its memory, in
    bytes, where that is known.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.changed = 0.0
        self.planned: int | None = None
        self._versions: dict[str, int] = {}
        self._begin()

    def _begin(self) -> None:
        """Forget all lines."""
        self.curves = {name: Curve() for name in (*CURVES, SKIPPED)}
        self.last: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.skipped = 0
        self.saved = 0
        self.failed = 0
        self.unread = 0
        self._latest: deque[tuple[float, float]] = deque(maxlen=_LATEST)  # tokens and seconds of an update
        self._offset = 0
        self._last_bytes = b""

    def look(self) -> None:
        """Read what was written since the last look."""
        written = [self._written(name) for name in _WRITTEN]
        self.changed = max(written) / 1e9
        if self._is_new("config.json"):
            self.config, self.environment = read_config(self.folder)
        if self._is_new("summary.json"):
            self.summary = json_object(self.folder / "summary.json")
        self._read_on()

    def _written(self, name: str) -> int:
        """Return when a file of the run was written last, in nanoseconds since 1970; 0 where there is none."""
        try:
            return (self.folder / name).stat().st_mtime_ns
        except OSError:
            return 0

    def _is_new(self, name: str) -> bool:
        """Return whether a file was written since this was asked before."""
        written = self._written(name)
        is_new = written != self._versions.get(name, 0)
        self._versions[name] = written
        return is_new

    # A resumed run cuts its file to what its checkpoint remembers, and a new one in the same folder begins it anew. So
    # the bytes before the place are looked at once more: a line has a time in it and is written once only.
    def _read_on(self) -> None:
        """Take the whole lines behind the last one; all of them where the file is not the one of before."""
        with contextlib.suppress(OSError), (self.folder / "metrics.jsonl").open("rb") as file:
            file.seek(self._offset - len(self._last_bytes))
            if file.read(len(self._last_bytes)) != self._last_bytes:
                self._begin()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):  # which is being written
                    break
                self._offset += len(line)
                self._last_bytes = line
                self._take(line)

    def _take(self, text: bytes) -> None:
        """Take in a line of ``metrics.jsonl``. One that is damaged is counted as unread."""
        try:
            line = json.loads(text)
        except ValueError:
            self.unread += 1
            return
        if not isinstance(line, dict) or not {"step", "tokens_seen"} <= line.keys():
            return
        for name in CURVES:
            value = line.get(name)
            if value is not None and math.isfinite(value):
                self.curves[name].add(line["step"], value)
        if line.get("eval_loss") is not None:
            self.evaluation = line
        if line["step"]:  # what a run begins from is evaluated as step 0
            self._take_update(line)

    def _take_update(self, line: dict[str, Any]) -> None:
        """Take in the line of an update: its time, and what it counts."""
        tokens = line["tokens_seen"] - self.last.get("tokens_seen", 0)
        speed = line.get("tokens_per_second")
        if speed:
            self._latest.append((tokens, tokens / speed))
        self.last = line
        self.saved += line.get("refreshes_saved", 0)
        self.failed += line.get("failed_refreshes", 0)
        loss = line.get("loss")
        most = self.config.get("max_loss") or math.inf
        if loss is None or loss > most or line.get("skipped_tensors"):
            self.skipped += 1
        self.curves[SKIPPED].add(line["step"], self.skipped)

    def result(self) -> Result:
        """Return the run as reports compare it, with its last line alone."""
        lines = [self.last] if self.last else []
        # The summary of before a run was made longer says nothing of its end.
        summary = self.summary if self.summary.get("steps") == self.last.get("step") else {}
        return Result(self.folder, lines, self.config, summary, environment=self.environment)

    def state(self, now: float) -> str:
        """Return the state of the run; ``now`` is in seconds since 1970."""
        silence = now - self.changed
        result = self.result()
        if result.summary and self._is_at_end():  # also where the last evaluation is not finite
            return ENDED
        if result.is_over:
            return ENDED if silence > _PATIENCE_AT_LAST else SAVING
        if silence > self._patience():
            return SILENT
        return RUNNING if self.last else STARTING

    # Lines have no times, but an update's tokens and speed tell how long it took. Evaluations are not in that: one is
    # forward passes alone, and takes less than as many tokens do in training.
    def _patience(self) -> float:
        """Return the seconds that the run may take for its next line."""
        if not self.last or not self._latest:
            return _PATIENCE_AT_FIRST
        seconds = _PATIENCE + 10 * self.seconds_an_update
        step = self.last["step"] + 1
        if step % (self.config.get("eval_every") or 1) == 0 or self._is_at_last_update():
            texts = len(texts_of(self.config.get("eval_data") or ""))
            seconds += texts * (self.config.get("eval_tokens") or 0) / self.tokens_per_second
        return seconds

    def _is_at_end(self) -> bool:
        """Return whether the run's last update is made, by the number of updates or of tokens."""
        steps = self.config.get("steps")
        if steps:
            return bool(self.last["step"] >= steps)
        return bool(self.last["tokens_seen"] >= (self.config.get("max_tokens") or 0))

    def _is_at_last_update(self) -> bool:
        """Return whether the next update may be the last one, by the number of updates or of tokens."""
        if self.last["step"] + 1 == self.config.get("steps"):
            return True
        tokens_an_update = self.last["tokens_seen"] / self.last["step"]
        left = (self.config.get("max_tokens") or math.inf) - self.last["tokens_seen"]
        return bool(left <= 2 * tokens_an_update)

    @property
    def tokens_per_second(self) -> float:
        """Return the speed of the last fifty updates; 0 before the first."""
        tokens, seconds = self._sums()
        return tokens / seconds if seconds else 0.0

    @property
    def seconds_an_update(self) -> float:
        """Return how long the last fifty updates took, in the mean; 0 before the first."""
        _, seconds = self._sums()
        return seconds / len(self._latest) if self._latest else 0.0

    def _sums(self) -> tuple[float, float]:
        """Return the tokens and the seconds of the last fifty updates."""
        tokens = sum(tokens for tokens, _ in self._latest)
        seconds = sum(seconds for _, seconds in self._latest)
        return tokens, seconds

    @property
    def seconds_left(self) -> float | None:
        """Return how long the updates that are left take at the last speed, without evaluations; None before that."""
        if not self._latest:
            return None
        steps = self.config.get("steps")
        if steps:
            updates = max(0, int(steps) - int(self.last["step"]))
            return updates * self.seconds_an_update
        tokens = self.config.get("max_tokens")
        if not tokens:
            return None
        tokens_left = max(0, int(tokens) - int(self.last["tokens_seen"]))
        return tokens_left / self.tokens_per_second

    @property
    def measures_process(self) -> bool:
        """Return whether the peaks are of the whole process, as on a CPU, whose allocator does not tell."""
        peak = self.last.get("peak_memory_bytes")
        return peak is not None and peak == self.last.get("process_peak_bytes")


class Watched:
    """Holds the runs of folders, each of which is a run's or holds runs, and exists. `look` finds later runs too."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._runs: dict[Path, WatchedRun] = {}

    @property
    def holds_runs(self) -> bool:
        """Return whether one of the folders is no run's: more runs may begin there."""
        return not all(map(_is_run, self._paths))

    def look(self) -> list[WatchedRun]:
        """Find the runs, read each on, and return them in the order of the folders and their names."""
        folders: dict[Path, None] = {}
        for path in self._paths:
            inside = [path]
            if not _is_run(path):
                inside = sorted(filter(_is_run, path.glob("*")))
            folders |= dict.fromkeys(inside)
        self._runs = {folder: self._runs.get(folder) or WatchedRun(folder) for folder in folders}
        for run in self._runs.values():
            run.look()
        return list(self._runs.values())


def _is_run(folder: Path) -> bool:
    """Return whether a folder is a run's, be it one that has written no line yet."""
    return any(os.path.exists(folder / name) for name in ("metrics.jsonl", ".lock"))
