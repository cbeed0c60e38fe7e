"""Subspaces of a gradient: which side is projected, the ways to find a basis, and projecting itself.

Notation of the GaLore paper (arXiv 2403.03507, §3 and Algorithm 2): G is m × n, P an m × r basis of its columns, Q an
r × n basis of its rows; the low-rank gradient is PᵀG (left), GQᵀ (right) or PᵀGQᵀ (full).
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from galore_pretrain.optim.methods import PROJ_TYPES
from galore_pretrain.tensors.chunks import chunk_elements
from galore_pretrain.tensors.place import is_gpu
from galore_pretrain.tensors.products import has_fast_bf16, product, product_of_transposed
from galore_pretrain.tensors.rounding import derive_seed
from galore_pretrain.tensors.values import can_look, gradient_norm

Side = Literal["left", "right"]
BasisFn = Callable[[Tensor, int, Side, Tensor], Tensor]
"""(grad m × n, rank, side, previous) -> orthonormal basis in fp32: m × r of grad's columns (left) or r × n of its rows
(right); ``previous`` is the basis in use, of the same shape."""

_POWER_STEPS = 10
_ROUNDING = 1e-6
"""The length of a tangent, over the square of the gradient's, below which fp32 does not tell it from rounding."""


class BasisByRefresh(ABC):
    """Finds a basis in a way that depends on which refresh it is; a plain `BasisFn` takes all of them alike."""

    @abstractmethod
    def at(self, number: int, seed: int) -> BasisFn:
        """Return how the basis of refresh ``number`` is found, 1 being a matrix's first; ``seed`` is the matrix's."""


Basis = BasisFn | BasisByRefresh


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


def clipped_rank(method: str, rank: int, m: int, n: int) -> int:
    """Return the rank of ``method``'s projection of an m × n matrix, with a warning where another one was asked for."""
    if rank > min(m, n):
        # One text for all matrices, so that it is shown once.
        warnings.warn(
            f"{method} rank {rank} exceeds the shorter side of some matrices, and is clipped to it there",
            stacklevel=3,
        )
    return min(rank, m, n)


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
    if left is not None and is_gpu(grad.device):  # which takes a transposed factor as it is
        low = left.T.to(low.dtype) @ low
    elif left is not None:
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


# One step down the Grassmannian, the space of subspaces, by the rank-1 geodesic of SubTrack++ (arXiv 2502.01586, §3).
# Let S (m × r) be the basis in use and G (m × n) the gradient. What G has outside of the subspace is
#     E = G − S A        with A = SᵀG, the least squares solution
# and ‖E‖² falls fastest along −F, for its gradient F = −2 E Aᵀ (m × r), which is tangent to the subspace: SᵀE = 0. Of
# −F ≈ u σ vᵀ only the leading part is kept. The basis then turns by the angle ησ in the plane of S v and u:
#     S ← (S v cos(ησ) + u sin(ησ)) vᵀ + S (I − v vᵀ)
# E is never made, as E Aᵀ = G Aᵀ − S A Aᵀ. Nor is −F decomposed: v is found by power iteration with (−F)ᵀ(−F), r × r,
# from its longest column. Where singular values are alike, v may be a mix of their vectors: that is a step down too.
#
# A is over ‖G‖ at first, so that nothing underflows. A basis that was rounded to bf16 is orthonormal to 2⁻⁹ only; one
# step of Newton's, S (3 I − SᵀS) / 2, makes it so to 2⁻¹⁸. That also keeps roundings from adding up over refreshes.
@dataclass(frozen=True)
class Tracked(BasisByRefresh):
    """Turns the basis in use a little towards the gradient (SubTrack++, arXiv 2502.01586); the first one is by SVD.

    A refresh turns one direction of the basis by ``step_size`` (η) · σ, in radians. σ is in squared units of the
    gradient as it comes, before clipping, and at most ‖G‖²: with the published η of 10 and ‖G‖ = 0.01, a refresh turns
    the basis by a thousandth at most. Gradients that are c times as large want η / c². Up to ‖G‖² = 1/(2η) a turn never
    passes what is best; beyond, it may end in a worse basis. An η of 0 keeps the first basis. One in bf16 keeps no turn
    that is below its rounding.

    Where the first refresh fails or meets a gradient of zeros, the random basis that a matrix starts with is turned.
    """

    step_size: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.step_size < math.inf:
            raise ValueError(f"step_size {self.step_size} must be finite and not negative")

    def at(self, number: int, seed: int) -> BasisFn:
        """Return `svd_basis` for the first refresh, and a turn of the basis in use for all others."""
        if number == 1:
            return svd_basis
        return self._turned

    def _turned(
        self,
        grad: Tensor,
        rank: int,
        side: Side,
        previous: Tensor,
    ) -> Tensor:
        """Return the basis in use, turned by one step: m × r (left) or r × n (right), in fp32."""
        if side == "right":
            return self._turned(grad.T, rank, "left", previous.T).T
        tiny = torch.finfo(torch.float32).tiny
        length = gradient_norm(grad).clamp(min=tiny)
        g = grad.float()
        s = previous.float()
        s = 1.5 * s - 0.5 * s @ (s.T @ s)
        a = s.T @ g / length
        tangent = 2.0 * (g @ a.T / length - s @ (a @ a.T))
        v = _leading_right_vector(tangent)
        u = tangent @ v
        u -= s @ (s.T @ u)  # rounding leaves a little of the subspace in it
        sigma = torch.linalg.vector_norm(u)
        u /= sigma.clamp(min=tiny)
        angle = self.step_size * sigma * length * length
        angle = torch.where(sigma > _ROUNDING, angle, 0.0)
        turn = s @ v * (angle.cos() - 1) + u * angle.sin()
        turned = torch.addr(s, turn, v)
        return torch.where(angle > 0, turned, previous.float())


# Nothing here looks at a value, which would wait for a device: not even where the longest column is.
def _leading_right_vector(matrix: Tensor) -> Tensor:
    """Return about the right singular vector (r) of the largest singular value of a matrix (m × r); 0 of zeros."""
    tiny = torch.finfo(torch.float32).tiny
    gram = matrix.T @ matrix
    longest = gram.diagonal().argmax()
    v = gram.index_select(1, longest.view(1))
    for _ in range(_POWER_STEPS):
        v = gram @ v
        v = v / torch.linalg.vector_norm(v).clamp(min=tiny)
    return v.view(-1)


@dataclass(frozen=True)
class Random(BasisByRefresh):
    """Draws each basis anew, whatever the gradient: all subspaces are as likely (GoLore, arXiv 2410.11289)."""

    def at(self, number: int, seed: int) -> BasisFn:
        """Return the draw of one refresh, the same in every process."""

        def draw(grad: Tensor, rank: int, side: Side, previous: Tensor) -> Tensor:
            rows, columns = previous.shape
            return random_basis((rows, columns), side, derive_seed(seed, number, side), grad.device)

        return draw


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


BASES: dict[str, Basis] = {
    "svd": svd_basis,
    "randomized": randomized_basis,
    "tracked": Tracked(),
    "random": Random(),
    "svd_unsigned": unsigned_svd_basis,
}


def basis_at(basis: str | Basis, number: int, seed: int) -> BasisFn:
    """Return how a matrix's basis of refresh ``number`` (1 is the first) is found; ``seed`` is the matrix's."""
    if isinstance(basis, str):
        basis = BASES[basis]
    if isinstance(basis, BasisByRefresh):
        return basis.at(number, seed)
    return basis


def is_turned(basis: str | Basis) -> bool:
    """Return whether a basis is a turn of the one before."""
    if isinstance(basis, str):
        basis = BASES[basis]
    return isinstance(basis, Tracked)


def is_drawn(basis: str | Basis) -> bool:
    """Return whether a basis is drawn, whatever the gradient."""
    if isinstance(basis, str):
        basis = BASES[basis]
    return isinstance(basis, Random)
