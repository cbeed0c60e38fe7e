"""A model's configuration, a LLaMA's or of its kind: read from JSON, and checked."""

import difflib
import json
import logging
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import GenerationConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from galore_pretrain.config.options import find_model
from galore_pretrain.errors import InputError
from galore_pretrain.model.families import FAMILIES, Architecture, Family, check_depth, head_width

log = logging.getLogger(__name__)

_POSITIVE = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_LARGEST = 2**63 - 1
_NULL = type(None)
_INTEGER = (int,)
_NUMBER = (float, int)
_TRUTH = (bool,)
_TEXT = (str,)
_KINDS: dict[str, tuple[type, ...]] = {
    "hidden_size": _INTEGER,
    "intermediate_size": _INTEGER,
    "num_hidden_layers": _INTEGER,
    "num_attention_heads": _INTEGER,
    "vocab_size": _INTEGER,
    "num_key_value_heads": (int, _NULL),
    "head_dim": (int, _NULL),
    "max_position_embeddings": _INTEGER,
    "max_sequence_length": _INTEGER,
    "bos_token_id": (int, _NULL),
    "eos_token_id": (int, list, _NULL),
    "pad_token_id": (int, _NULL),
    "rms_norm_eps": _NUMBER,
    "initializer_range": _NUMBER,
    "rope_theta": _NUMBER,
    "tie_word_embeddings": _TRUTH,
    "use_cache": _TRUTH,
    "hidden_act": _TEXT,
    "model_type": _TEXT,
    "transformers_version": (str, _NULL),
    "torch_dtype": (str, _NULL),
    "dtype": (str, _NULL),
    "architectures": (list, _NULL),
    "rope_parameters": (dict, _NULL),
    "rope_scaling": (dict, _NULL),
}
"""The keys that a config of any family may have, and the types of their values."""
_ONE_VALUE: dict[str, Any] = {
    "attention_dropout": 0,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "partial_rotary_factor": 1,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
"""Keys by which other programs change a model, and the value with which each is the model that is built here."""
_OF_OTHERS = (
    "is_llama_config",
    "transformers.js_config",
    "unsloth_fixed",
    "unsloth_version",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_flash_attn_2_enabled",
    "_commit_hash",
    "chunk_size_feed_forward",
    "return_dict",
    "torchscript",
    "use_bfloat16",
    "id2label",
    "label2id",
    "num_labels",
    "finetuning_task",
    "problem_type",
    "task_specific_params",
    "tokenizer_class",
    "prefix",
    "sep_token_id",
    "tie_encoder_decoder",
    "tf_legacy_loss",
)
"""Keys on which a LLaMA does not depend, whatever their values, beside the settings of generation."""
_OTHER_NAMES = {
    "dim": "hidden_size",
    "d_model": "hidden_size",
    "n_embd": "hidden_size",
    "ffn_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_layer": "num_hidden_layers",
    "num_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_head": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "num_kv_heads": "num_key_value_heads",
    "n_positions": "max_position_embeddings",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}
"""What Meta's own files, GPT-2's and others call a key."""
_BEYOND = {
    "auto_map": "it names code of the model's own, which is not run here; leave it out to build a plain LLaMA",
    "sliding_window": "a LLaMA's attention is over all that went before; leave it out to build that",
}
"""Keys of what no LLaMA is, and what to do about each."""
_SCALES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
    "longrope": ("factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""The ways of transformers to turn a head by its position, and the keys that each reads."""
_NOT_PASSED_ON = (
    "pad_token_id",
    "architectures",
    "model_type",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "rope_scaling",
)
"""Keys that are known and checked, and that `LlamaConfig` is not given by this name."""
_FINITE = (
    "max_position_embeddings",
    "max_sequence_length",
    "rms_norm_eps",
    "initializer_range",
    "rope_theta",
)


def load_model_config(name_or_path: str) -> Architecture:
    """Return a shipped config by name (``llama_60m``), or that of a JSON file, published configs included.

    Raises ``InputError`` with file, key and remedy for what makes no sense. The tokens named as padding by
    a config are dropped: ``nn.Embedding`` would zero and freeze that row, a real token's where the id is −1.
    """
    values, source, family = _read(name_or_path)
    kinds = {**_KINDS, **family.kinds}
    for key, value in values.items():
        _check_kind(key, value, kinds, source)
        if float in kinds[key]:  # transformers wants 1.0, and not 1
            values[key] = float(value)
    _fill_heads(values, family)
    for key in _POSITIVE:
        if values.get(key, 0) < 1:
            raise InputError(f"{source}: {key} is {values.get(key, 'missing')}; it must be an integer of at least 1")
    check_depth(values["num_hidden_layers"], source)
    _check_shape(values, source)
    _check_values(values, source)
    rope = _rope(values, source)

    config = {key: value for key, value in values.items() if key not in _NOT_PASSED_ON}
    positions = config.pop("max_sequence_length", None)  # the published configs' name for it
    if positions:
        config.setdefault("max_position_embeddings", positions)
    config["rope_parameters"] = rope
    try:
        built = family.config_class(**config, use_cache=False, architectures=[family.class_name])
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:  # what transformers itself refuses
        reason = " ".join(str(error).split()).replace("rope_parameters", _rope_key(values))
        raise InputError(f"{source}: {reason}") from error
    _check_turning(built, _rope_key(values), source)
    return built


# Where a config says nothing of them, keys have as many heads as queries with some families, and a number of its own
# with others. Older transformers write null for what follows from other keys.
def _fill_heads(values: dict[str, Any], family: Family) -> None:
    """Write down what transformers' class takes where the config has no number of heads for keys, or no width."""
    if values.get("num_key_value_heads", 0) is None:
        values["num_key_value_heads"] = values.get("num_attention_heads", 0)
    defaults = {"num_key_value_heads": None, "head_dim": None}
    if family is not FAMILIES["llama"]:
        plain = family.config_class
        defaults = {key: getattr(plain, key, None) for key in defaults}
    for key, default in defaults.items():
        if values.get(key) is None:
            values.pop(key, None)
            if default is not None:
                values[key] = default


def _read(name_or_path: str) -> tuple[dict[str, Any], str, Family]:
    """Return the keys and values of a config that mean something here, its name in messages, and its family."""
    file = find_model(name_or_path)
    try:
        values = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise InputError(f"{file}: not readable as JSON ({error}); a model config is one JSON object") from error
    if file.name == "state.json":  # of a checkpoint
        values = _of_checkpoint(values, str(file))
    if not isinstance(values, dict):
        raise InputError(f"{file}: holds a JSON {type(values).__name__}; a model config is one JSON object")
    if "added_tokens" in values or "added_tokens_decoder" in values:  # tokenizer.json, tokenizer_config.json
        raise InputError(f"{file}: is of a tokenizer; give its folder with --tokenizer, and a model's config here")
    values.pop("_name_or_path", None)  # where transformers has read it from
    model_type = values.get("model_type", "llama")
    if model_type not in list(FAMILIES):  # told before its keys, which are those of another model
        also = [f"; {key}: {hint}" for key, hint in _BEYOND.items() if values.get(key)]
        raise InputError(
            f"{name_or_path}: model_type is {model_type!r}; {', '.join(FAMILIES)} are built here{''.join(also)}"
        )
    family = FAMILIES[model_type]
    for key, one_value in (_ONE_VALUE | dict(family.one_value)).items():
        value = values.pop(key, None)
        if value is not None and value != one_value:
            raise InputError(
                f"{name_or_path}: {key} is {value!r}; a {family.title} with {one_value!r} is all that is built here"
            )
    generation = GenerationConfig().to_dict().keys()
    passed_over = []
    for key, value in values.items():
        is_known = key in _KINDS or key in family.kinds
        if not is_known and (value is None or key in _OF_OTHERS or key in generation):
            passed_over.append(key)
    for key in passed_over:
        del values[key]
    if passed_over:
        _log_passed_over(name_or_path, ", ".join(sorted(passed_over)))
    return values, name_or_path, family


def _of_checkpoint(state: Any, source: str) -> Any:
    """Return the architecture that a checkpoint's ``state.json`` holds; InputError where it holds none."""
    try:
        return json.loads(state["inputs"]["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{source}: holds no architecture, as those of the first version; name a folder that export makes of it"
        ) from error


@cache  # a run reads its model's config more than once
def _log_passed_over(source: str, keys: str) -> None:
    """Log the keys of a config that are passed over, the first time that it is read."""
    log.info("%s: passed over are keys on which the model does not depend: %s", source, keys)


def _check_kind(key: str, value: Any, known: Mapping[str, tuple[type, ...]], source: str) -> None:
    """Raise InputError where a key is not ``known``, or its value of another type than it must be."""
    if key not in known:
        raise InputError(f"{source}: unknown key {key!r}; {_hint(key, known)}")
    kinds = known[key]
    is_stray_bool = isinstance(value, bool) and bool not in kinds  # Python's bool is an int
    if is_stray_bool or not isinstance(value, kinds):
        names = {type(None): "null"}
        expected = " or ".join(names.get(kind, kind.__name__) for kind in kinds)
        raise InputError(f"{source}: {key} is {value!r}; it must be {expected}")
    if isinstance(value, int) and abs(value) > _LARGEST:
        raise InputError(f"{source}: {key} has {len(str(abs(value)))} digits; an integer must be below 2**63")
    if key == "eos_token_id" and isinstance(value, list) and not all(type(i) is int for i in value):
        raise InputError(f"{source}: {key} is {value!r}; a list must hold int alone")


def _hint(key: str, known: Iterable[str]) -> str:
    """Return what to write in place of an unknown key: the name that it has here, or all names."""
    if key in _BEYOND:
        return _BEYOND[key]
    if key in _OTHER_NAMES:
        return f"here it is {_OTHER_NAMES[key]!r}"
    near = difflib.get_close_matches(key, [*known, *_ONE_VALUE], n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known keys: {', '.join(sorted(known))}"


def _check_shape(values: dict[str, Any], source: str) -> None:
    """Raise InputError where the hidden size cannot be divided into heads, or heads into groups."""
    hidden = values["hidden_size"]
    heads = values["num_attention_heads"]
    if hidden % heads:  # with head_dim it would be no matter, but transformers refuses it then too
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
        origin = f"num_attention_heads {heads} of hidden_size {hidden}"
        if "head_dim" in values:
            origin = "head_dim"
        raise InputError(
            f"{source}: heads are {head_dim} wide, by {origin}; rotary embeddings need an even width of at least 2"
        )
    groups = values.get("num_key_value_heads", heads)
    if groups < 1 or heads % groups:
        raise InputError(
            f"{source}: num_key_value_heads {groups} does not divide num_attention_heads {heads}; choose a divisor"
        )


def _check_values(values: dict[str, Any], source: str) -> None:
    """Raise InputError where an activation is unknown, or a number is not positive and finite."""
    activation = values.get("hidden_act", "silu")
    if activation not in ACT2FN:
        raise InputError(f"{source}: hidden_act {activation!r} is unknown; LLaMA's is 'silu'")
    for key in _FINITE:
        if not 0 < values.get(key, 1) < math.inf:
            raise InputError(f"{source}: {key} is {values[key]}; it must be finite and greater than 0")
    positions = values.get("max_position_embeddings")
    longest = values.get("max_sequence_length")
    if positions and longest and positions != longest:
        raise InputError(
            f"{source}: max_position_embeddings is {positions} and max_sequence_length is {longest}; leave out one"
        )


def _rope(values: dict[str, Any], source: str) -> dict[str, Any] | None:
    """Return how heads are turned by position, as `LlamaConfig` takes it; None where the config says nothing of it.

    Published configs say it as ``rope_scaling``, those that transformers writes today as ``rope_parameters``. Raises
    InputError where both are there and differ, and for a key that would be ignored.
    """
    new, old = values.get("rope_parameters"), values.get("rope_scaling")
    if new and old and new != old:
        raise InputError(f"{source}: rope_parameters and rope_scaling differ; leave out one")
    name = _rope_key(values)
    rope = dict(new or old or {})
    if not rope:
        return None
    rope.pop("finetuned", None)  # a note of those who published YaRN
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(_SCALES):
        raise InputError(f"{source}: {name} is of type {kind!r}; choose from {', '.join(_SCALES)}")
    if rope.pop("partial_rotary_factor", None) not in (None, 1):
        raise InputError(f"{source}: {name} turns a part of each head (partial_rotary_factor); a LLaMA's turn whole")
    known = ("rope_type", "type", "rope_theta", *_SCALES[kind])
    for key in rope:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it reads {', '.join(known)}"
            raise InputError(f"{source}: {name} of type {kind} has no key {key!r}; {hint}")
    if kind == "longrope":
        head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
        _check_factors(rope, head_dim // 2, f"{source}: {name}")
    theta = values.get("rope_theta")
    if theta is not None and rope.get("rope_theta", theta) != theta:
        raise InputError(f"{source}: rope_theta is {theta}, and {rope['rope_theta']} in {name}; leave out one")
    return rope


# One number would be taken for all frequencies, and the factors for long texts are not read before there is such one.
def _check_factors(rope: dict[str, Any], wanted: int, where: str) -> None:
    """Raise InputError where factors of ``longrope`` are not ``wanted`` positive numbers, one for each frequency."""
    for key in ("short_factor", "long_factor"):
        factors = rope.get(key)
        if factors is None:  # transformers says which keys are missing
            continue
        if not isinstance(factors, list) or len(factors) != wanted:
            given = f"a list of {len(factors)}" if isinstance(factors, list) else repr(factors)
            raise InputError(f"{where} has {given} as {key}; give {wanted} numbers, half the width of a head")
        if not all(type(factor) in _NUMBER and 0 < factor < math.inf for factor in factors):
            raise InputError(f"{where} has {key} {factors}; all must be finite and greater than 0")


def _rope_key(values: dict[str, Any]) -> str:
    """Return the key by which a config says how heads are turned."""
    if values.get("rope_parameters"):
        return "rope_parameters"
    return "rope_scaling"


# What the numbers of a scale must be differs from type to type, and transformers only warns of most. So the frequencies
# are computed once: wrong types raise there, and wrong numbers give a table of another shape, or no finite one.
def _check_turning(config: Architecture, key: str, source: str) -> None:
    """Raise InputError where the frequencies by which heads are turned, by what ``key`` says, cannot be computed."""
    rope = config.rope_parameters
    try:
        with torch.device("cpu"):
            rotary = LlamaRotaryEmbedding(config)
        frequencies = rotary.inv_freq
        is_sound = frequencies.shape == (head_width(config) // 2,) and bool((frequencies > 0).all())
        is_sound = is_sound and bool(frequencies.isfinite().all()) and math.isfinite(rotary.attention_scaling)
        reason = "they are not positive and finite, one for each pair of a head"
    except (ArithmeticError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        is_sound = False
        reason = " ".join(str(error).split())
    if not is_sound:
        raise InputError(f"{source}: no frequencies come of {key} {rope} ({reason}); correct them")
