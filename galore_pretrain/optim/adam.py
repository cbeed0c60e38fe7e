"""Adam and AdamW as an update rule."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import BasisChange, Decay, Direction, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors.shards import Shard


@dataclass(frozen=True)
class Adam(UpdateRule):
    """Adam (arXiv 1412.6980, Algorithm 1): direction m̂ / (√v̂ + ε), both moments bias-corrected.

    ``formula="torch"`` adds ε to the corrected √v̂; ``"transformers"`` to the uncorrected √v, as the published GaLore
    code and transformers' former AdamW do. ``decay`` tells AdamW (``before``) from Adam (``l2``). ``scaled`` multiplies
    by the learning rate before anything is rounded, as bitsandbytes does on the published code's low-rank scratch.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    formula: Literal["torch", "transformers"] = "torch"
    decay: Decay = "before"
    scaled: bool = False
    store: MomentStore = field(default_factory=Dense)

    def __post_init__(self) -> None:
        if not all(0 <= beta < 1 for beta in self.betas) or not self.eps >= 0:
            raise ValueError(f"betas {self.betas} must be in [0, 1), and eps {self.eps} not negative")

    @property
    def scope(self) -> Scope:
        return Scope.ELEMENTS

    def stores(self) -> Mapping[str, MomentStore]:
        return {"exp_avg": self.store, "exp_avg_sq": self.store}

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        return self.store.zeros("exp_avg", like, shard) | self.store.zeros("exp_avg_sq", like, shard)

    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        if not (self.store.is_dense or self.scaled):
            fused = self.store.fused_adam(grad, state, step, self.betas, self.eps)
            if fused is not None:
                return Direction(fused, factor=-1.0)
        if step.valid is None and self.kernel_suffices(step, grad.dtype) and state["exp_avg"].dtype == grad.dtype:
            return self._fused(state["exp_avg"], state["exp_avg_sq"], grad, step)  # in place
        m, v = self.store.read(state, "exp_avg", step), self.store.read(state, "exp_avg_sq", step)
        grad = grad.to(m.dtype)
        if self.formula == "torch" and self.store.is_dense and m.dtype == torch.float32:
            direction = self._fused(m, v, grad, step)
        else:
            direction = self._composed(m, v, grad, step)
        self.store.write(state, "exp_avg", m, step)
        self.store.write(state, "exp_avg_sq", v, step)
        return direction

    def update_weight(self, weight: Tensor, grad: Tensor, state: State, step: Step, decay: float) -> bool:
        """The whole update of a weight that is not projected, decay included, in one pass over memory; False where the
        kernel behind ``torch.optim.AdamW(fused=True)`` computes something else than this rule.

        In bf16 it works on fp32 copies, whose results are rounded together.
        """
        if not self._is_plain:
            return False
        m, v = state["exp_avg"], state["exp_avg_sq"]
        if self.kernel_suffices(step, weight.dtype):
            self._kernel(weight, grad, m, v, step.count, step.valid, step.lr, decay)
            return True
        if weight.dtype != torch.bfloat16:
            return False
        kept = (weight, m, v)
        copies = torch.empty(4, weight.numel(), dtype=torch.float32, device=weight.device)
        for copy, tensor in zip(copies, (*kept, grad), strict=True):
            copy.copy_(tensor)
        self._kernel(copies[0], copies[3], copies[1], copies[2], step.count, step.valid, step.lr, decay)
        step.store_together(kept, copies[:3])
        return True

    def needs_chunks(self, step: Step, dtype: torch.dtype) -> bool:
        return not self.kernel_suffices(step, dtype)

    def kernel_suffices(self, step: Step, dtype: torch.dtype) -> bool:
        """Whether torch's kernel, given whole tensors of that dtype, does what this rule does: it computes in fp32, and
        rounds what it writes to nearest."""
        return self._is_plain and (dtype == torch.float32 or (dtype == torch.bfloat16 and step.bits is None))

    @cached_property
    def _is_plain(self) -> bool:
        """Whether it is what torch's kernel knows, but for how results are rounded."""
        return self.formula == "torch" and self.store == Dense() and not self.scaled and self.decay != "after"

    def _kernel(
        self,
        weight: Tensor,
        grad: Tensor,
        m: Tensor,
        v: Tensor,
        count: int,
        valid: Tensor | None,
        lr: float,
        decay: float,
    ) -> None:
        """Call torch's kernel directly: the way there through ``torch.optim`` takes longer than a chunk."""
        counts = torch.full((), float(count), device=weight.device)
        skipped = None if valid is None else (~valid).float()
        kernel = torch._fused_adam_ if self.decay == "l2" else torch._fused_adamw_
        kernel(
            [weight], [grad], [m], [v], [], [counts], lr=lr, beta1=self.betas[0], beta2=self.betas[1], eps=self.eps,
            weight_decay=decay, amsgrad=False, maximize=False, found_inf=skipped,
        )  # fmt: skip

    def _fused(self, m: Tensor, v: Tensor, grad: Tensor, step: Step) -> Direction:
        """Return the direction by the same kernel: it updates a weight of 0 at rate 1."""
        scratch = torch.zeros_like(grad)
        self._kernel(
            scratch, grad, m, v, step.count, None, 1.0, 0.0
        )  # m and v are copies where they are stored if valid
        return Direction(scratch, factor=-1.0)

    def _composed(self, m: Tensor, v: Tensor, grad: Tensor, step: Step) -> Direction:
        beta1, beta2 = self.betas
        m.mul_(beta1).add_(grad, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = self._corrections(step.count)
        if self.formula == "transformers":
            denominator, factor = v.sqrt().add_(self.eps), correction2 / correction1
        else:
            denominator, factor = v.sqrt().div_(correction2).add_(self.eps), 1 / correction1
        if self.scaled:
            return Direction(torch.zeros_like(m).addcdiv_(m, denominator, value=step.lr * factor), scaled=True)
        return Direction(m / denominator, factor=factor)

    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Mean and variance are transformed each in its way, as in LDAdam (arXiv 2410.16103, §3.2)."""
        if not change.project:
            return
        correction1, correction2 = self._corrections(step.count - 1)
        mean = self.store.read(state, "exp_avg", step).float() / correction1
        square = self.store.read(state, "exp_avg_sq", step).float() / correction2**2
        spread = change.variance((square - mean.square()).clamp_(min=0))
        mean = change.mean(mean)
        self.store.write(state, "exp_avg_sq", spread.add_(mean.square()).mul_(correction2**2), step)
        self.store.write(state, "exp_avg", mean.mul_(correction1), step)

    def _corrections(self, count: int) -> tuple[float, float]:
        return 1 - self.betas[0] ** count, float((1 - self.betas[1] ** count) ** 0.5)
