"""A line of progress: what is done, its numbers, and how long the rest takes."""

import io
import re
from typing import Any

import pytest

from galore_pretrain.train import metrics
from galore_pretrain.train.metrics import Progress


class Clock:
    """Stands for the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


EVALUATION = {"eval_loss": 2.0, "eval_perplexity": 7.389, "eval_tokens": 100, "tokens_seen": 0}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    monkeypatch.setattr("sys.stderr", io.StringIO())  # no terminal
    return clock


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return said


@pytest.mark.parametrize("before", [0, 40])
def test_what_is_left_is_told_from_updates_alone(before: int, clock: Clock, caplog: Any) -> None:
    """An evaluation of what a run begins from takes as long as it takes, and is no update."""
    caplog.set_level("INFO")
    progress = Progress(before + 100, "step", before)
    clock.now += 50
    progress.log(EVALUATION, before)
    (line,) = lines(caplog)
    assert line.startswith(f"step {before}/{before + 100}  ")
    assert "left" not in line
    clock.now += 20
    progress.log(EVALUATION, before + 10)
    (line,) = lines(caplog)
    assert re.search(r"  left 03:00$", line), line
