"""What a run takes: peaks of the device's allocator and of the process."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was allocated at once: by CUDA's allocator on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_peak_bytes()


def process_peak_bytes() -> int:
    """The largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
