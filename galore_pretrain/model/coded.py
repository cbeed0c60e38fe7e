"""Linear layers whose weight is 8-bit integers with scales, trained in place."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from galore_pretrain.model.int8 import Codes, multiplied, padded, quantized, sum_over_tokens
from galore_pretrain.optim import is_projected
from galore_pretrain.tensors.coded import Coded, CodedParameter
from galore_pretrain.tensors.place import is_cpu
from galore_pretrain.tensors.products import product


# The weight W (out × in) is read into the dtype of the activations for each product, and dropped after it: once
# forward, once backward. Its gradient gᵀ x is that of a matrix of this dtype, and goes to the parameter that stands for
# W. Codes are no saved tensors: an update changes them as soon as their gradient is there, and nobody reads them after
# that.
class _Product(torch.autograd.Function):
    """Computes y = x Wᵀ + bias for a W of codes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, coded: Coded, bias: Tensor | None) -> Tensor:
        """Return y (… × out) for ``x`` (… × in); ``weight`` stands for the matrix ``coded``, and gets its gradient."""
        del weight
        ctx.save_for_backward(x)
        ctx.coded = coded
        return F.linear(x, coded.read(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        """Return the gradients by ``x``, the weight and the bias."""
        (x,) = ctx.saved_tensors
        grad = grad_outputs[0]
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.coded.read(grad.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = product(grad.flatten(0, -2).T, x.flatten(0, -2))
        if ctx.needs_input_grad[3]:
            grad_bias = grad.flatten(0, -2).sum(0)
        return grad_x, grad_weight, None, grad_bias


# An element of W is s_o c_oi: its code, and the scale of its row o, an output. Forward sums over the inputs, so that
# the scale is a factor of the sum, y_to = s_o · Σ_i x_ti c_oi. Backward sums over the outputs, dx_ti = Σ_o g_to s_o
# c_oi, where it is a factor of g, which is rounded after it. So the codes themselves are multiplied, and no matrix of
# W's values exists.
class _Int8Product(torch.autograd.Function):
    """Computes y = x Wᵀ for a W of codes with a scale a row, and its gradients, by products of 8-bit integers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, coded: Coded) -> Tensor:
        """Return y (tokens × out) for ``x`` (tokens × in); ``weight`` stands for ``coded``, and gets its gradient."""
        del weight
        ctx.save_for_backward(x)
        ctx.coded = coded
        weight_codes = Codes(padded(coded.codes), coded.scales[:, 0].float())
        return multiplied(quantized(x, over=1), weight_codes, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Return the gradients by ``x`` and the weight."""
        (x,) = ctx.saved_tensors
        grad, coded = grad_outputs[0], ctx.coded
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            transposed = padded(coded.codes).T
            if not is_cpu(x.device):  # which wants the numbers of a sum side by side in memory
                transposed = transposed.contiguous()
            weight_codes = Codes(transposed, x.new_ones(x.shape[1], dtype=torch.float32))
            scaled = quantized(grad, over=1, by=coded.scales[:, 0].float())
            grad_x = multiplied(scaled, weight_codes, x.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = sum_over_tokens(grad, x, x.dtype)
        return grad_x, grad_weight, None


class CodedLinear(nn.Linear):
    """Computes y = W x + bias with W as codes; ``weight`` stands for W, and has its shape, dtype and gradient.

    With ``by_int8``, training multiplies by the codes themselves, of which a row then has one scale.
    """

    weight: CodedParameter

    def __init__(self, dense: nn.Linear, group: int | None, by_int8: bool = False) -> None:
        nn.Module.__init__(self)  # and not torch's Linear, which would allocate a matrix
        self.in_features = dense.in_features
        self.out_features = dense.out_features
        coded = Coded.empty(dense.out_features, dense.in_features, group, dense.weight.device)
        self.weight = CodedParameter.of(coded, dense.weight.dtype)
        self.bias = dense.bias
        self.by_int8 = by_int8

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """Move or allocate codes and scales, and have another parameter stand for them."""
        coded = self.weight.coded
        dtype = self.weight.dtype
        del self.weight
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = Coded(fn(coded.codes), fn(coded.scales), coded.group)
        self.weight = CodedParameter.of(moved, dtype)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save what the codes stand for on ``meta``: shapes and dtypes, which `export` reads shard by shard."""
        destination[f"{prefix}weight"] = torch.empty(self.weight.shape, dtype=self.weight.dtype, device="meta")
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return y (… × out) for ``x`` (… × in)."""
        coded = self.weight.coded
        y: Tensor
        if not (self.by_int8 and self.training):
            y = _Product.apply(x, self.weight, coded, self.bias)  # type: ignore[no-untyped-call]
            return y
        product_of_codes = _Int8Product.apply(x.flatten(0, -2), self.weight, coded)  # type: ignore[no-untyped-call]
        y = product_of_codes.unflatten(0, x.shape[:-1])
        if self.bias is not None:
            y = y + self.bias
        return y


def code_matrices(model: nn.Module, group: int | None, by_int8: bool = False) -> None:
    """Put a `CodedLinear` in the place of each linear layer of attention and MLP of ``model``, which is on ``meta``.

    ``group`` neighbours in a row share a scale; None: all of a row do, which ``by_int8`` asks for.
    """
    matrices = [(name, module) for name, module in model.named_modules() if is_projected(name, module)]
    for name, module in matrices:
        parent_name, _, leaf = name.rpartition(".")
        assert isinstance(module, nn.Linear)
        setattr(model.get_submodule(parent_name), leaf, CodedLinear(module, group, by_int8))
