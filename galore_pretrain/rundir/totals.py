"""What a run has taken over all of its starts: its time, and its peaks of memory."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from galore_pretrain.meters import peak_memory_bytes, process_peak_bytes
from galore_pretrain.train.inputs import Inputs
from galore_pretrain.train.metrics import MetricLogger


class RunTotals:
    """Adds this start's time and peaks to those of the starts before, which a checkpoint holds.

    ``saved`` is the state of the checkpoint that the run goes on from, ``started`` when this process began, by
    `time.monotonic`. ``loggers`` are the main process's, which alone is asked for `state`.
    """

    def __init__(
        self,
        device: torch.device,
        inputs: Inputs,
        loggers: Sequence[MetricLogger],
        saved: Mapping[str, Any],
        started: float,
    ) -> None:
        self._device, self._inputs, self._loggers, self._started = device, inputs, loggers, started
        self._peaks, self._seconds = saved.get("peaks", (0, 0)), float(saved.get("wall_seconds", 0.0))

    def peaks(self) -> tuple[int, int]:
        """Bytes: (of the device's allocator, of the process)"""
        allocator, process = self._peaks
        return max(allocator, peak_memory_bytes(self._device)), max(process, process_peak_bytes())

    def seconds(self) -> float:
        """Seconds that the run has taken so far."""
        return self._seconds + time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of the run beside its training, in plain JSON values. OSError where a logger's lines
        cannot be written."""
        known: dict[str, Any] = {}
        for logger in self._loggers:
            known |= logger.state()
        inputs = {"inputs": self._inputs.fingerprints(), "revision": self._inputs.revision}
        return known | inputs | {"peaks": self.peaks(), "wall_seconds": self.seconds()}
