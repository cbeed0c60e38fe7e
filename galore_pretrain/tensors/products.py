"""Products of matrices in bf16, also where a CPU is slow in them."""

from functools import cache

import torch
from torch import Tensor

from galore_pretrain.tensors.chunks import chunk_elements, chunks


def product(wide: Tensor, thin: Tensor) -> Tensor:
    """``wide`` @ ``thin`` in the dtype of ``wide``, by blocks of rows in fp32 where a CPU is slow in bf16."""
    if wide.dtype == torch.float32 or has_fast_bf16(wide.device):
        return wide @ (thin if thin.dtype == wide.dtype else thin.to(wide.dtype))
    thin = thin.float()
    out = torch.empty(wide.shape[0], thin.shape[1], dtype=wide.dtype, device=wide.device)
    rows = max(1, 8 * chunk_elements(wide.device) // max(1, wide.shape[1]))
    for start, stop in chunks(wide, wide.shape[0], rows):
        out[start:stop] = wide[start:stop].float() @ thin
    return out


def product_of_transposed(wide: Tensor, thin: Tensor) -> Tensor:
    """``wide``ᵀ @ ``thin``, likewise; there summed up in fp32, and left so, over blocks of rows as they lie."""
    if wide.dtype == torch.float32 or has_fast_bf16(wide.device):
        return wide.T @ (thin if thin.dtype == wide.dtype else thin.to(wide.dtype))
    out = torch.zeros(wide.shape[1], thin.shape[1], dtype=torch.float32, device=wide.device)
    rows = max(1, 8 * chunk_elements(wide.device) // max(1, wide.shape[1]))
    for start, stop in chunks(wide, wide.shape[0], rows):
        out.addmm_(wide[start:stop].float().T, thin[start:stop].float())
    return out


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones; a Xeon with AVX-512 alone takes 3.6 times as long for them."""
    return device.type != "cpu" or _cpu_has_bf16()


@cache
def _cpu_has_bf16() -> bool:
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
