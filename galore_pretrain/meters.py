"""Meters of memory: peaks of the device's allocator and of the process, and what is free."""

import contextlib
import os
import resource
import sys
from pathlib import Path

import torch

_KIB = 1024
_CGROUP = Path("/sys/fs/cgroup")
_CGROUP_FILES = (  # of version 2 and 1: the limit, what is used, a table, and that table's line on files
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What errors of the CPU's allocator and of CUDA's libraries say when there is no more memory."""


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most bytes allocated at once: by CUDA's allocator on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return process_peak_bytes()


def process_peak_bytes() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    # Of Linux: what getrusage tells there may be that of the parent.
    with contextlib.suppress(OSError, KeyError):
        return _number(Path("/proc/self/status"), "VmHWM:") * _KIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # which counts bytes, where others count KiB
        return peak
    return peak * _KIB


def forget_process_peak() -> None:
    """Begin `process_peak_bytes` anew at what the process holds now, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes() -> int:
    """Return what this process holds now, in bytes; the most it has held where the system does not say."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]
    except OSError:
        return process_peak_bytes()
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def spare_bytes() -> int:
    """Return the bytes of host memory that a copy may take."""
    # The process may grow to its peak again, so that much must stay free, and 1 GiB for all else.
    available = available_bytes(torch.device("cpu"))
    growth = process_peak_bytes() - resident_bytes()
    return available - growth - 2**30


def ran_out(error: BaseException) -> bool:
    """Return whether an exception says that there is no more memory: of CUDA's allocator, the CPU's or Python's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(error)
    return any(words in message for words in _NO_MEMORY)


def available_bytes(device: torch.device) -> int:
    """Return the bytes that are free on ``device`` now; on a CPU, of the machine's memory or the container's share."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    bounds = [installed]
    for limit, used, table, files in _CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or "max"
            bounds.append(_container_bytes(limit, used, table, files))
    with contextlib.suppress(OSError):
        bounds.append(_number(Path("/proc/meminfo"), "MemAvailable:") * _KIB)
    return min(bounds)


def _container_bytes(limit: str, used: str, table: str, files: str) -> int:
    """Return the bytes that are free in this process's container, by the files of its cgroup."""
    # What is used includes files that the kernel keeps in memory as long as there is room.
    kept_files = _number(_CGROUP / table, files)
    taken = int((_CGROUP / used).read_text()) - kept_files
    return int((_CGROUP / limit).read_text()) - taken


def _number(file: Path, key: str) -> int:
    """Return the number that follows ``key`` on its line of a table; KeyError if there is no such line."""
    for line in file.read_text().splitlines():
        words = line.split()
        if words[:1] == [key]:
            return int(words[1])
    raise KeyError(key)
