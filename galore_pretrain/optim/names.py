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
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb8bit": "adamw8bit",
}
_LAYERWISE = ("_layerwise", "_layer_wise", "_per_layer")


def resolve_name(name: str) -> tuple[str, bool]:
    """(row, whether the name also asks for layerwise updates): ``galore_adamw_8bit_per_layer`` is galore_adamw8bit.

    Case, dashes and the underscore before ``8bit`` do not matter. Raises ValueError, which lists near names, for a name
    that is no row.
    """
    plain = name.lower().replace("-", "_")
    suffix = next((suffix for suffix in _LAYERWISE if plain.endswith(suffix)), "")
    plain = plain.removesuffix(suffix).replace("_8bit", "8bit")
    row = _ALIASES.get(plain, plain)
    if row not in ROWS:
        near = difflib.get_close_matches(plain, [*ROWS, *_ALIASES], n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? All rows: " if near else "choose from "
        raise ValueError(f"{name} is unknown; {hint}{', '.join(ROWS)}")
    return row, bool(suffix)
