"""Where work is done. In a plan for a GPU that this machine has not, fake tensors on the CPU stand for a GPU's."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_gpu_is_planned: ContextVar[bool] = ContextVar("gpu_is_planned", default=False)


def is_cpu(device: torch.device) -> bool:
    """Return whether work on ``device`` is a CPU's: not where the CPU stands for a GPU."""
    return device.type == "cpu" and not _gpu_is_planned.get()


def is_gpu(device: torch.device) -> bool:
    """Return whether work on ``device`` is a GPU's, of this machine or of one that is planned for."""
    return device.type == "cuda" or (device.type == "cpu" and _gpu_is_planned.get())


@contextmanager
def planned_for_gpu() -> Iterator[None]:
    """Let tensors on the CPU, which have to be fake, stand for tensors on a GPU in this context."""
    token = _gpu_is_planned.set(True)
    try:
        yield
    finally:
        _gpu_is_planned.reset(token)
