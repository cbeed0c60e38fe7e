"""Adam and AdamW as an update rule."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from galore_pretrain.optim.moments import Dense, MomentStore, State
from galore_pretrain.optim.rule import BasisChange, Decay, Direction, Scope, UpdateRule
from galore_pretrain.optim.update import Step
from galore_pretrain.tensors import fused
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
        betas_are_valid = all(0 <= beta < 1 for beta in self.betas)
        if not betas_are_valid or not self.eps >= 0:
            raise ValueError(f"betas {self.betas} must be in [0, 1), and eps {self.eps} not negative")

    @property
    def scope(self) -> Scope:
        """Elements do not see each other."""
        return Scope.ELEMENTS

    def stores(self) -> Mapping[str, MomentStore]:
        """Return the store of both moments."""
        return {"exp_avg": self.store, "exp_avg_sq": self.store}

    def init(self, like: Tensor, shard: Shard | None = None) -> State:
        """Return the two moments m (``exp_avg``) and v (``exp_avg_sq``), zeros shaped as ``like``."""
        first = self.store.zeros("exp_avg", like, shard)
        second = self.store.zeros("exp_avg_sq", like, shard)
        return first | second

    # Algorithm 1 of the paper, element by element for a gradient g of any shape, at update t:
    #     m ← β₁ m + (1 − β₁) g         v ← β₂ v + (1 − β₂) g²
    #     m̂ = m / (1 − β₁ᵗ)             v̂ = v / (1 − β₂ᵗ)             direction = m̂ / (√v̂ + ε)
    # It is computed in the first of four ways that applies: by bitsandbytes' kernel for 8-bit moments; by torch's
    # kernel on the moments as they are stored; by torch's kernel on the moments in fp32, as the store reads them; in
    # single operations. A kernel passes over memory once where single operations do so eight times, and memory is what
    # an update waits for.
    def update(self, grad: Tensor, state: State, step: Step) -> Direction:
        """Advance both moments by ``grad`` and return the direction, shaped as ``grad``."""
        if step.kernels and self._has_kernel:
            return Direction(_direction_by_kernel(self, grad, state, step))
        if not self.store.is_dense and not self.scaled:
            fused = self.store.fused_adam(grad, state, step, self.betas, self.eps)
            if fused is not None:
                return Direction(fused, factor=-1.0)
        # Results that may prove invalid must not be written before the store has seen the flag.
        in_place = step.valid is None and self.kernel_suffices(step, grad.dtype)
        if in_place and state["exp_avg"].dtype == grad.dtype:
            m = state["exp_avg"]
            v = state["exp_avg_sq"]
            return self._fused(m, v, grad, step)
        m = self.store.read(state, "exp_avg", step)
        v = self.store.read(state, "exp_avg_sq", step)
        grad = grad.to(m.dtype)
        has_kernel = self.formula == "torch" and self.store.is_dense
        if has_kernel and m.dtype == torch.float32:
            direction = self._fused(m, v, grad, step)
        else:
            direction = self._composed(m, v, grad, step)
        self.store.write(state, "exp_avg", m, step)
        self.store.write(state, "exp_avg_sq", v, step)
        return direction

    # The kernel knows one dtype for all its tensors and rounds to nearest, so fp32 tensors are handed to it as they
    # are. A bf16 chunk of n elements is copied into the rows of one 4 × n fp32 tensor (weight, m, v, gradient). The
    # results, its first three rows, are then rounded stochastically in one go.
    def update_weight(
        self,
        weight: Tensor,
        grad: Tensor,
        state: State,
        step: Step,
        decay: float,
    ) -> bool:
        """Make the whole update of a weight that is not projected, decay included, in one pass over memory.

        Return False, and do nothing, where the kernel behind ``torch.optim.AdamW(fused=True)`` computes something else
        than this rule. All tensors are flat. In bf16 it works on fp32 copies, whose results are rounded together.
        """
        if step.kernels and self._has_kernel:
            _update_by_kernel(self, weight, grad, state, step, decay)
            return True
        if not self._is_plain:
            return False
        m = state["exp_avg"]
        v = state["exp_avg_sq"]
        if self.kernel_suffices(step, weight.dtype):
            self._kernel(weight, grad, m, v, step.count, step.valid, step.lr, decay)
            return True
        if weight.dtype != torch.bfloat16:
            return False
        elements = weight.numel()
        copies = torch.empty(4, elements, dtype=torch.float32, device=weight.device)
        weight32, m32, v32, grad32 = copies
        weight32.copy_(weight)
        m32.copy_(m)
        v32.copy_(v)
        grad32.copy_(grad)
        self._kernel(weight32, grad32, m32, v32, step.count, step.valid, step.lr, decay)
        step.store_together((weight, m, v), copies[:3])
        return True

    def needs_chunks(self, step: Step, dtype: torch.dtype) -> bool:
        """Return whether a large tensor is updated by chunks; kernels make no temporaries to keep small."""
        return not ((step.kernels and self._has_kernel) or self.kernel_suffices(step, dtype))

    def kernel_suffices(self, step: Step, dtype: torch.dtype) -> bool:
        """Return whether torch's kernel, given whole tensors of that dtype, does what this rule does.

        It computes in fp32, and rounds what it writes to nearest.
        """
        if not self._is_plain:
            return False
        if dtype == torch.bfloat16:
            return step.bits is None
        return dtype == torch.float32

    @cached_property
    def _has_kernel(self) -> bool:
        """Return whether there are kernels of our own that do what this rule does, rounding included."""
        return not self.scaled and self.decay != "after" and self.store.computes_in_fp32

    @cached_property
    def _is_plain(self) -> bool:
        """Return whether the rule is what torch's kernel knows, but for how results are rounded."""
        if self.scaled or self.decay == "after":
            return False
        return self.formula == "torch" and self.store == Dense()

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
        """Update ``weight``, ``m`` and ``v`` in place by torch's kernel, unless ``valid`` says not to.

        It is called directly: the way there through ``torch.optim`` takes longer than a chunk.
        """
        counts = torch.full((), float(count), device=weight.device)
        # `found_inf` is GradScaler's flag. The kernel looks at it on the device and then writes nothing.
        found_inf = None
        if valid is not None:
            found_inf = (~valid).float()
        kernel = torch._fused_adamw_
        if self.decay == "l2":
            kernel = torch._fused_adam_
        kernel(
            [weight],
            [grad],
            [m],
            [v],
            [],
            [counts],
            lr=lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            eps=self.eps,
            weight_decay=decay,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )

    # The kernel computes w ← w − lr · direction. For w = 0 and lr = 1 that leaves the direction, with its sign turned.
    def _fused(self, m: Tensor, v: Tensor, grad: Tensor, step: Step) -> Direction:
        """Advance ``m`` and ``v`` in place and return the direction, all by torch's kernel."""
        scratch = torch.zeros_like(grad)
        # The flag is not passed on: in an update that may prove invalid m and v are copies, and the store decides.
        self._kernel(
            scratch,
            grad,
            m,
            v,
            count=step.count,
            valid=None,
            lr=1.0,
            decay=0.0,
        )
        return Direction(scratch, factor=-1.0)

    # Both formulas divide m by a denominator, and leave what remains of the bias corrections to a factor. With c₁ and
    # c₂ of `corrections`, m̂ / (√v̂ + ε) is (1 / c₁) · m / (√v / c₂ + ε). The formula of transformers adds ε before v
    # is corrected: (c₂ / c₁) · m / (√v + ε). Its ε is thus larger at first, by 1 / c₂ ≈ 32 at update 1 for β₂ = 0.999.
    def _composed(self, m: Tensor, v: Tensor, grad: Tensor, step: Step) -> Direction:
        """Advance ``m`` and ``v`` in place and return the direction, in single operations and in their dtype."""
        beta1, beta2 = self.betas
        m.mul_(beta1)
        m.add_(grad, alpha=1 - beta1)
        v.mul_(beta2)
        v.addcmul_(grad, grad, value=1 - beta2)
        correction1, correction2 = self.corrections(step.count)
        denominator = v.sqrt()
        if self.formula == "transformers":
            denominator.add_(self.eps)
            factor = correction2 / correction1
        else:
            denominator.div_(correction2)
            denominator.add_(self.eps)
            factor = 1 / correction1
        if not self.scaled:
            return Direction(m / denominator, factor=factor)
        scratch = torch.zeros_like(m)
        rate = step.lr * factor
        scratch.addcdiv_(m, denominator, value=rate)
        return Direction(scratch, scaled=True)

    # LDAdam (arXiv 2410.16103, §3.2). A change of basis is linear, x → A x (A is r × r), so a mean follows it as it
    # is. A second moment does not: it is a variance plus the square of a mean. With coordinates taken as uncorrelated,
    # variances are mapped by the squares of A's entries:
    #     v̂ → A² (v̂ − m̂²)₊ + (A m̂)²
    # Both moments are corrected for bias first, since only then do they estimate the same distribution.
    def change_basis(self, state: State, change: BasisChange, step: Step) -> None:
        """Transform mean and variance each in its way, as in LDAdam (arXiv 2410.16103, §3.2)."""
        if not change.project:
            return
        correction1, correction2 = self.corrections(step.count - 1)
        mean = self.store.read(state, "exp_avg", step).float()
        mean = mean / correction1
        square = self.store.read(state, "exp_avg_sq", step).float()
        square = square / correction2**2
        variance = square - mean.square()
        variance.clamp_(min=0)
        variance = change.variance(variance)
        mean = change.mean(mean)
        new_square = variance.add_(mean.square())
        new_square.mul_(correction2**2)
        self.store.write(state, "exp_avg_sq", new_square, step)
        mean.mul_(correction1)
        self.store.write(state, "exp_avg", mean, step)

    def corrections(self, count: int) -> tuple[float, float]:
        """Return 1 − β₁ᵗ and √(1 − β₂ᵗ) for t = ``count`` updates."""
        beta1, beta2 = self.betas
        correction1 = 1 - beta1**count
        correction2 = (1 - beta2**count) ** 0.5
        return correction1, float(correction2)


def _update_by_kernel(rule: Adam, weight: Tensor, grad: Tensor, state: State, step: Step, decay: float) -> None:
    """Update a flat weight and both moments in one pass over memory."""
    numbers = replace(_numbers(rule, step.count), lr=step.lr, decay=decay, l2=rule.decay == "l2")
    m = rule.store.for_kernel(state, "exp_avg")
    v = rule.store.for_kernel(state, "exp_avg_sq")
    fused.adam_(weight, grad, m, v, numbers, step.noise("weight"), step.valid)


def _direction_by_kernel(rule: Adam, grad: Tensor, state: State, step: Step) -> Tensor:
    """Advance both moments in one pass over memory and return the direction, in the dtype of ``grad``."""
    m = rule.store.for_kernel(state, "exp_avg")
    v = rule.store.for_kernel(state, "exp_avg_sq")
    numbers = _numbers(rule, step.count)
    return fused.adam_direction(grad.contiguous(), m, v, numbers, step.noise("exp_avg"), step.valid)


def _numbers(rule: Adam, count: int) -> fused.AdamNumbers:
    """Return the numbers of update ``count`` as kernels take them; see `_composed` for the two formulas."""
    correction1, correction2 = rule.corrections(count)
    beta1, beta2 = rule.betas
    if rule.formula == "transformers":
        return fused.AdamNumbers(beta1, beta2, factor=correction2 / correction1, root=1.0, eps=rule.eps)
    return fused.AdamNumbers(beta1, beta2, factor=1 / correction1, root=1 / correction2, eps=rule.eps)
