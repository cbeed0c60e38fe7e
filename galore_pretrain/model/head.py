"""The head and its loss, a chunk of tokens at a time, so that the logits of a batch never exist together."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from galore_pretrain.model.documents import document_mask
from galore_pretrain.model.families import CausalLM
from galore_pretrain.tensors.capability import runs_on
from galore_pretrain.tensors.chunks import chunk_elements, chunks
from galore_pretrain.tensors.entropy import cross_entropy_
from galore_pretrain.tensors.place import is_cpu
from galore_pretrain.tensors.products import product

_HEAD_CHUNK = 512  # tokens whose logits exist at a time
_BLOCKS = 16
"""Blocks that the logit gradients of a batch are made in, where memory does not want fewer tokens at a time."""


def mean_loss(model: CausalLM, input_ids: Tensor, labels: Tensor, divisor: int, places: Tensor | None = None) -> Tensor:
    """Return Σ cross-entropy / ``divisor``, in nats: what a micro-batch of a training step contributes.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]``: already shifted; −100 is not counted. ``places``
    has each token's place in its document where no token is to attend to another document. Without it, all attend to
    all that went before in the row. Padding stands at the end and needs no mask. The result is an fp32 scalar.
    """
    return _called(model, _mean_loss, input_ids, labels, divisor, places)


def _mean_loss(model: CausalLM, input_ids: Tensor, labels: Tensor, divisor: int, places: Tensor | None) -> Tensor:
    """Do the work of `mean_loss`."""
    hidden = _hidden(model, input_ids, places)
    weight = model.lm_head.weight
    scale = 1.0 / divisor
    loss: Tensor = _HeadLoss.apply(hidden, weight, labels.flatten(), scale)  # type: ignore[no-untyped-call]
    return loss


def token_losses(model: CausalLM, input_ids: Tensor, labels: Tensor, places: Tensor | None = None) -> Tensor:
    """Return the cross-entropy of each label, shaped as ``labels``, in fp32; 0 where a label is −100. No gradients.

    ``places`` are as in `mean_loss`.
    """
    return _called(model, _token_losses, input_ids, labels, places)


@torch.no_grad()
def _token_losses(model: CausalLM, input_ids: Tensor, labels: Tensor, places: Tensor | None) -> Tensor:
    """Do the work of `token_losses`."""
    hidden = _hidden(model, input_ids, places)
    targets = labels.flatten()
    losses: Tensor = hidden.new_empty(len(hidden), dtype=torch.float32)
    for start, stop in chunks(hidden, len(hidden), _HEAD_CHUNK):
        # No name for the logits in the model's dtype, so that they are freed once their fp32 copy is made.
        logits = (hidden[start:stop] @ model.lm_head.weight.T).float()
        losses[start:stop] = F.cross_entropy(logits, targets[start:stop], reduction="none")
        del logits  # before those of the next chunk are made
    return losses.view(labels.shape)


def _hidden(model: CausalLM, input_ids: Tensor, places: Tensor | None) -> Tensor:
    """Return what the head multiplies: the hidden states of all tokens, tokens × width."""
    if places is None:
        outputs = model.model(input_ids=input_ids, use_cache=False)
    else:
        mask = document_mask(places, model.lm_head.weight.dtype)
        outputs = model.model(input_ids=input_ids, attention_mask=mask, position_ids=places, use_cache=False)
    hidden: Tensor = outputs.last_hidden_state
    return hidden.flatten(0, 1)


loss_methods = (_mean_loss, _token_losses)
"""What is computed with a model's weights. Where processes share them out, these are methods of it, before which FSDP2
gathers the weights, and after which it frees them."""


def _called(model: CausalLM, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call ``function`` with ``model``: where processes share its weights, by the method of that name."""
    method = getattr(model, function.__name__, None)
    if method is None:
        return function(model, *arguments)
    result: Tensor = method(*arguments)
    return result


def _gradient_block(tokens: int, weight: Tensor) -> int:
    """Return how many tokens' logit gradients are kept for one product with the hidden states.

    In bf16 that product is rounded once at its end; summed over blocks it needs an fp32 copy of the weight. In fp32 it
    is added where it belongs.
    """
    # A block costs a GPU some ten launches, and passes over a copy of the weight. Of a batch of 16 blocks or more, a
    # sixteenth takes some 2 % of what the activations of the whole do.
    sixteenth = -(-tokens // _BLOCKS)
    if weight.dtype == torch.float32:
        return max(_HEAD_CHUNK, sixteenth)
    # With a vocabulary of V and a width of d, all T tokens at once take 2TV bytes. Blocks of d tokens take 2dV, and
    # besides an fp32 sum of 4dV and a bf16 product of 2dV to be added to it: as much as 4d tokens at once.
    width = weight.shape[1]
    if tokens <= 4 * width:
        return tokens
    return max(width, sixteenth)


# Where kernels run, one makes the gradient of all logits at once. Else there are two levels of chunks. The logits of
# _HEAD_CHUNK tokens are one product, which wants many rows. Softmax and its gradient go over them several times, so on
# a CPU they are done for as few rows as its cache holds.
#
# With p = softmax(logits), the cross-entropy of label y is -log p[y] and its gradient by the logits is p - onehot(y).
# Both come from log p: it is looked up at y, and then overwritten by exp(log p), from which 1 is taken at y. A label
# of −100 is looked up at 0 instead and multiplied by ``is_counted``, which is 0 there.
def _logits_gradient(hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return Σ cross-entropy and ``scale`` times its gradient by the logits.

    ``hidden`` is tokens × width, ``weight`` vocabulary × width, ``labels`` are tokens. The sum is an fp32 scalar. The
    gradient, tokens × vocabulary in the weight's dtype, takes the place of the logits.
    """
    tokens, vocabulary = len(hidden), len(weight)
    if runs_on(hidden.device) and hidden.dtype in (torch.float32, torch.bfloat16):
        gradient = hidden @ weight.T
        return cross_entropy_(gradient, labels, scale).sum(), gradient
    total = hidden.new_zeros((), dtype=torch.float32)
    logits_or_gradient = hidden.new_empty(tokens, vocabulary)
    cache_rows = _HEAD_CHUNK
    if is_cpu(hidden.device):
        cache_rows = max(1, chunk_elements(hidden.device) // vocabulary)
    for start, stop in chunks(hidden, tokens, _HEAD_CHUNK):
        chunk = logits_or_gradient[start:stop]
        chunk_labels = labels[start:stop]
        torch.mm(hidden[start:stop], weight.T, out=chunk)
        losses = []
        for first, last in chunks(chunk, len(chunk), cache_rows):
            logits = chunk[first:last]
            targets = chunk_labels[first:last]
            is_counted = targets >= 0
            index = targets.clamp(min=0)[:, None]
            log_p = F.log_softmax(logits.float(), dim=-1)
            losses.append(log_p.gather(1, index)[:, 0] * is_counted)
            gradient = log_p.exp_()
            gradient.scatter_add_(1, index, log_p.new_full(index.shape, -1.0))
            gradient.mul_((is_counted * scale)[:, None])
            logits.copy_(gradient)
            del log_p, gradient  # two names of one fp32 block: the next one must not exist beside it
        total -= torch.cat(losses).sum()
    return total, logits_or_gradient


# The loss of T tokens over a vocabulary of V, from hidden states H (T × d) and the head's weight W (V × d).
#
# Autograd would keep the logits H Wᵀ (T × V), several times over in fp32, from forward to backward. But the loss is a
# scalar, and its gradient dL by the logits is known as soon as they are. So forward does backward's work as well: for
# each block of tokens it computes dL and, from it, dH = dL W (T × d) and dW = dLᵀ H (V × d), and drops dL. Backward
# only multiplies both by the gradient that comes in. Nothing is computed twice.
#
# dW is a sum over all tokens. In fp32, each block is added to it. In bf16, adding would round at every block, so either
# there is one block, whose product is rounded once, or the sum is kept in fp32: whichever `_gradient_block` finds to
# take less memory.
class _HeadLoss(torch.autograd.Function):
    """Computes the output projection and its loss in chunks of tokens, and both gradients on the way forward.

    Logits are rounded to the model's dtype and then taken to fp32, as transformers' own loss does.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, scale: float) -> Tensor:
        """Return ``scale`` · Σ cross-entropy, an fp32 scalar, and keep its gradients."""
        total = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden)
        grad_weight: Tensor | None = None
        tokens = len(hidden)
        size = _gradient_block(tokens, weight)
        for begin, end in chunks(hidden, tokens, size):
            block = hidden[begin:end]
            losses, grad_logits = _logits_gradient(block, weight, labels[begin:end], scale)
            total += losses
            torch.mm(grad_logits, weight, out=grad_hidden[begin:end])
            if size >= tokens:
                grad_weight = product(grad_logits.T, block)
            elif weight.dtype == torch.float32:
                if grad_weight is None:
                    grad_weight = torch.zeros_like(weight)
                grad_weight.addmm_(grad_logits.T, block)
            else:
                part = product(grad_logits.T, block)
                grad_weight = part.float() if grad_weight is None else grad_weight.add_(part)
            del grad_logits  # before the next block's is made
        assert grad_weight is not None
        ctx.gradients = grad_hidden, grad_weight.to(weight.dtype)
        return total * scale

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients by ``hidden`` and ``weight``, which forward has computed."""
        grad_loss = grad_outputs[0]
        grad_hidden, grad_weight = ctx.gradients
        ctx.gradients = None  # the loss may be kept longer than these
        return grad_hidden.mul_(grad_loss), grad_weight.mul_(grad_loss), None, None
