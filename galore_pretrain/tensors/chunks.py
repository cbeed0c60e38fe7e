"""A large tensor a chunk at a time, so that temporaries are small; and what a plan leaves out of that."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SMALL_CHUNK = 1 << 18
"""Elements that are worked on at a time on a CPU: what its cache holds. No device works on fewer."""


def chunk_elements(device: torch.device) -> int:
    """Elements that are worked on at a time: on a CPU, what its cache holds; elsewhere 8 MiB of fp32.

    So no fp32 copy of a large weight, gradient or moment ever exists. Results do not depend on it.
    """
    return SMALL_CHUNK if device.type == "cpu" else 1 << 21


@dataclass
class ChunkSample:
    """Says of a plan's tensors that only three of their chunks are to be made: the first two and the last.

    The others hold and do what the second does. ``repeats``: how many chunks the present one stands for.
    """

    repeats: int = 1


# A plan makes its updates on fake tensors, whose mode carries a `ChunkSample`. So a tensor itself says whether it is a
# plan's, in any thread that meets it, and chunks of real tensors are all made.
def chunks(like: Tensor, total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of consecutive chunks of ``size``, the last of which may be smaller, of ``total``.

    ``like`` is the tensor that is worked on.
    """
    starts: Sequence[int] = range(0, total, size)
    sample: ChunkSample | None = getattr(getattr(like, "fake_mode", None), "chunk_sample", None)
    if sample is None or len(starts) <= 3:
        for start in starts:
            yield start, min(start + size, total)
        return
    outer = sample.repeats  # of a chunk that is itself cut into these
    for i, start in enumerate((*starts[:2], starts[-1])):
        sample.repeats = outer * (len(starts) - 2 if i == 1 else 1)
        yield start, min(start + size, total)
        sample.repeats = outer
