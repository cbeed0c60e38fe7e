"""Work on a large tensor a chunk at a time, so that temporaries stay small.

A plan, which works on fake tensors, does only a sample of the chunks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from galore_pretrain.tensors.place import is_cpu

SMALL_CHUNK = 1 << 18
"""Number of elements in a chunk on a CPU: 1 MiB of fp32, which its cache holds. No device has smaller chunks."""
_LARGE_CHUNK = 1 << 21  # 8 MiB of fp32


def chunk_elements(device: torch.device) -> int:
    """Return the number of elements to work on at a time: on a CPU what its cache holds, elsewhere 8 MiB of fp32.

    So no fp32 copy of a large weight, gradient or moment ever exists. Results do not depend on the number.
    """
    if is_cpu(device):
        return SMALL_CHUNK
    return _LARGE_CHUNK


@dataclass
class ChunkSample:
    """Makes `chunks` of a plan's tensor yield only three of its chunks: the first two and the last.

    The chunks left out hold and do what the second does. ``repeats`` is the number of chunks that the present one
    stands for.
    """

    repeats: int = 1


# A plan makes its updates on fake tensors, whose mode carries a `ChunkSample`. So a tensor itself says whether it
# belongs to a plan, in any thread that meets it, and all chunks of a real tensor are worked on.
#
# Of k chunks, the sample has the first (1), the second (k - 2, for itself and those left out) and the last (1). Loops
# over chunks may be nested, so these factors are multiplied with the factor of the chunk around them.
def chunks(like: Tensor, total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the consecutive chunks of ``size`` that cover ``total``; the last one may be smaller.

    ``like`` is the tensor that is worked on.
    """
    starts: Sequence[int] = range(0, total, size)
    fake_mode = getattr(like, "fake_mode", None)
    sample: ChunkSample | None = getattr(fake_mode, "chunk_sample", None)
    if sample is None or len(starts) <= 3:
        for start in starts:
            yield start, min(start + size, total)
        return
    outer_repeats = sample.repeats
    sampled_starts = (starts[0], starts[1], starts[-1])
    sampled_repeats = (1, len(starts) - 2, 1)
    for start, repeats in zip(sampled_starts, sampled_repeats, strict=True):
        sample.repeats = outer_repeats * repeats
        yield start, min(start + size, total)
        sample.repeats = outer_repeats
