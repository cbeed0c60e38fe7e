"""transformers' ``LlamaForCausalLM``, or one of its kind, from its config: built on ``meta``, materialized once."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from galore_pretrain.model.families import Architecture, CausalLM, family_of
from galore_pretrain.tensors.coded import codes_of
from galore_pretrain.tensors.rounding import derive_seed
from galore_pretrain.tensors.shards import fill, local, shard_of

_INIT_BLOCK = 1 << 22  # elements drawn at a time: 16 MiB of fp32, whatever the size of a matrix


def build_model(
    config: Architecture,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    change: Callable[[CausalLM], None] | None = None,
    fresh: bool = True,
) -> CausalLM:
    """Return the model with fresh weights: matrices from N(0, ``initializer_range``), norms 1, biases 0.

    If not ``fresh``, the weights are whatever their memory held, for others to be loaded.

    Weights are allocated once, on ``device`` and in ``dtype``. Each is drawn on the CPU from its own stream, named by
    ``seed`` and the parameter's name, so the same seed gives the same weights on every device and however they are
    sharded. ``change`` may put other modules in, before there is memory for any.
    """
    with torch.device("meta"):
        model = family_of(config).model_class(config).to(dtype)
        model = without_masks(model)
        if change is not None:
            change(model)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    model.tie_weights()  # where the config says so: new storage has parted them
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its table is computed, and stays in fp32
    if fresh:
        for name, parameter in model.named_parameters():
            draw(name, parameter, config.initializer_range, seed)
    return model


def without_masks(model: CausalLM) -> CausalLM:
    """Make ``model`` attend causally without a mask, and return it. Padding stands at the end and needs none.

    With the implementation named ``sdpa``, transformers looks at the positions of each batch for documents packed
    together, for which it would wait for the device, and makes a mask of fake tensors.
    """
    AttentionInterface.register("causal_sdpa", sdpa_attention_forward)
    model.set_attn_implementation("causal_sdpa")
    return model


# The stream of a parameter depends on its name and the seed alone. It is drawn in fp32 on the CPU, a block at a time,
# and copied into the parameter's dtype and device: no device has a generator that gives another one's numbers, and no
# fp32 copy of a large matrix exists.
@torch.no_grad()
def draw(name: str, parameter: Tensor, std: float, seed: int) -> None:
    """Fill a parameter with fresh weights: a matrix with normal ones of mean 0 and deviation ``std``."""
    coded = codes_of(parameter)
    if coded is not None:
        dense = torch.empty(parameter.shape, dtype=parameter.dtype)
        draw(name, dense, std, seed)
        coded.write(dense.to(parameter.device))
        return
    if shard_of(parameter) is not None:
        whole = torch.empty(parameter.shape, dtype=parameter.dtype)
        draw(name, whole, std, seed)
        fill(parameter, whole)
        return
    parameter = local(parameter)
    if parameter.ndim < 2:
        is_bias = name.endswith("bias")
        parameter.fill_(0.0 if is_bias else 1.0)
        return
    generator = torch.Generator().manual_seed(derive_seed(seed, name))
    flat = parameter.view(-1)
    for start in range(0, flat.numel(), _INIT_BLOCK):
        block = flat[start : start + _INIT_BLOCK]
        block.copy_(torch.empty(block.shape).normal_(0.0, std, generator=generator))
