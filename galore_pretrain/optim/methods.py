"""The names of the rows, those that other projects use, and the choices of options.

No torch: a wrong name is refused before it is loaded.
"""

import difflib

ROWS = (
    "sgd",
    "adam",
    "adamw",
    "adamw8bit",
    "adafactor",
    "galore_adamw",
    "galore_adamw8bit",
    "galore_adafactor",
    "natural_galore",
    "natural_galore8bit",
)
FACTORED = ("low_rank", "lora", "relora")
"""Ways to train matrices through two thin factors, which AdamW updates."""
METHODS = (*ROWS, *(name + suffix for name in FACTORED for suffix in ("", "_adamw8bit")))
"""What ``--optim`` takes: the optimizers' rows, and those of models in factors."""
PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
BASIS_NAMES = ("svd", "randomized")
REFRESHES = ("together", "staggered")
MOMENTS = ("keep", "project", "reset")
NUMERICS = ("sound", "reference")
_ALIASES = {
    "adam8bit": "adamw8bit",
    "galore": "galore_adamw",
    "galore_adam": "galore_adamw",
    "galore_adam8bit": "galore_adamw8bit",
    "natural_galore_adamw": "natural_galore",
    "natural_galore_adamw8bit": "natural_galore8bit",
    "low_rank_adamw": "low_rank",
    "lora_adamw": "lora",
    "relora_adamw": "relora",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb8bit": "adamw8bit",
}
_LAYERWISE = ("_layerwise", "_layer_wise", "_per_layer")


def split(method: str) -> tuple[str | None, str]:
    """(which of `FACTORED`, row) of one of `METHODS`: ``lora_adamw8bit`` is LoRA, updated by adamw8bit."""
    for name in FACTORED:
        if method in (name, f"{name}_adamw8bit"):
            return name, method.removeprefix(name).removeprefix("_") or "adamw"
    return None, method


def resolve_name(name: str) -> tuple[str, bool]:
    """(method, whether the name also asks for layerwise updates): ``galore_adamw_8bit_per_layer`` is galore_adamw8bit.

    Case, dashes and the underscore before ``8bit`` do not matter. Raises ValueError, which lists near names, for a name
    that is none of `METHODS`.
    """
    plain = name.lower().replace("-", "_")
    suffix = next((suffix for suffix in _LAYERWISE if plain.endswith(suffix)), "")
    plain = plain.removesuffix(suffix).replace("_8bit", "8bit")
    row = _ALIASES.get(plain, plain)
    if row not in METHODS:
        near = difflib.get_close_matches(plain, [*METHODS, *_ALIASES], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? All rows: " if near else "choose from "
        raise ValueError(f"{name} is unknown; {hint}{', '.join(METHODS)}")
    return row, bool(suffix)
