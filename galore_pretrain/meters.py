"""Meters of memory: peaks of the device's allocator and of the process, and what is free."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (  # of version 2 and 1; what is used includes files that the kernel keeps as long as there is room
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was allocated at once: by CUDA's allocator on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_peak_bytes()


def process_peak_bytes() -> int:
    """The largest resident set of this process so far."""
    with contextlib.suppress(OSError, KeyError):  # Linux: what getrusage tells there may be that of the parent
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """Return what this process holds now, in bytes; the most it has held where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return process_peak_bytes()


def spare_bytes() -> int:
    """Host memory that a copy may take: what stays free if this process grows to its peak again, less 1 GiB."""
    return available_bytes(torch.device("cpu")) - (process_peak_bytes() - resident_bytes()) - 2**30


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that there is no more memory: of CUDA's allocator, the CPU's or Python's."""
    told = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(words in str(error) for words in told)


def available_bytes(device: torch.device) -> int:
    """Return the bytes that are free on ``device`` now; on a CPU, of the machine's memory or the container's share."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for limit, used, kinds, files in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or "max"
            stat = dict(line.split() for line in (_CGROUP / kinds).read_text().splitlines())
            taken = int((_CGROUP / used).read_text()) - int(stat[files])
            free.append(int((_CGROUP / limit).read_text()) - taken)
    with contextlib.suppress(OSError):
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) * 1024)
    return min(free)
