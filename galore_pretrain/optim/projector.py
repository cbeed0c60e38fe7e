"""Subspaces of a gradient: which side is projected, the two ways to find a basis, and projecting itself.

Notation of the GaLore paper (arXiv 2403.03507, §3 and Algorithm 2): G is m × n, P an m × r basis of its columns, Q an
r × n basis of its rows; the low-rank gradient is PᵀG (left), GQᵀ (right) or PᵀGQᵀ (full).
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from galore_pretrain.optim.methods import PROJ_TYPES
from galore_pretrain.tensors.chunks import chunk_elements
from galore_pretrain.tensors.products import has_fast_bf16, product, product_of_transposed
from galore_pretrain.tensors.values import can_look

Side = Literal["left", "right"]
BasisFn = Callable[[Tensor, int, Side, Tensor], Tensor]
"""(grad m × n, rank, side, previous) -> orthonormal basis in fp32: m × r of grad's columns (left) or r × n of its rows
(right); ``previous`` is the basis in use, of the same shape."""


def sides(m: int, n: int, proj_type: str) -> tuple[bool, bool]:
    """Whether an m × n gradient is projected from the (left, right). ``std`` keeps the shorter basis."""
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type {proj_type!r} is unknown; choose from {', '.join(PROJ_TYPES)}")
    if proj_type == "full":
        return True, True
    right = {"right": True, "left": False, "std": m >= n, "reverse_std": m < n}[proj_type]
    return not right, right


def project(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """PᵀG, GQᵀ or PᵀGQᵀ for P m × r and Q r × n, in the dtype of the bases: the published code's own products."""
    low = grad
    if left is not None:
        low = left.T @ low.to(left.dtype)
    if right is not None:
        low = low.to(right.dtype) @ right.T
    return low


def project_fast(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return PᵀG, GQᵀ or PᵀGQᵀ by `product`, contiguous, in the dtype of the gradient."""
    low = grad
    if right is not None:
        low = product(low, right.T)
    if left is not None:
        turned = product_of_transposed(low, left)
        low = (turned if turned.dtype == low.dtype else turned.to(low.dtype)).T
    return low.contiguous()


def svd_basis(grad: Tensor, rank: int, side: Side, previous: Tensor) -> Tensor:
    """The ``rank`` leading singular vectors (the paper's choice), each with its largest entry positive.

    A singular vector is determined up to its sign, which rounding alone can flip; with moments carried over a
    refresh, a flipped sign is a reversed coordinate.
    """
    basis = unsigned_svd_basis(grad, rank, side, previous)
    along = 0 if side == "left" else 1
    return basis * basis.gather(along, basis.abs().argmax(along, keepdim=True)).sign()


def unsigned_svd_basis(grad: Tensor, rank: int, side: Side, previous: Tensor) -> Tensor:
    """The leading singular vectors with the signs that LAPACK gave them, as the published code takes them."""
    del previous
    u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
    return torch.as_tensor(u[:, :rank] if side == "left" else vh[:rank])


def randomized_basis(grad: Tensor, rank: int, side: Side, previous: Tensor) -> Tensor:
    """One step of orthogonal iteration from the basis in use, which was random to begin with.

    The randomized range finder with a power step of Halko et al. (arXiv 0909.4061, Algorithm 4.4) in two products with
    the gradient and one thin QR, where a full SVD takes some twenty to forty times as long. Each vector grows out of
    its predecessor, so its sign and its meaning to the moments carried over are kept.
    """
    across, back = (product_of_transposed, product) if side == "left" else (product, product_of_transposed)
    if not has_fast_bf16(grad.device) and grad.numel() <= 8 * chunk_elements(grad.device):
        grad = grad.float()  # what is one block to both products is converted once
    image = across(grad, previous if side == "left" else previous.T).float()
    image /= torch.linalg.vector_norm(image).clamp(min=torch.finfo(torch.float32).tiny)  # no underflow in GᵀG
    basis = _orthonormal(back(grad, image))
    return basis if side == "left" else basis.T


def random_basis(shape: tuple[int, int], side: Side, seed: int, device: torch.device) -> Tensor:
    """An orthonormal basis (m × r left, r × n right) that depends on ``seed`` alone: where every matrix starts."""
    if side == "right":
        return random_basis((shape[1], shape[0]), "left", seed, device).T
    return _orthonormal(torch.randn(shape, generator=_generator(seed, device), device=device))


def _orthonormal(matrix: Tensor) -> Tensor:
    """The Q of a QR decomposition with positive diagonal R, which makes it unique. fp32.

    On a CPU by Cholesky-QR, which is all matrix products, where its orthogonality can be vouched for: it is lost by the
    square of the condition number, and gradients have steep spectra. So columns get one length, and where a Gram matrix
    in fp32 does not do, one in fp64 is tried, and then Householder's QR. That alone elsewhere, where looking at the
    error would wait for the device.
    """
    y = matrix.float()
    for dtype in (torch.float32, torch.float64) if can_look(y) else ():
        if (q := _cholesky_qr(y, dtype)) is not None:
            return q
    q, r = torch.linalg.qr(y)
    return torch.as_tensor(q * r.diagonal().sign().where(r.diagonal() != 0, 1.0))


def _cholesky_qr(y: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Cholesky-QR, and again if the first pass left more than rounding (Yamamoto et al. 2015); None if it failed."""
    gram = y.T.to(dtype) @ y.to(dtype)
    lengths = gram.diagonal().sqrt()  # of the columns: what is decomposed is the Gram matrix of columns of length one
    factor, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None], upper=True)
    q = torch.as_tensor(torch.linalg.solve_triangular((factor * lengths).float(), y, upper=True, left=False))
    gram = q.T @ q
    gram.diagonal().sub_(1.0)
    error = float(torch.linalg.vector_norm(gram, ord=torch.inf))
    if int(failed) or not error < 0.1:
        return None
    if error < 1e-5:
        return q
    gram.diagonal().add_(1.0)
    factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
    return torch.as_tensor(torch.linalg.solve_triangular(factor, q, upper=True, left=False))


def _generator(seed: int, device: torch.device) -> torch.Generator | None:
    return None if device.type == "meta" else torch.Generator(device).manual_seed(seed)


BASES: dict[str, BasisFn] = {
    "svd": svd_basis,
    "randomized": randomized_basis,
    "svd_unsigned": unsigned_svd_basis,
}
