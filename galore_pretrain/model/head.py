"""The head and its loss, a chunk of tokens at a time, so that the logits of a batch never exist together."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.products import product

_HEAD_CHUNK = 512  # tokens whose logits exist at a time


def mean_loss(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor, divisor: int) -> Tensor:
    """Σ cross-entropy / ``divisor``, in nats: what a micro-batch of a training step contributes. A scalar in fp32.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]``: already shifted; −100 is not counted. No padding
    mask is needed, since attention is causal and padding stands at the end.
    """
    return _called(model, _mean_loss, input_ids, labels, divisor)


def _mean_loss(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor, divisor: int) -> Tensor:
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    arguments = hidden.flatten(0, 1), model.lm_head.weight, labels.flatten(), 1.0 / divisor
    loss: Tensor = _HeadLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss


def token_losses(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each label, shaped as ``labels``, in fp32 and without gradients; 0 where a label is −100."""
    return _called(model, _token_losses, input_ids, labels)


@torch.no_grad()
def _token_losses(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
    losses = [
        F.cross_entropy((h @ model.lm_head.weight.T).float(), y, reduction="none")
        for h, y in _chunks(hidden, labels.flatten())
    ]
    return torch.cat(losses).view(labels.shape)


loss_methods = (_mean_loss, _token_losses)
"""What is computed with a model's weights. Where processes share them out, these are methods of it, before which FSDP2
gathers the weights, and after which it frees them."""


def _called(model: LlamaForCausalLM, method: Callable[..., Tensor], *arguments: Any) -> Tensor:
    own = getattr(model, method.__name__, None)
    return method(model, *arguments) if own is None else own(*arguments)


def _chunks(hidden: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(hidden.split(_HEAD_CHUNK), labels.split(_HEAD_CHUNK), strict=True)


def _gradient_block(tokens: int, weight: Tensor) -> int:
    """Tokens whose logits' gradients are kept for one product with the hidden states.

    In bf16 that product is rounded once at its end; summed over blocks it needs an fp32 copy of the weight. In fp32 it
    is added where it belongs.
    """
    width = weight.shape[1]
    if weight.dtype == torch.float32:
        return _HEAD_CHUNK
    return tokens if tokens <= 4 * width else width


def _logits_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(Σ cross-entropy, its gradient × ``scale`` by the logits in the weight's dtype: tokens × vocabulary).

    The gradient takes the place of the logits, some rows at a time: on a CPU, of what its cache holds.
    """
    total, whole = hidden.new_zeros((), dtype=torch.float32), hidden.new_empty(len(hidden), len(weight))
    rows = max(1, chunk_elements(hidden.device) // len(weight)) if hidden.device.type == "cpu" else _HEAD_CHUNK
    for start, stop in chunks(hidden, len(hidden), _HEAD_CHUNK):
        chunk, targets = whole[start:stop], labels[start:stop]
        torch.mm(hidden[start:stop], weight.T, out=chunk)
        losses = []
        for first, last in chunks(chunk, len(chunk), rows):
            logits, y = chunk[first:last], targets[first:last]
            counted, index = y >= 0, y.clamp(min=0)[:, None]
            log_p = F.log_softmax(logits.float(), dim=-1)
            losses.append(log_p.gather(1, index)[:, 0] * counted)
            grad = log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0))
            logits.copy_(grad.mul_((counted * scale)[:, None]))
            del log_p, grad
        total -= torch.cat(losses).sum()
    return total, whole


class _HeadLoss(torch.autograd.Function):
    """The output projection and its loss, in chunks of tokens whose gradients are computed on the way forward.

    The logits of a whole micro-batch would take tokens × vocabulary fp32 numbers, several times over; here one chunk's
    exist at a time, and none is computed twice. Logits are rounded to the model's dtype and then taken to fp32, as
    transformers' own loss does. The weight's gradient is one product where that takes no more memory than an fp32 sum.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden, grad_weight = torch.empty_like(hidden), None
        size = _gradient_block(len(hidden), weight)
        for begin in range(0, len(hidden), size):
            block, targets = hidden[begin : begin + size], labels[begin : begin + size]
            losses, grad = _logits_gradient(block, weight, targets, scale)
            total += losses
            torch.mm(grad, weight, out=grad_hidden[begin : begin + size])
            if size >= len(hidden):
                grad_weight = product(grad.T, block)
            elif weight.dtype == torch.float32:
                grad_weight = torch.zeros_like(weight) if grad_weight is None else grad_weight
                grad_weight.addmm_(grad.T, block)
            else:
                part = product(grad.T, block)
                grad_weight = part.float() if grad_weight is None else grad_weight.add_(part)
            del grad
        assert grad_weight is not None
        ctx.gradients = grad_hidden, grad_weight.to(weight.dtype)
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None  # the loss may be kept longer than these
        return grad_hidden.mul_(grad_outputs[0]), grad_weight.mul_(grad_outputs[0]), None, None
