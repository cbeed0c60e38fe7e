"""A large tensor a chunk at a time, so that temporaries are small; and what a plan leaves out of that."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

SMALL_CHUNK = 1 << 18
"""Elements that are worked on at a time on a CPU: what its cache holds. No device works on fewer."""


def chunk_elements(device: torch.device) -> int:
    """Elements that are worked on at a time: on a CPU, what its cache holds; elsewhere 8 MiB of fp32.

    So no fp32 copy of a large weight, gradient or moment ever exists. Results do not depend on it.
    """
    return SMALL_CHUNK if device.type == "cpu" else 1 << 21


@dataclass
class Abridgement:
    """``alike``: how many pieces the present one stands for."""

    alike: int = 1


_abridgement: Abridgement | None = None


@contextmanager
def abridged() -> Iterator[Abridgement]:
    """Meanwhile, `pieces` leaves out all but the first two and the last: what they hold is alike. For fake tensors,
    whose memory or work is asked; the values of real ones would be wrong."""
    global _abridgement  # noqa: PLW0603  (autograd's threads must see it, which they do not a context variable)
    _abridgement = Abridgement()
    try:
        yield _abridgement
    finally:
        _abridgement = None


def pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive pieces of ``size``, the last of which may be smaller."""
    starts: Sequence[int] = range(0, total, size)
    if _abridgement is None or len(starts) <= 3:
        for start in starts:
            yield start, min(start + size, total)
        return
    outer = _abridgement.alike  # of a piece that is itself cut into these
    for i, start in enumerate((*starts[:2], starts[-1])):
        _abridgement.alike = outer * (len(starts) - 2 if i == 1 else 1)
        yield start, min(start + size, total)
        _abridgement.alike = outer
