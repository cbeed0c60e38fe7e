"""``galore-pretrain report --watch``: a page of runs that is written anew while they go on, until all have ended."""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from galore_pretrain.config.options import RunConfig, shipped_models
from galore_pretrain.errors import InputError, did_you_mean
from galore_pretrain.optim import is_own
from galore_pretrain.signals import on_stop
from galore_pretrain.study.watch_page import Moment, page
from galore_pretrain.study.watched import ENDED, Watched, WatchedRun

_POLL_SECONDS = 0.2
_BETWEEN_RUNS = 60.0  # seconds that a sweep may take from the end of a run to the beginning of the next
log = logging.getLogger(__name__)


def check_paths(paths: Sequence[Path]) -> None:
    """Raise InputError where a folder is not there: what runs begin in it would never be seen."""
    for path in paths:
        if not path.is_dir():
            raise InputError(
                f"{path}: no such folder; {did_you_mean(str(path))}name a run's folder, or one in which runs begin"
            )


class Watch:
    """Writes ``index.html`` into the folder ``output`` every so many ``seconds``, of the runs in ``paths``."""

    def __init__(self, paths: Sequence[Path], output: Path, seconds: float) -> None:
        self.file = output / "index.html"
        self._watched = Watched(paths)
        self._seconds = seconds
        self._plans: dict[Path, int | None] = {}
        self._stop: int | None = None

    # A plan takes seconds, and torch has to be imported for the first one. So a page is written first, and at most one
    # plan is made before the next.
    def run(self) -> int:
        """Watch until all runs have ended or a signal comes; return the exit code. OSError where nothing is written."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with on_stop(self._interrupted):
            while True:
                runs = self._watched.look()
                self._tell_plans(runs)
                now = time.time()
                is_last = self._stop is not None or self._is_over(runs, now)
                self._write(page(runs, Moment(now, None if is_last else self._seconds)))
                if is_last:
                    break
                due = time.monotonic() + self._seconds
                self._plan_one(runs)
                self._wait_until(due)
        return 0 if self._stop is None else 128 + self._stop

    def _interrupted(self, number: int) -> None:
        """Ask for the last page, as a signal's handler does."""
        self._stop = number

    def _wait_until(self, due: float) -> None:
        """Wait, but not beyond a signal."""
        while self._stop is None and time.monotonic() < due:
            time.sleep(min(_POLL_SECONDS, self._seconds))

    def _is_over(self, runs: Sequence[WatchedRun], now: float) -> bool:
        """Return whether all runs have ended, and no other is to be expected."""
        if not runs or any(run.state(now) != ENDED for run in runs):
            return False
        since = now - max(run.changed for run in runs)
        return not self._watched.holds_runs or since > _BETWEEN_RUNS

    def _write(self, text: str) -> None:
        """Replace the page, so that who opens it has the whole of one or the other."""
        aside = self.file.with_name(f"{self.file.name}.{os.getpid()}")
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # of a folder's name that is no text
        os.replace(aside, self.file)

    def _tell_plans(self, runs: Sequence[WatchedRun]) -> None:
        """Give each run its planned peak where that is known: at its end the run's own, before that one made here."""
        for run in runs:
            run.planned = run.summary.get("planned_peak_bytes", self._plans.get(run.folder))

    def _plan_one(self, runs: Sequence[WatchedRun]) -> None:
        """Plan the memory of the first run that has no plan yet."""
        for run in runs:
            is_known = "planned_peak_bytes" in run.summary or run.folder in self._plans
            if run.config and not is_known:
                self._plans[run.folder] = planned_peak(run)
                return


# A run plans its memory at its end, so as not to wait for it at its beginning. So who watches plans it from what
# `config.json` has. Nothing is downloaded for that, and no file of an own method executed.
def planned_peak(run: WatchedRun) -> int | None:
    """Return the planned peak of a run of one process in bytes; None where it cannot be planned here."""
    model = run.config.get("model") or ""
    is_here = model in shipped_models() or os.path.exists(model)
    if run.environment.get("processes", 1) > 1 or not is_here or is_own(run.config["optim"]):
        return None
    values = {}
    for name, value in run.config.items():
        values[name] = tuple(value) if isinstance(value, list) else value  # JSON has no tuples
    is_on_gpu = "gpu" in run.environment.get("hardware", {})
    values["device"] = "cuda" if is_on_gpu else "cpu"
    try:
        from galore_pretrain.model.architecture import architecture_of_run  # torch and transformers
        from galore_pretrain.planning.plan import measure

        config = RunConfig.of(values)
        return measure(config, architecture_of_run(config)).peak_bytes
    except Exception as error:  # no reason to stop watching
        log.info("%s: its memory could not be planned: %s", run.folder, error)
        return None
