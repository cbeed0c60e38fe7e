"""Linear layers whose weight is 8-bit integers with scales, trained in place."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from galore_pretrain.optim import is_projected
from galore_pretrain.tensors.coded import Coded, CodedParameter
from galore_pretrain.tensors.products import product


# The weight W (out × in) is read into the dtype of the activations for each product, and dropped after it: once forward,
# once backward. Its gradient gᵀ x is that of a matrix of this dtype, and goes to the parameter that stands for W. Codes
# are no saved tensors: an update changes them as soon as their gradient is there, and nobody reads them after that.
class _Product(torch.autograd.Function):
    """Computes y = x Wᵀ for a W of codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, coded: Coded) -> Tensor:
        """Return y (… × out) for ``x`` (… × in); ``weight`` stands for the matrix ``coded``, and gets its gradient."""
        del weight
        ctx.save_for_backward(x)
        ctx.coded = coded
        return x @ coded.read(x.dtype).T

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients by ``x`` and by the weight."""
        (x,) = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.coded.read(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = product(grad.flatten(0, -2).T, x.flatten(0, -2))
        return grad_x, grad_weight, None


class CodedLinear(nn.Linear):
    """Computes y = W x + bias with W as codes; ``weight`` stands for W, and has its shape, dtype and gradient."""

    weight: CodedParameter

    def __init__(self, dense: nn.Linear, group: int | None) -> None:
        nn.Module.__init__(self)  # and not torch's Linear, which would allocate a matrix
        self.in_features = dense.in_features
        self.out_features = dense.out_features
        coded = Coded.empty(dense.out_features, dense.in_features, group, dense.weight.device)
        self.weight = CodedParameter.of(coded, dense.weight.dtype)
        self.bias = dense.bias

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or allocate codes and scales, and have another parameter stand for them."""
        coded = self.weight.coded
        dtype = self.weight.dtype
        del self.weight
        super()._apply(fn, recurse)
        moved = Coded(fn(coded.codes), fn(coded.scales), coded.group)
        self.weight = CodedParameter.of(moved, dtype)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return y (… × out) for ``x`` (… × in)."""
        y: Tensor = _Product.apply(x, self.weight, self.weight.coded)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y = y + self.bias
        return y


def code_matrices(model: nn.Module, group: int | None) -> None:
    """Put a `CodedLinear` in the place of each linear layer of attention and MLP of ``model``, which is on ``meta``."""
    matrices = [(name, module) for name, module in model.named_modules() if is_projected(name, module)]
    for name, module in matrices:
        parent_name, _, leaf = name.rpartition(".")
        assert isinstance(module, nn.Linear)
        setattr(model.get_submodule(parent_name), leaf, CodedLinear(module, group))


def read_dense(weight: Tensor) -> Tensor:
    """Return a weight as a matrix of its dtype: itself, or what its codes stand for."""
    if isinstance(weight, CodedParameter):
        return weight.coded.read(weight.dtype)
    return weight.detach()
