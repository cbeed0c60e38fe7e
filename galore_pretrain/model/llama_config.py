"""A LLaMA's configuration: read from JSON, and checked."""

import difflib
import json
import math
from collections.abc import Container
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from galore_pretrain.config.options import find_model
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
_HARMLESS: dict[str, Container[Any]] = {  # what other programs write into a config, where it means nothing here
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "rope_scaling": (None,),
    "_name_or_path": type("Anything", (), {"__contains__": lambda self, value: True})(),
}


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
