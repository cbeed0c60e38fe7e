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
    """Return whether an m × n gradient is projected from the (left, right). ``std`` keeps the shorter basis.

    ValueError for an unknown ``proj_type``.
    """
    if proj_type not in PROJ_TYPES:
        raise ValueError(f"proj_type {proj_type!r} is unknown; choose from {', '.join(PROJ_TYPES)}")
    if proj_type == "full":
        return True, True
    from_the_right = {
        "right": True,
        "left": False,
        "std": m >= n,
        "reverse_std": m < n,
    }
    right = from_the_right[proj_type]
    return not right, right


def project(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return PᵀG, GQᵀ or PᵀGQᵀ in the dtype of the bases P (m × r) and Q (r × n): the published code's products."""
    low = grad
    if left is not None:
        low = left.T @ low.to(left.dtype)
    if right is not None:
        low = low.to(right.dtype) @ right.T
    return low


# `product` and its like read a large matrix by blocks of rows, and want it first: PᵀG is computed as (GᵀP)ᵀ. Where both
# sides are projected GQᵀ is the first product, since it needs no transposing.
def project_fast(grad: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return PᵀG, GQᵀ or PᵀGQᵀ by `product`, contiguous, in the dtype of the gradient."""
    low = grad
    if right is not None:
        low = product(low, right.T)
    if left is not None:
        transposed = product_of_transposed(low, left)
        if transposed.dtype != low.dtype:
            transposed = transposed.to(low.dtype)
        low = transposed.T
    return low.contiguous()


# A singular vector is determined up to its sign, which rounding alone can flip. With moments carried over a refresh, a
# flipped sign is a reversed coordinate. So each vector is multiplied by the sign of its entry of largest magnitude.
def svd_basis(
    grad: Tensor,
    rank: int,
    side: Side,
    previous: Tensor,
) -> Tensor:
    """Return the ``rank`` leading singular vectors (the paper's choice), each with its largest entry positive.

    The result is m × r (left) or r × n (right) for an m × n gradient, in fp32.
    """
    basis = unsigned_svd_basis(grad, rank, side, previous)
    along = 0 if side == "left" else 1
    largest = basis.abs().argmax(along, keepdim=True)
    signs = basis.gather(along, largest).sign()
    return basis * signs


def unsigned_svd_basis(
    grad: Tensor,
    rank: int,
    side: Side,
    previous: Tensor,
) -> Tensor:
    """Return the leading singular vectors with the signs that LAPACK gave them, as the published code takes them."""
    del previous
    u, _, vh = torch.linalg.svd(grad.float(), full_matrices=False)
    if side == "left":
        return torch.as_tensor(u[:, :rank])
    return torch.as_tensor(vh[:rank])


# The randomized range finder with a power step of Halko et al. (arXiv 0909.4061, Algorithm 4.4). For the left basis P
# (m × r) of G (m × n), with the basis in use as the test matrix:
#     Z = GᵀP  (n × r)        Y = G Z = GGᵀP  (m × r)        P' = the Q of Y = QR
# A right basis Q (r × n) is the left one of Gᵀ: Z = GQᵀ, Y = GᵀZ, transposed. These are two products with the gradient
# and one thin QR, where a full SVD takes some twenty to forty times as long. Each vector grows out of its predecessor,
# so its sign and its meaning to the moments carried over are kept.
def randomized_basis(
    grad: Tensor,
    rank: int,
    side: Side,
    previous: Tensor,
) -> Tensor:
    """Return one step of orthogonal iteration from the basis in use, which was random to begin with.

    The result is m × r (left) or r × n (right) for an m × n gradient, in fp32.
    """
    if side == "left":
        across, back = product_of_transposed, product
        test_matrix = previous
    else:
        across, back = product, product_of_transposed
        test_matrix = previous.T
    block = 8 * chunk_elements(grad.device)
    is_one_block = grad.numel() <= block
    if is_one_block and not has_fast_bf16(grad.device):
        grad = grad.float()  # both products would convert it
    image = across(grad, test_matrix).float()
    # The length of Z has no meaning, but Y has squares of gradients, which could underflow. A gradient of zeros has
    # length 0, and is not to become NaN.
    tiny = torch.finfo(torch.float32).tiny
    length = torch.linalg.vector_norm(image)
    image /= length.clamp(min=tiny)
    basis = _orthonormal(back(grad, image))
    if side == "left":
        return basis
    return basis.T


def random_basis(
    shape: tuple[int, int],
    side: Side,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Return an orthonormal basis that depends on ``seed`` alone: where every matrix starts.

    ``shape`` is m × r (left) or r × n (right). The result is fp32.
    """
    if side == "right":
        r, n = shape
        transposed = random_basis((n, r), "left", seed, device)
        return transposed.T
    generator = _generator(seed, device)
    matrix = torch.randn(shape, generator=generator, device=device)
    return _orthonormal(matrix)


# On a CPU it is found by Cholesky-QR, which is all matrix products, where its orthogonality can be vouched for. That is
# lost by the square of the condition number, and gradients have steep spectra. So columns get one length, and where a
# Gram matrix in fp32 does not do, one in fp64 is tried, and then Householder's QR. On other devices Householder's QR
# alone is used, since looking at the error would wait for the device.
def _orthonormal(matrix: Tensor) -> Tensor:
    """Return the Q (m × r, fp32) of a QR decomposition with positive diagonal R, which makes it unique."""
    y = matrix.float()
    if can_look(y):
        for dtype in (torch.float32, torch.float64):
            basis = _cholesky_qr(y, dtype)
            if basis is not None:
                return basis
    q, r = torch.linalg.qr(y)
    diagonal = r.diagonal()
    signs = diagonal.sign()
    # The column of a 0 on the diagonal may have either sign, but must not be multiplied by 0.
    signs = signs.where(diagonal != 0, 1.0)
    return torch.as_tensor(q * signs)


# With Y (m × r) = QR, YᵀY = RᵀR: the Cholesky factor of the Gram matrix (r × r) is R, and Q = Y R⁻¹. It is the Gram
# matrix of the columns at length one, D⁻¹YᵀY D⁻¹ for D their lengths, that is decomposed: its condition number is
# smaller, and R = (its factor) D. If that leaves more than rounding, a second pass over Q makes it orthonormal
# (CholeskyQR2, Yamamoto et al. 2015), which it does where all entries of QᵀQ − I are well below 1.
def _cholesky_qr(y: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the Q (m × r, fp32) of ``y`` with the Gram matrix in ``dtype``; None if it is not orthonormal enough."""
    gram = y.T.to(dtype) @ y.to(dtype)
    lengths = gram.diagonal().sqrt()
    scaled = gram / lengths / lengths[:, None]
    factor, failed = torch.linalg.cholesky_ex(scaled, upper=True)
    r = (factor * lengths).float()
    q = torch.linalg.solve_triangular(r, y, upper=True, left=False)

    gram = q.T @ q
    gram.diagonal().sub_(1.0)
    error = float(torch.linalg.vector_norm(gram, ord=torch.inf))  # the largest entry
    if int(failed) or not error < 0.1:  # so that NaN fails
        return None
    if error < 1e-5:
        return torch.as_tensor(q)
    gram.diagonal().add_(1.0)
    factor, failed = torch.linalg.cholesky_ex(gram, upper=True)
    q = torch.linalg.solve_triangular(factor, q, upper=True, left=False)
    return torch.as_tensor(q)


def _generator(seed: int, device: torch.device) -> torch.Generator | None:
    """Return a generator on the device; None on the meta device, which has none."""
    if device.type == "meta":
        return None
    generator = torch.Generator(device)
    return generator.manual_seed(seed)


BASES: dict[str, BasisFn] = {
    "svd": svd_basis,
    "randomized": randomized_basis,
    "svd_unsigned": unsigned_svd_basis,
}
