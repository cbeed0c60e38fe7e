"""Subspaces of a gradient: which side is projected, the two ways to find a basis, and projecting itself.

Notation of the GaLore paper (arXiv 2403.03507, §3 and Algorithm 2): G is m × n, P an m × r basis of its columns, Q an
r × n basis of its rows; the low-rank gradient is PᵀG (left), GQᵀ (right) or PᵀGQᵀ (full).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
Side = Literal["left", "right"]
BasisFn = Callable[[Tensor, int, Side, Tensor, int], Tensor]
"""(grad m × n, rank, side, previous, seed) -> orthonormal basis in fp32: m × r of grad's columns (left) or r × n of its
rows (right); ``previous`` is the basis in use, of the same shape."""


def sides(m: int, n: int, proj_type: str) -> tuple[bool, bool]:
    """Whether an m × n gradient is projected from the (left, right). ``std`` keeps the shorter basis."""
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type {proj_type!r} is unknown; choose from {', '.join(PROJ_TYPES)}")
    if proj_type == "full":
        return True, True
    right = {"right": True, "left": False, "std": m >= n, "reverse_std": m < n}[proj_type]
    return not right, right


def project(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """PᵀG, GQᵀ or PᵀGQᵀ for P m × r and Q r × n, in the dtype of the bases."""
    low = grad
    if left is not None:
        low = left.T @ low.to(left.dtype)
    if right is not None:
        low = low.to(right.dtype) @ right.T
    return low


def svd_basis(grad: Tensor, rank: int, side: Side, previous: Tensor, seed: int) -> Tensor:
    """The ``rank`` leading singular vectors (the paper's choice), each with its largest entry positive.

    A singular vector is determined up to its sign, which rounding alone can flip; with moments carried over a
    refresh, a flipped sign is a reversed coordinate.
    """
    basis = unsigned_svd_basis(grad, rank, side, previous, seed)
    along = 0 if side == "left" else 1
    return basis * basis.gather(along, basis.abs().argmax(along, keepdim=True)).sign()


def unsigned_svd_basis(grad: Tensor, rank: int, side: Side, previous: Tensor, seed: int) -> Tensor:
    """The leading singular vectors with the signs that LAPACK gave them, as the published code takes them."""
    del previous, seed
    u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
    return torch.as_tensor(u[:, :rank] if side == "left" else vh[:rank])


def randomized_basis(grad: Tensor, rank: int, side: Side, previous: Tensor, seed: int) -> Tensor:
    """A randomized range finder with one power step (Halko et al., arXiv 0909.4061, Algorithm 4.4).

    Two products with G, one with Gᵀ and three thin QRs instead of a full SVD. The test matrix depends on ``seed``
    alone: a subspace that has not moved keeps its very basis, and with it the meaning of the moments carried over.
    """
    del previous
    if side == "right":
        return randomized_basis(grad.T, rank, "left", grad, seed).T
    test = torch.randn(grad.shape[1], rank, generator=_generator(seed, grad.device), device=grad.device)
    sample = _orthonormal(grad @ test.to(grad.dtype)).to(grad.dtype)
    # Orthonormalized in between: on a steep spectrum G(GᵀY) alone loses its small directions.
    return _orthonormal(grad @ _orthonormal(grad.T @ sample).to(grad.dtype))


def random_basis(shape: tuple[int, int], side: Side, seed: int, device: torch.device) -> Tensor:
    """An orthonormal basis (m × r left, r × n right) that depends on ``seed`` alone: where every matrix starts."""
    if side == "right":
        return random_basis((shape[1], shape[0]), "left", seed, device).T
    return _orthonormal(torch.randn(shape, generator=_generator(seed, device), device=device))


def _orthonormal(matrix: Tensor) -> Tensor:
    """The Q of a Householder QR with positive diagonal R, which makes it unique. fp32.

    Cholesky-QR would be in GEMMs alone, but loses orthogonality completely on the steep spectra of real gradients.
    """
    q, r = torch.linalg.qr(matrix.float())
    return torch.as_tensor(q * r.diagonal().sign().where(r.diagonal() != 0, 1.0))


def _generator(seed: int, device: torch.device) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


BASES: dict[str, BasisFn] = {
    "svd": svd_basis,
    "randomized": randomized_basis,
    "svd_unsigned": unsigned_svd_basis,
}
