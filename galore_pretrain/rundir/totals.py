"""Add up a run's time and peaks of memory over all of its starts."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from galore_pretrain.meters import peak_memory_bytes, process_peak_bytes
from galore_pretrain.train.examples import ExampleInputs
from galore_pretrain.train.inputs import Inputs
from galore_pretrain.train.metrics import MetricLogger


class RunTotals:
    """Adds this start's time and peaks to those of the starts before, which a checkpoint holds.

    ``init_revision`` is the commit of a model of the hub that the run began from; None where it began from none.
    ``saved`` is the state of the checkpoint that the run goes on from, or empty. ``started`` is when this process
    began, by `time.monotonic`. ``loggers`` are the main process's, which alone is asked for `state`.
    """

    def __init__(
        self,
        device: torch.device,
        inputs: Inputs | ExampleInputs,
        init_revision: str | None,
        loggers: Sequence[MetricLogger],
        saved: Mapping[str, Any],
        started: float,
    ) -> None:
        self._device = device
        self._inputs = inputs
        self._init_revision = init_revision
        self._loggers = loggers
        self._started = started
        allocator, process = saved.get("peaks", (0, 0))
        self._peaks_before = int(allocator), int(process)
        self._seconds_before = float(saved.get("wall_seconds", 0.0))

    def peaks(self) -> tuple[int, int]:
        """Return the peaks of memory in bytes: of the device's allocator, and of the process."""
        allocator, process = self._peaks_before
        allocator = max(allocator, peak_memory_bytes(self._device))
        process = max(process, process_peak_bytes())
        return allocator, process

    def seconds(self) -> float:
        """Return the seconds that the run has taken so far."""
        return self._seconds_before + time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the run beside its training, in plain JSON values.

        Raises OSError where a logger's lines cannot be written.
        """
        state: dict[str, Any] = {}
        for logger in self._loggers:
            state |= logger.state()
        state["inputs"] = self._inputs.fingerprints()
        state["revision"] = self._inputs.revision
        state["init_revision"] = self._init_revision
        state["peaks"] = self.peaks()
        state["wall_seconds"] = self.seconds()
        return state
