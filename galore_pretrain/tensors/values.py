"""Questions about a tensor's values: its norm, and whether looking at it would wait for a device."""

import torch
from torch import Tensor

from galore_pretrain.tensors.chunks import chunk_elements, chunks


# On a CPU, torch makes an fp32 copy of a whole bf16 tensor for this norm. So the norms of its chunks are taken, whose
# copies are small, and ‖G‖ is the norm of those norms.
def gradient_norm(grad: Tensor) -> Tensor:
    """Return ‖G‖ in fp32, a scalar."""
    if grad.dtype == torch.float32 or not grad.is_contiguous():
        norm = torch.linalg.vector_norm(grad, dtype=torch.float32)
        return torch.as_tensor(norm)
    flat = grad.view(-1)
    chunk_norms = []
    for start, stop in chunks(flat, flat.numel(), chunk_elements(grad.device)):
        chunk_norm = torch.linalg.vector_norm(flat[start:stop], dtype=torch.float32)
        chunk_norms.append(chunk_norm)
    norm = torch.linalg.vector_norm(torch.stack(chunk_norms))
    return torch.as_tensor(norm)


def can_look(tensor: Tensor) -> bool:
    """Return whether a value can be looked at without waiting for a device (fake and meta tensors have none)."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def known_true(condition: Tensor) -> bool:
    """Return whether a scalar is true and can be looked at."""
    return can_look(condition) and bool(condition)
