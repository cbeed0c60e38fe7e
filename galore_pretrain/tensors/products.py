"""Products of matrices in bf16, computed in fp32 where a CPU is slow at bf16."""

from functools import cache

import torch
from torch import Tensor

from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.place import is_cpu

_CHUNKS_PER_BLOCK = 8  # a matrix product wants more rows than a cache holds


# A CPU without bf16 instructions is faster in fp32, but an fp32 copy of ``wide`` (m × n) would take twice its memory.
# So ``wide`` is taken to fp32 a block of rows at a time, and ``thin`` (n × r) once. A row of the result depends on one
# block alone: its n products are summed in fp32 and rounded to bf16 once.
def product(wide: Tensor, thin: Tensor) -> Tensor:
    """Return ``wide`` @ ``thin`` (m × n, n × r → m × r) in the dtype of ``wide``; sums are in fp32."""
    if wide.dtype == torch.float32 or has_fast_bf16(wide.device):
        if thin.dtype != wide.dtype:
            thin = thin.to(wide.dtype)
        return wide @ thin
    thin = thin.float()
    m, _ = wide.shape
    _, r = thin.shape
    out = torch.empty(m, r, dtype=wide.dtype, device=wide.device)
    for start, stop in chunks(wide, m, _rows_of_a_block(wide)):
        out[start:stop] = wide[start:stop].float() @ thin
    return out


# Here the long dimension m is summed over, so every block adds to the whole result (n × r). A bf16 sum of many blocks
# would be rounded at each of them and lose small terms: it is kept in fp32. Blocks are of rows, as memory has them, and
# no transposed copy of ``wide`` is made.
def product_of_transposed(wide: Tensor, thin: Tensor) -> Tensor:
    """Return ``wide``ᵀ @ ``thin`` (m × n, m × r → n × r); in fp32 where a CPU is slow at bf16, else as ``wide``."""
    if wide.dtype == torch.float32 or has_fast_bf16(wide.device):
        if thin.dtype != wide.dtype:
            thin = thin.to(wide.dtype)
        return wide.T @ thin
    m, n = wide.shape
    _, r = thin.shape
    out = torch.zeros(n, r, dtype=torch.float32, device=wide.device)
    for start, stop in chunks(wide, m, _rows_of_a_block(wide)):
        # No names for the fp32 copies, which would keep them until the next block has its own.
        out.addmm_(wide[start:stop].float().T, thin[start:stop].float())
    return out


def _rows_of_a_block(wide: Tensor) -> int:
    """Return how many rows of ``wide`` are taken to fp32 at a time."""
    _, columns = wide.shape
    elements = _CHUNKS_PER_BLOCK * chunk_elements(wide.device)
    return max(1, elements // max(1, columns))


def has_fast_bf16(device: torch.device) -> bool:
    """Return whether bf16 products are faster than fp32 ones. A Xeon with AVX-512 alone takes 3.6 times as long."""
    return not is_cpu(device) or _cpu_has_bf16()


@cache
def _cpu_has_bf16() -> bool:
    """Return whether this CPU has instructions for bf16 products (x86: AVX-512 BF16 or AMX; Arm: BF16)."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
