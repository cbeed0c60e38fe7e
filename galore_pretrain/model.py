"""transformers' ``LlamaForCausalLM`` from a JSON config: built on ``meta``, materialized once, in the run's dtype."""

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Container, Iterator
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.activations import ACT2FN
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from galore_pretrain.config import find_model
from galore_pretrain.errors import InputError
from galore_pretrain.optim.projector import product
from galore_pretrain.optim.shards import fill, local, shard_of
from galore_pretrain.optim.step import chunk_elements, pieces

_POSITIVE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(_POSITIVE, (int,)),
    **dict.fromkeys(("num_key_value_heads", "head_dim", "max_position_embeddings", "max_sequence_length"), (int,)),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), (int, type(None))),
    **dict.fromkeys(("rms_norm_eps", "initializer_range", "rope_theta"), (float, int)),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_cache"), (bool,)),
    **dict.fromkeys(("hidden_act", "model_type", "transformers_version", "torch_dtype", "dtype"), (str,)),
    "architectures": (list,),
    "rope_parameters": (dict, type(None)),
}
_HARMLESS: dict[str, Container[Any]] = {  # what other programs write into a config, where it means nothing here
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "rope_scaling": (None,),
    "_name_or_path": type("Anything", (), {"__contains__": lambda self, value: True})(),
}
_HEAD_CHUNK = 512  # tokens whose logits exist at a time
_INIT_BLOCK = 1 << 22  # elements drawn at a time: 16 MiB of fp32, whatever the size of a matrix


def load_model_config(name_or_path: str) -> LlamaConfig:
    """A shipped config by name (``llama_60m``), or any LLaMA config as a JSON file, published ones included.

    Raises ``InputError`` with file, key and remedy for what makes no sense. The tokens named as padding by
    a config are dropped: ``nn.Embedding`` would zero and freeze that row, a real token's where the id is −1.
    """
    values, source = _read(name_or_path)
    values = {key: value for key, value in values.items() if key not in _HARMLESS or value not in _HARMLESS[key]}
    for key, value in values.items():
        if key not in _KINDS:
            near = difflib.get_close_matches(key, _KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(_KINDS))}"
            raise InputError(f"{source}: unknown key {key!r}; {hint}")
        kinds = _KINDS[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise InputError(f"{source}: {key} is {value!r}; it must be {expected}")
        if float in kinds and isinstance(value, int) and abs(value) < 2**63:  # transformers wants 1.0, and not 1
            values[key] = float(value)
    for key in _POSITIVE:
        if values.get(key, 0) < 1:
            raise InputError(f"{source}: {key} is {values.get(key, 'missing')}; it must be an integer of at least 1")
    _check_shape(values, source)

    positions = values.pop("max_sequence_length", None)  # the published configs' name for it
    config = {"max_position_embeddings": positions} if positions else {}
    ignored = (
        "pad_token_id",
        "architectures",
        "model_type",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "use_cache",
    )
    config |= {key: value for key, value in values.items() if key not in ignored}
    try:
        return LlamaConfig(**config, use_cache=False, architectures=["LlamaForCausalLM"])
    except (TypeError, ValueError, StrictDataclassError) as error:  # what transformers itself refuses
        raise InputError(f"{source}: {' '.join(str(error).split())}") from error


def _read(name_or_path: str) -> tuple[dict[str, Any], str]:
    file = find_model(name_or_path)
    try:
        values = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); a model config is one JSON object") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds a JSON {type(values).__name__}; a model config is one JSON object")
    return values, name_or_path


def _check_shape(values: dict[str, Any], source: str) -> None:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if "head_dim" not in values and hidden % heads:
        divisors = [str(d) for d in range(1, 129) if hidden % d == 0 and (hidden // d) % 2 == 0]
        raise InputError(
            f"{source}: num_attention_heads {heads} does not divide hidden_size {hidden}; "
            f"choose from {', '.join(divisors)}"
        )
    head_dim = values.get("head_dim", hidden // heads)
    if head_dim < 2 or head_dim % 2:
        raise InputError(
            f"{source}: heads are {head_dim} wide; rotary embeddings need an even width: change num_attention_heads"
        )
    if (groups := values.get("num_key_value_heads", heads)) < 1 or heads % groups:
        raise InputError(
            f"{source}: num_key_value_heads {groups} does not divide num_attention_heads {heads}; choose a divisor"
        )
    if values.get("model_type", "llama") != "llama":
        raise InputError(f"{source}: model_type is {values['model_type']!r}; only 'llama' is built here")
    if (activation := values.get("hidden_act", "silu")) not in ACT2FN:
        raise InputError(f"{source}: hidden_act {activation!r} is unknown; LLaMA's is 'silu'")
    for key in (
        "max_position_embeddings",
        "max_sequence_length",
        "rms_norm_eps",
        "initializer_range",
        "rope_theta",
    ):
        if not 0 < values.get(key, 1) < math.inf:
            raise InputError(f"{source}: {key} is {values[key]}; it must be finite and greater than 0")


def build_model(
    config: LlamaConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    change: Callable[[LlamaForCausalLM], None] | None = None,
    fresh: bool = True,
) -> LlamaForCausalLM:
    """The model with fresh weights: matrices from N(0, ``initializer_range``), norms 1, biases 0. If not ``fresh``,
    with whatever its memory held, for others to be loaded.

    Weights are allocated once, on ``device`` and in ``dtype``. Each is drawn on the CPU from its own stream, named by
    ``seed`` and the parameter's name, so the same seed gives the same weights on every device and however they are
    sharded. ``change`` may put other modules in, before there is memory for any.
    """
    with torch.device("meta"):
        model = without_masks(LlamaForCausalLM(config).to(dtype))
        if change is not None:
            change(model)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    model.tie_weights()  # where the config says so: new storage has parted them
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is computed, and stays in fp32
    for name, parameter in model.named_parameters() if fresh else ():
        draw(name, parameter, config.initializer_range, seed)
    return model


def without_masks(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """``model``, attending causally without a mask, which ours never needs: padding stands at the end.

    With the implementation named ``sdpa``, transformers looks at the positions of each batch for documents packed
    together, for which it would wait for the device, and makes a mask of fake tensors.
    """
    AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
    model.set_attn_implementation("causal_sdpa")
    return model


@torch.no_grad()
def draw(name: str, parameter: Tensor, std: float, seed: int) -> None:
    """Fill ``parameter`` with the fresh weights of that ``name``."""
    if shard_of(parameter) is not None:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        draw(name, whole, std, seed)
        fill(parameter, whole)
        return
    parameter = local(parameter)
    if parameter.ndim < 2:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    digest = hashlib.blake2b(f"{seed}.{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    flat = parameter.view(-1)
    for start in range(0, flat.numel(), _INIT_BLOCK):
        block = flat[start : start + _INIT_BLOCK]
        block.copy_(torch.empty(block.shape).normal_(0.0, std, generator=generator))


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
    for start, stop in pieces(len(hidden), _HEAD_CHUNK):
        chunk, targets = whole[start:stop], labels[start:stop]
        torch.mm(hidden[start:stop], weight.T, out=chunk)
        losses = []
        for first, last in pieces(len(chunk), rows):
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
