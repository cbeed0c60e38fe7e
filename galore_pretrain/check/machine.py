"""The part `environment`: what the machine has, and how fast it is at what an update consists of."""

import os
import time
from importlib import metadata

import torch

from galore_pretrain.check.part import Part
from galore_pretrain.check.updates import forget, timed, wait_for
from galore_pretrain.tensors.capability import runs_on

_GIB = 2**30
_LAUNCHES = 20_000


def environment(part: Part) -> None:
    """Tell the versions, the speed of products, copies and launches, and on a GPU what is free."""
    device = part.device
    part.number("Triton", _version_of("triton"))
    part.number("own kernels run here", runs_on(device))
    part.number("CPU cores", os.cpu_count() or 0)
    if part.is_on_gpu:
        free, total = torch.cuda.mem_get_info(device)
        part.number("GiB that CUDA shows", round(total / _GIB, 3))
        part.number("GiB free at first", round(free / _GIB, 3))
    size = 8192 if part.is_on_gpu else 512
    _time_products(part, size)
    _time_copies(part)
    _time_launches(part)
    if part.is_on_gpu:
        forget(device)
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - torch.cuda.memory_reserved(device)
        part.number("GiB beside the allocator: context, kernels, other programs", round(outside / _GIB, 3))


def _version_of(package: str) -> str:
    """Return the version of a package that may not be installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


# A product of ones is known: every entry is the size, which bf16 holds for a power of two.
def _time_products(part: Part, size: int) -> None:
    """Time square products in bf16 and fp32, and check them where they are known."""
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        ones = torch.ones(size, size, device=part.device, dtype=dtype)
        is_right = bool((ones @ ones == size).all())
        part.check(f"{name}: a product of ones of {size} × {size}", is_right, f"all entries are {size}", is_right)
        matrix = torch.randn(size, size, device=part.device).to(dtype)
        times = timed(lambda matrix=matrix: matrix @ matrix, part.device)  # type: ignore[misc]
        part.number(f"{name}: TFLOP/s of a product", round(2 * size**3 / times.done / 1e9, 3))


def _time_copies(part: Part) -> None:
    """Time a copy on the device."""
    elements = 2**28 if part.is_on_gpu else 2**24
    source = torch.zeros(elements, dtype=torch.int32, device=part.device)
    target = torch.empty_like(source)
    times = timed(lambda: target.copy_(source), part.device)
    part.number("GB/s of a copy, read and written", round(2 * source.nbytes / times.done / 1e6, 1))


def _time_launches(part: Part) -> None:
    """Time the cheapest operation that Python can ask for."""
    x = torch.zeros(1, device=part.device)
    wait_for(part.device)
    began = time.perf_counter()
    for _ in range(_LAUNCHES):
        x.add_(1)
    seconds = time.perf_counter() - began
    wait_for(part.device)
    part.number("µs of x.add_(1) from Python", round(1e6 * seconds / _LAUNCHES, 2))
