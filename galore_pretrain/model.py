"""transformers' ``LlamaForCausalLM`` from a JSON config: built on ``meta``, materialized once, in the run's dtype."""

import difflib
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from galore_pretrain.errors import InputError

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
_INIT_BLOCK = 1 << 22  # elements drawn at a time: 16 MiB of fp32, whatever the size of a matrix


def shipped_models() -> list[str]:
    """Names of the configs inside the package."""
    folder = resources.files("galore_pretrain") / "configs"
    return sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.startswith("llama_"))


def load_model_config(name_or_path: str) -> LlamaConfig:
    """A shipped config by name (``llama_60m``), or any LLaMA config as a JSON file, the benchmark's published ones included.

    Raises ``InputError`` with file, key and remedy for what makes no sense. The tokens named as padding by
    a config are dropped: ``nn.Embedding`` would zero and freeze that row, a real token's where the id is −1.
    """
    values, source = _read(name_or_path)
    for key, value in values.items():
        if key not in _KINDS:
            near = difflib.get_close_matches(key, _KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(_KINDS))}"
            raise InputError(f"{source}: unknown key {key!r}; {hint}")
        kinds = _KINDS[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise InputError(f"{source}: {key} is {value!r}; it must be {expected}")
    for key in _POSITIVE:
        if values.get(key, 0) < 1:
            raise InputError(f"{source}: {key} is {values.get(key, 'missing')}; it must be an integer of at least 1")
    _check_shape(values, source)

    positions = values.pop("max_sequence_length", None)  # the published configs' name for it
    config = {"max_position_embeddings": positions} if positions else {}
    ignored = ("pad_token_id", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache")
    config |= {key: value for key, value in values.items() if key not in ignored}
    try:
        return LlamaConfig(**config, use_cache=False, architectures=["LlamaForCausalLM"])
    except (TypeError, ValueError) as error:  # what transformers itself refuses
        raise InputError(f"{source}: {' '.join(str(error).split())}") from error


def _read(name_or_path: str) -> tuple[dict[str, Any], str]:
    if name_or_path in (names := shipped_models()):
        return json.loads((resources.files("galore_pretrain") / "configs" / f"{name_or_path}.json").read_text()), name_or_path
    path = Path(name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(name_or_path, names, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise InputError(f"--model {name_or_path}: no such model or file; {hint}shipped: {', '.join(names)}")
    try:
        values = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); a model config is one JSON object") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: holds a JSON {type(values).__name__}; a model config is one JSON object")
    return values, str(path)


def _check_shape(values: dict[str, Any], source: str) -> None:
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    if "head_dim" not in values and hidden % heads:
        divisors = [str(d) for d in range(1, 129) if hidden % d == 0 and (hidden // d) % 2 == 0]
        raise InputError(
            f"{source}: num_attention_heads {heads} does not divide hidden_size {hidden}; choose from {', '.join(divisors)}"
        )
    head_dim = values.get("head_dim", hidden // heads)
    if head_dim < 2 or head_dim % 2:
        raise InputError(f"{source}: heads are {head_dim} wide; rotary embeddings need an even width: change num_attention_heads")
    if heads % (groups := values.get("num_key_value_heads", heads) or 1) or groups < 1:
        raise InputError(f"{source}: num_key_value_heads {groups} does not divide num_attention_heads {heads}; choose a divisor")
    if values.get("model_type", "llama") != "llama":
        raise InputError(f"{source}: model_type is {values['model_type']!r}; only 'llama' is built here")
    for key in ("max_position_embeddings", "max_sequence_length", "rms_norm_eps", "initializer_range", "rope_theta"):
        if values.get(key, 1) <= 0:
            raise InputError(f"{source}: {key} is {values[key]}; it must be greater than 0")


def build_model(
    config: LlamaConfig, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> LlamaForCausalLM:
    """The model with fresh weights: matrices from N(0, ``initializer_range``), norms 1, biases 0.

    Weights are allocated once, on ``device`` and in ``dtype``. Each is drawn on the CPU from its own stream, named by ``seed``
    and the parameter's name, so the same seed gives the same weights on every device and however they are sharded.
    """
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    with torch.device(device):
        model.model.rotary_emb = LlamaRotaryEmbedding(config)  # its table is computed, and stays in fp32
    for name, parameter in model.named_parameters():
        _initialize(name, parameter, config.initializer_range, seed)
    return model


@torch.no_grad()
def _initialize(name: str, parameter: Tensor, std: float, seed: int) -> None:
    if parameter.ndim < 2:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return
    digest = hashlib.blake2b(f"{seed}.{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    flat = parameter.view(-1)
    for start in range(0, flat.numel(), _INIT_BLOCK):
        block = flat[start : start + _INIT_BLOCK]
        block.copy_(torch.empty(block.shape).normal_(0.0, std, generator=generator))


def token_losses(model: LlamaForCausalLM, input_ids: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each label, in nats: fp32, shaped as ``labels`` (batch × length), 0 where a label is −100.

    ``labels[b, t]`` is the token that follows ``input_ids[b, t]``: already shifted. No padding mask is needed,
    since attention is causal and padding stands at the end.
    """
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
