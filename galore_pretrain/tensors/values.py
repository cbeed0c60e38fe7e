"""Questions about a tensor's values: its norm, and whether looking at it would wait for a device."""

import torch
from torch import Tensor

from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.place import is_gpu


# On a CPU, torch makes an fp32 copy of a whole bf16 tensor for this norm. So the norms of its chunks are taken, whose
# copies are small, and ‖G‖ is the norm of those norms.
def gradient_norm(grad: Tensor) -> Tensor:
    """Return ‖G‖ in fp32, a scalar."""
    if grad.dtype == torch.float32 or not grad.is_contiguous() or is_gpu(grad.device):
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        return torch.as_tensor(norm)
    flat = grad.view(-1)
    chunk_norms = []
    for start, stop in chunks(flat, flat.numel(), chunk_elements(grad.device)):
        chunk_norm = torch.linalg.vector_norm(flat[start:stop], dtype=torch.float32)
        chunk_norms.append(chunk_norm)
    norm = torch.linalg.vector_norm(torch.stack(chunk_norms))
    return torch.as_tensor(norm)


# On a CPU, torch makes an fp32 copy of a whole bf16 tensor for norms along a dimension, and takes twelve times as long
# for those of columns as it takes to square and add. So a block of rows is taken at a time.
def sums_of_squares(matrix: Tensor, over: int) -> Tensor:
    """Return the sums of a matrix's squares over dimension ``over``, fp32: one a column (0) or one a row (1)."""
    if is_gpu(matrix.device):
        norms = torch.linalg.vector_norm(matrix, dim=over, dtype=torch.float32)
        return torch.as_tensor(norms.square())
    rows, columns = matrix.shape
    sums = torch.zeros((columns, rows)[over], dtype=torch.float32, device=matrix.device)
    block_rows = max(1, chunk_elements(matrix.device) // max(1, columns))
    for start, stop in chunks(matrix, rows, block_rows):
        block = matrix[start:stop].to(torch.float32, copy=True)
        of_block = block.square_().sum(over)
        if over == 0:
            sums += of_block
        else:
            sums[start:stop] = of_block
    return sums


def channel_norms(matrix: Tensor, over: int) -> Tensor:
    """Return the norms of a matrix over dimension ``over``, fp32: one a column (0) or one a row (1)."""
    if is_gpu(matrix.device):  # one launch, and not three
        return torch.as_tensor(torch.linalg.vector_norm(matrix, dim=over, dtype=torch.float32))
    return sums_of_squares(matrix, over).sqrt_()


def can_look(tensor: Tensor) -> bool:
    """Return whether a value can be looked at without waiting for a device (fake and meta tensors have none)."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values: fake and meta tensors have none."""
    return type(tensor) is Tensor and not tensor.is_meta


class HostCopy:
    """Copies a few numbers from a GPU to the host, for which nobody waits before they are read."""

    def __init__(self, source: Tensor) -> None:
        self._source = source
        self._version = source._version
        self._values = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=True)
        self._values.copy_(source, non_blocking=True)
        self._arrival = torch.cuda.Event()
        self._arrival.record(torch.cuda.current_stream(source.device))

    def is_of(self, tensor: Tensor) -> bool:
        """Return whether the numbers are those that ``tensor`` has now."""
        return tensor is self._source and tensor._version == self._version

    def tolist(self) -> list[float]:
        """Return the numbers, once they are there."""
        self._arrival.synchronize()
        values: list[float] = self._values.tolist()
        return values


def known_true(condition: Tensor) -> bool:
    """Return whether a scalar is true and can be looked at."""
    return can_look(condition) and bool(condition)
