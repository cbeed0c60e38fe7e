"""A LLaMA's configuration: read from JSON, and checked."""

import difflib
import json
import math
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig
from transformers.activations import ACT2FN

from galore_pretrain.config.options import find_model
from galore_pretrain.errors import InputError

_POSITIVE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_INTEGER = (int,)
_NUMBER = (float, int)
_TRUTH = (bool,)
_TEXT = (str,)
_TOKEN = (int, type(None))
_KINDS: dict[str, tuple[type, ...]] = {
    "hidden_size": _INTEGER,
    "intermediate_size": _INTEGER,
    "num_hidden_layers": _INTEGER,
    "num_attention_heads": _INTEGER,
    "vocab_size": _INTEGER,
    "num_key_value_heads": _INTEGER,
    "head_dim": _INTEGER,
    "max_position_embeddings": _INTEGER,
    "max_sequence_length": _INTEGER,
    "bos_token_id": _TOKEN,
    "eos_token_id": _TOKEN,
    "pad_token_id": _TOKEN,
    "rms_norm_eps": _NUMBER,
    "initializer_range": _NUMBER,
    "rope_theta": _NUMBER,
    "tie_word_embeddings": _TRUTH,
    "attention_bias": _TRUTH,
    "mlp_bias": _TRUTH,
    "use_cache": _TRUTH,
    "hidden_act": _TEXT,
    "model_type": _TEXT,
    "transformers_version": _TEXT,
    "torch_dtype": _TEXT,
    "dtype": _TEXT,
    "architectures": (list,),
    "rope_parameters": (dict, type(None)),
}
"""The keys that a config may have, and the types of their values."""
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "pretraining_tp": (1, None),
    "rope_scaling": (None,),
}
"""What other programs write into a config, and the values with which it means nothing here."""
_NOT_PASSED_ON = (
    "pad_token_id",
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
)
"""Keys that are known and checked, and on which the model that is built does not depend."""
_FINITE = (
    "max_position_embeddings",
    "max_sequence_length",
    "rms_norm_eps",
    "initializer_range",
    "rope_theta",
)


def load_model_config(name_or_path: str) -> LlamaConfig:
    """Return a shipped config by name (``llama_60m``), or that of a JSON file, published LLaMA configs included.

    Raises ``InputError`` with file, key and remedy for what makes no sense. The tokens named as padding by
    a config are dropped: ``nn.Embedding`` would zero and freeze that row, a real token's where the id is −1.
    """
    values, source = _read(name_or_path)
    for key, value in values.items():
        _check_kind(key, value, source)
        is_whole_number = float in _KINDS[key] and isinstance(value, int)
        if is_whole_number and abs(value) < 2**63:  # transformers wants 1.0, and not 1
            values[key] = float(value)
    for key in _POSITIVE:
        if values.get(key, 0) < 1:
            raise InputError(f"{source}: {key} is {values.get(key, 'missing')}; it must be an integer of at least 1")
    _check_shape(values, source)
    _check_values(values, source)

    config = {key: value for key, value in values.items() if key not in _NOT_PASSED_ON}
    positions = config.pop("max_sequence_length", None)  # the published configs' name for it
    if positions:
        config.setdefault("max_position_embeddings", positions)
    try:
        return LlamaConfig(**config, use_cache=False, architectures=["LlamaForCausalLM"])
    except (TypeError, ValueError, StrictDataclassError) as error:  # what transformers itself refuses
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: {reason}") from error


def _read(name_or_path: str) -> tuple[dict[str, Any], str]:
    """Return the keys and values of a config that mean something here, and its name in messages."""
    file = find_model(name_or_path)
    try:
        values = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); a model config is one JSON object") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds a JSON {type(values).__name__}; a model config is one JSON object")
    values.pop("_name_or_path", None)  # where transformers has read it from
    for key, harmless in _HARMLESS.items():
        if key in values and values[key] in harmless:
            del values[key]
    return values, name_or_path


def _check_kind(key: str, value: Any, source: str) -> None:
    """Raise InputError where a key is unknown, or its value of another type than it must be."""
    if key not in _KINDS:
        near = difflib.get_close_matches(key, _KINDS, n=1)
        hint = f"known keys: {', '.join(sorted(_KINDS))}"
        if near:
            hint = f"did you mean {near[0]!r}?"
        raise InputError(f"{source}: unknown key {key!r}; {hint}")
    kinds = _KINDS[key]
    is_stray_bool = isinstance(value, bool) and bool not in kinds  # Python's bool is an int
    if is_stray_bool or not isinstance(value, kinds):
        names = {type(None): "null"}
        expected = " or ".join(names.get(kind, kind.__name__) for kind in kinds)
        raise InputError(f"{source}: {key} is {value!r}; it must be {expected}")


def _check_shape(values: dict[str, Any], source: str) -> None:
    """Raise InputError where the hidden size cannot be divided into heads, or heads into groups."""
    hidden = values["hidden_size"]
    heads = values["num_attention_heads"]
    if "head_dim" not in values and hidden % heads:
        choices = []
        for divisor in range(1, 129):
            width, remainder = divmod(hidden, divisor)
            if remainder == 0 and width % 2 == 0:  # rotary embeddings turn pairs of numbers
                choices.append(str(divisor))
        raise InputError(
            f"{source}: num_attention_heads {heads} does not divide hidden_size {hidden}; "
            f"choose from {', '.join(choices)}"
        )
    head_dim = values.get("head_dim", hidden // heads)
    if head_dim < 2 or head_dim % 2:
        raise InputError(
            f"{source}: heads are {head_dim} wide; rotary embeddings need an even width: change num_attention_heads"
        )
    groups = values.get("num_key_value_heads", heads)
    if groups < 1 or heads % groups:
        raise InputError(
            f"{source}: num_key_value_heads {groups} does not divide num_attention_heads {heads}; choose a divisor"
        )


def _check_values(values: dict[str, Any], source: str) -> None:
    """Raise InputError where the model is no LLaMA, or a number is not positive and finite."""
    model_type = values.get("model_type", "llama")
    if model_type != "llama":
        raise InputError(f"{source}: model_type is {model_type!r}; only 'llama' is built here")
    activation = values.get("hidden_act", "silu")
    if activation not in ACT2FN:
        raise InputError(f"{source}: hidden_act {activation!r} is unknown; LLaMA's is 'silu'")
    for key in _FINITE:
        if not 0 < values.get(key, 1) < math.inf:
            raise InputError(f"{source}: {key} is {values[key]}; it must be finite and greater than 0")
