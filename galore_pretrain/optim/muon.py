"""Muon (Keller Jordan, 2024), in the form of arXiv 2502.16982: a momentum with all singular values made alike."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import Direction, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.shards import Shard

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of the authors' quintic
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7
_RMS = 0.2  # about that of Adam's updates, so that Adam's learning rates serve


@dataclass(frozen=True)
class Muon(UpdateRule):
    """Replaces the singular values of the momentum by ones, nearly: U = 0.2 · √max(m, n) · NewtonSchulz(N).

    With the gradient G (m × n) and ``momentum`` μ: B ← μ B + (1 − μ) G and N = (1 − μ) G + μ B, Nesterov's way. That
    is how ``torch.optim.Muon`` averages, whose updates (``adjust_lr_fn="match_rms_adamw"``) these are. Others have
    B ← μ B + G; since N is divided by its norm, both are one. U has an RMS of about 0.2, as Adam's updates have.

    The rule needs the whole matrix, in bf16 and once more for the result. Its 15 matrix products are made once an
    update, so it does not pay for updates of few tokens.
    """

    momentum: float = 0.95
    store: MomentStore = field(default_factory=Dense)

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum {self.momentum} must be in [0, 1)")

    @property
    def scope(self) -> Scope:
        """Singular values are those of the whole matrix."""
        return Scope.WHOLE

    def stores(self) -> Mapping[str, MomentStore]:
        """Return the store of the momentum, where there is one."""
        if not self.momentum:
            return {}
        return {"momentum": self.store}

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return ``momentum``, zeros of the shape of ``like`` (m × n), or nothing where it is 0.

        ValueError for a tensor that is no matrix.
        """
        if like.ndim != 2:
            raise ValueError(
                f"Muon changes singular values, and a tensor of shape {tuple(like.shape)} has none: put it into a "
                "group of Adam's, as the authors do"
            )
        if not self.momentum:
            return {}
        return self.store.zeros("momentum", like, shard)

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance the momentum by ``grad`` (m × n) and return the direction, m × n in bf16."""
        m, n = grad.shape
        factor = _RMS * math.sqrt(max(m, n))
        # No name for the average, which would keep it during the iterations.
        orthogonal = _with_equal_singular_values(self._averaged(grad, state, step))
        return Direction(orthogonal, factor=factor)

    # N is rounded to bf16, so it is written there a chunk at a time: no fp32 matrix exists. It is of the exact B, which
    # the store may round when it keeps it.
    def _averaged(self, grad: Tensor, state: State, step: Step) -> Tensor:
        """Advance the momentum by ``grad`` and return Nesterov's average N, a new m × n tensor in bf16."""
        nesterov = torch.empty_like(grad, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
        if not self.momentum:
            return nesterov.copy_(grad)
        flat_nesterov = nesterov.view(-1)
        flat_grad = grad.reshape(-1)
        for start, stop in chunks(flat_grad, flat_grad.numel(), chunk_elements(grad.device)):
            part = self.store.narrow(state, "momentum", start, stop)
            part_step = step.at(start)
            average = self.store.read(part, "momentum", part_step)
            chunk = flat_grad[start:stop].to(average.dtype)
            average.lerp_(chunk, 1 - self.momentum)
            flat_nesterov[start:stop] = chunk.lerp(average, self.momentum)
            self.store.write(part, "momentum", average, part_step)
        return nesterov


# The polynomial p(x) = a x + b x³ + c x⁵, applied to a matrix X (k × l) of singular values in [0, 1], is
#     X ← a X + (b A + c A²) X,        A = X Xᵀ (k × k)
# It leaves the singular vectors alone, and takes each singular value to p of it. Five times p takes all but the
# smallest into [0.68, 1.13]. It does not go to 1, but is as steep at 0 as it can be: small values rise soon. In bf16
# this is as good as in fp32. A is the smaller product where X has no more rows than columns, so a tall X is transposed.
def _with_equal_singular_values(x: Tensor) -> Tensor:
    """Return the bf16 matrix ``x`` (m × n) with singular values near 1; one of zeros as it is. ``x`` is overwritten."""
    m, n = x.shape
    is_tall = m > n
    if is_tall:
        x = x.T
    norm = x.norm()
    x.div_(norm.clamp(min=_SMALLEST_NORM))
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=_B, alpha=_C)
        x = torch.addmm(x, polynomial, x, beta=_A)
    if is_tall:
        x = x.T
    return x
