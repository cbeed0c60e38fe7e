"""What can be known of a tensor's values: norms, and whether looking waits for a device."""

import torch
from torch import Tensor

from galore_pretrain.tensors.chunks import chunk_elements, chunks


def gradient_norm(grad: Tensor) -> Tensor:
    """‖G‖ in fp32, a scalar, without the fp32 copy that torch makes of a bf16 tensor on a CPU."""
    if grad.dtype == torch.float32 or not grad.is_contiguous():
        return torch.as_tensor(torch.linalg.vector_norm(grad, dtype=torch.float32))
    flat, size = grad.view(-1), chunk_elements(grad.device)
    parts = [flat[start:stop] for start, stop in chunks(flat, flat.numel(), size)]
    norms = torch.stack([torch.linalg.vector_norm(part, dtype=torch.float32) for part in parts])
    return torch.as_tensor(torch.linalg.vector_norm(norms))


def can_look(tensor: Tensor) -> bool:
    """Whether a value can be looked at without waiting for a device (fake and meta tensors have none)."""
    return type(tensor) is Tensor and tensor.device.type == "cpu"


def known_true(condition: Tensor) -> bool:
    """Whether a scalar is true and can be looked at."""
    return can_look(condition) and bool(condition)
