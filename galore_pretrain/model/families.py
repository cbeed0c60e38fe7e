"""The kinds of decoders that are built here: all are LLaMA's layers, by a class of transformers each."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from galore_pretrain.errors import InputError

Architecture: TypeAlias = PreTrainedConfig
"""The configuration of a model of one of the `FAMILIES`."""
CausalLM: TypeAlias = PreTrainedModel
"""A model of one of the `FAMILIES`."""
_NULL = type(None)
_WINDOWS: dict[str, tuple[type, ...]] = {
    "use_sliding_window": (bool,),
    "sliding_window": (int, _NULL),
    "max_window_layers": (int,),
    "layer_types": (list, _NULL),
}


_MOST_LAYERS = 1000
"""As many as DeepNet's (arXiv 2203.00555). To build millions takes days, before a plan can say that they do not fit."""


def check_depth(layers: int, source: str) -> None:
    """Raise InputError where a model of so many ``layers`` is not built; ``source`` names its config."""
    if layers > _MOST_LAYERS:
        raise InputError(f"{source}: num_hidden_layers is {layers}; at most {_MOST_LAYERS} layers are built")


@dataclass(frozen=True)
class Family:
    """Says what transformers calls a kind of decoder, and what its config may say that others' may not.

    ``kinds`` are keys of its own and the types of their values. ``one_value`` has keys by which it would be another
    model, and the value with which it is the one that is built.
    """

    name: str
    kinds: Mapping[str, tuple[type, ...]]
    one_value: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Return what messages call it."""
        return "LLaMA" if self.name == "Llama" else self.name

    @property
    def config_class(self) -> Any:
        """Return transformers' class of its configuration."""
        return getattr(transformers, f"{self.name}Config")

    @property
    def model_class(self) -> Any:
        """Return transformers' class of the model with a head."""
        return getattr(transformers, self.class_name)

    @property
    def class_name(self) -> str:
        """Return the name of that class, which config.json has under ``architectures``."""
        return f"{self.name}ForCausalLM"


FAMILIES = {
    "llama": Family("Llama", {"attention_bias": (bool,), "mlp_bias": (bool,)}, {"use_sliding_window": False}),
    "mistral": Family(
        "Mistral",
        {"sliding_window": (int, _NULL)},
        {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    ),
    "qwen2": Family("Qwen2", _WINDOWS, {"mlp_bias": False}),
    "qwen3": Family("Qwen3", _WINDOWS | {"attention_bias": (bool,)}, {"mlp_bias": False}),
}
"""What is built here, by transformers' ``model_type``."""


def family_of(architecture: Architecture) -> Family:
    """Return the family of a model by its configuration."""
    return FAMILIES[architecture.model_type]


def architecture_of(values: Mapping[str, Any]) -> Architecture:
    """Return the configuration that `to_diff_dict` was called on, by its values."""
    family = FAMILIES[values.get("model_type", "llama")]
    return family.config_class.from_dict(dict(values))


def layers_of(model: CausalLM) -> Any:
    """Return the layers of a decoder, or of an encoder, in their order."""
    encoder = getattr(model, "roberta", None)
    if encoder is not None:
        return encoder.encoder.layer
    return model.model.layers


def head_width(architecture: Architecture) -> int:
    """Return the width of a head of attention."""
    of_config: int | None = getattr(architecture, "head_dim", None)
    return of_config or architecture.hidden_size // architecture.num_attention_heads


def positions_of(architecture: Architecture) -> int:
    """Return how long a row may be: as many tokens as there are positions, and as every layer attends to."""
    positions: int = architecture.max_position_embeddings
    return min(positions, window_of(architecture) or positions)


# A model with a window attends to the last so many positions, itself included. In a row that is no longer, these are
# all that went before. So such rows need no mask, and longer ones are refused.
def window_of(architecture: Architecture) -> int | None:
    """Return to how many positions back some layer attends; None where all attend to all that went before."""
    window: int | None = getattr(architecture, "sliding_window", None)
    layers = getattr(architecture, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return None
    return window
