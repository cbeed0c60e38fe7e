"""The table of methods: everything that ``--optim`` can name, and what the program asks of each.

A method is one entry in `METHODS` and its rule in a file of its own. Flags, checks, recipes, plans and pictures ask the
entry, and nothing asks a method's name. No torch: rules are named by module and attribute and imported when they are
used, so that a wrong name is refused before torch is loaded.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

PROJ_TYPES = ("std", "reverse_std", "left", "right", "full")
BASIS_NAMES = ("svd", "randomized", "tracked", "random")
BASIS_STORES = ("dense", "int8", "int4")
REFRESHES = ("together", "staggered", "lazy")
MOMENTS = ("keep", "project", "reset")
NUMERICS = ("sound", "reference")
MOMENT_STORES = ("dense", "8bit")
ROLES = ("embedding", "head", "vector")
"""What a parameter that is no matrix of attention or MLP can be to a model: see `build_optimizer`."""


@dataclass(frozen=True)
class Option:
    """Describes a flag that only some methods have a use for; ``why`` is what users of the others are told.

    ``argument`` is the flag's name in `build_optimizer`, and ``fields`` are the fields of rules that it sets. A flag of
    the model's factors has neither.
    """

    why: str
    argument: str = ""
    fields: tuple[str, ...] = ()


_PROJECTS = "only methods with a subspace have one"
_NATURAL = "only Natural GaLore methods have a history"
_FROZEN = "only LoRA and ReLoRA methods add to a frozen matrix"
_MERGES = "only ReLoRA methods merge"

OPTIONS: dict[str, Option] = {
    "rank": Option("only methods with a subspace, and low_rank, lora and relora have one", "rank", ("rank",)),
    "rank_by_module": Option("only methods with a subspace have ranks by module", "rank_by_module"),
    "update_proj_gap": Option(_PROJECTS, "update_proj_gap", ("update_proj_gap",)),
    "galore_scale": Option("only methods with a subspace, and foam, have one", "scale", ("scale",)),
    "proj_type": Option(_PROJECTS, "proj_type", ("proj_type",)),
    "basis": Option(_PROJECTS, "basis", ("basis",)),
    "bases": Option("only methods that keep a basis have one to keep", "basis_store", ("basis_store",)),
    "refresh": Option(_PROJECTS, "refresh", ("refresh",)),
    "moments": Option(_PROJECTS, "moments", ("moments",)),
    "natural_history": Option(_NATURAL, "natural_history", ("history",)),
    "natural_damping": Option(_NATURAL, "natural_damping", ("damping",)),
    "lora_alpha": Option(_FROZEN),
    "lora_dropout": Option(_FROZEN),
    "eps": Option("only methods with an Adam have one", "eps", ("eps",)),
    "relora_every": Option(_MERGES),
    "relora_warmup": Option(_MERGES),
    "moment_store": Option("only methods with Adam's moments have a choice", "moment_store", ("store",)),
    "vector_lr_scale": Option("only methods with a rule for vectors have one", "vector_lr_scale"),
    "betas": Option("only methods with a first moment have them", "betas", ("betas", "momentum", "beta1")),
}
"""The options of methods by their flags, in the order in which they are checked. A field that is one number takes the
first of ``betas``: SGD's momentum, Adafactor's first moment."""

# Which options a method has follows from what it is composed of.
_OF_ADAM = ("betas", "eps", "moment_store")
_OF_SUBSPACE = ("rank", "rank_by_module", "update_proj_gap", "galore_scale", "proj_type")
_OF_GALORE = (*_OF_SUBSPACE, "basis", "bases", "refresh", "moments")
_OF_NATURAL = ("natural_history", "natural_damping")
_OF_LORA = ("rank", "lora_alpha", "lora_dropout")
_OF_RELORA = (*_OF_LORA, "relora_every", "relora_warmup")


@dataclass(frozen=True)
class Recipe:
    """Holds hyper-parameters of a method by their flags, and their source; ``model``: the only model they are for."""

    values: Mapping[str, Any]
    source: str
    model: str | None = None


_GRID = "the best of the paper's grid with llama_1m, docs/reproducing.md"
_SCALE = "SCALE scripts (arXiv 2506.16659)"
_APOLLO = "APOLLO scripts (arXiv 2412.05270)"
_FIRA = "Fira scripts (arXiv 2410.01673)"
_MUON = "Muon in Conda's scripts (arXiv 2509.24218)"
_Q_GALORE = "Q-GaLore scripts (arXiv 2407.08296)"
_RECIPES_OF_APOLLO = (
    Recipe({"lr": 0.01, "galore_scale": 1.0}, _APOLLO),
    Recipe({"rank": 192}, _APOLLO, model="llama_130m"),
    Recipe({"galore_scale": 0.5}, f"{_APOLLO}, the paper's scale", model="llama_1b"),
    Recipe({"rank": 256}, _APOLLO, model="llama_7b"),
)
_RECIPES_OF_APOLLO_MINI = (
    Recipe({"lr": 0.01, "galore_scale": 128.0}, _APOLLO),
    Recipe({"galore_scale": 192.0}, _APOLLO, model="llama_130m"),
)
_Q_APOLLO = Recipe({"weights": "int8", "weight_group": "128"}, f"{_APOLLO}, Q-APOLLO")
_AT_7B = Recipe(
    {"lr": 0.005, "update_proj_gap": 500, "grad_clip": 1.0},
    "GaLore scripts/benchmark_c4/llama_7b.sh",
    model="llama_7b",
)


@dataclass(frozen=True)
class Companion:
    """Names what updates the parameters of one role, by ``module:attribute``, and by which factor on the rate.

    ``options`` are those of the method's that reach its rule; None: all.
    """

    home: str
    lr_scale: float = 1.0
    options: tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Method:
    """Describes a method: where its rules are, and what the program has to know of it without loading them."""

    name: str
    description: str
    """What the method is, in a few words."""
    home: str | None = None
    """``module:attribute`` of its rule: a `Composition`, a rule, or a rule's class that needs no arguments."""
    companion: str | None = None
    """What updates all that is no matrix of attention or MLP (embeddings, head, norms): another method's name, or a
    ``module:attribute``. None: the method's own rule."""
    companions: Mapping[str, Companion] = field(default_factory=dict)
    """What updates the parameters of one of the `ROLES` instead of ``companion``."""
    matrix_options: tuple[str, ...] | None = None
    """Those of ``options`` that reach the rule of the matrices. None: all."""
    factors_updated_by: str | None = None
    """Instead of a home: the model's matrices are trained through two thin factors, which the named method updates."""
    aliases: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    """The flags of `OPTIONS` that it has a use for."""
    projects: bool = False
    """Whether the gradients of matrices are kept in a low-rank subspace until the update."""
    has_low_rank: bool = False
    """Whether its state of a matrix is of low rank, as that of all that project is: processes then share a matrix out
    along the side that stays."""
    moments_8bit: bool = False
    other_store: str | None = None
    """The name of the same method with moments of the other store, where it is an entry of its own."""
    colour: str | None = None
    """Its colour in pictures. The 8-bit form of a method has the method's, in broken strokes."""
    digest: str | None = None
    """Of a method from outside the package: the SHA-256 of its file."""
    recipes: tuple[Recipe, ...] = ()
    """Where two have a value for the same flag, the later one holds. What no recipe has, the user has to give."""

    def keeps_8bit(self, moment_store: str | None = None) -> bool:
        """Return whether moments have 8 bits: as ``moment_store`` says, or without it as the method has them."""
        if moment_store is None:
            return self.moments_8bit
        return {"dense": False, "8bit": True}[moment_store]

    @property
    def updater(self) -> str:
        """Return the name of the method whose rules update the parameters: another where this one makes factors."""
        return self.factors_updated_by or self.name


# A learning rate is "chosen here" where the paper does not say which one of its grid it chose (docs/reproducing.md).
_ENTRIES = (
    Method(
        name="sgd",
        description="stochastic gradient descent, with momentum where --betas names one",
        home="galore_pretrain.optim.compositions:sgd",
        options=("betas",),
        recipes=(Recipe({"lr": 0.1}, "chosen here, untuned"),),
    ),
    Method(
        name="adam",
        description="Adam; weight decay is added to the gradient",
        home="galore_pretrain.optim.compositions:adam",
        options=_OF_ADAM,
        recipes=(Recipe({"lr": 0.001}, f"chosen here: as for adamw, {_GRID}"),),
    ),
    Method(
        name="adamw",
        description="Adam with decoupled weight decay",
        home="galore_pretrain.optim.compositions:adamw",
        aliases=("adamw_torch", "adamw_torch_fused"),
        options=_OF_ADAM,
        colour="#000000",
        other_store="adamw8bit",
        recipes=(Recipe({"lr": 0.001}, f"chosen here: {_GRID}"),),
    ),
    Method(
        name="adamw8bit",
        description="AdamW with moments of 8 bits",
        home="galore_pretrain.optim.compositions:adamw8bit",
        aliases=("adam8bit", "adamw_bnb8bit"),
        options=_OF_ADAM,
        moments_8bit=True,
        colour="#000000",
        other_store="adamw",
        recipes=(Recipe({"lr": 0.001}, f"chosen here: as for adamw, {_GRID}"),),
    ),
    Method(
        name="adafactor",
        description="a matrix's second moment as one number a row and one a column",
        home="galore_pretrain.optim.compositions:adafactor",
        options=("betas",),
        colour="#56B4E9",
        recipes=(Recipe({"lr": 0.005}, f"chosen here: {_GRID}"),),
    ),
    Method(
        name="galore_adamw",
        description="AdamW in a low-rank subspace of the gradient",
        home="galore_pretrain.optim.compositions:galore_adamw",
        companion="galore_pretrain.optim.compositions:authors_adamw",
        aliases=("galore", "galore_adam"),
        options=(*_OF_GALORE, *_OF_ADAM),
        projects=True,
        colour="#0072B2",
        other_store="galore_adamw8bit",
        recipes=(Recipe({"lr": 0.01, "galore_scale": 0.25}, "GaLore scripts/benchmark_c4"), _AT_7B),
    ),
    Method(
        name="galore_adamw8bit",
        description="AdamW with moments of 8 bits in a low-rank subspace of the gradient",
        home="galore_pretrain.optim.compositions:galore_adamw8bit",
        companion="adamw8bit",
        aliases=("galore_adam8bit",),
        options=(*_OF_GALORE, *_OF_ADAM),
        projects=True,
        moments_8bit=True,
        colour="#0072B2",
        other_store="galore_adamw",
        recipes=(Recipe({"lr": 0.01, "galore_scale": 0.25}, "GaLore scripts/benchmark_c4"), _AT_7B),
    ),
    Method(
        name="galore_adafactor",
        description="Adafactor in a low-rank subspace of the gradient",
        home="galore_pretrain.optim.compositions:galore_adafactor",
        companion="adafactor",
        options=(*_OF_GALORE, "betas"),
        projects=True,
        recipes=(
            Recipe({"lr": 0.01, "galore_scale": 0.25}, "GaLore scripts/benchmark_c4, as for galore_adamw"),
            _AT_7B,
        ),
    ),
    Method(
        name="natural_galore",
        description="GaLore with AdamW; low-rank gradients are preconditioned by their recent past",
        home="galore_pretrain.optim.compositions:natural_galore",
        companion="galore_pretrain.optim.compositions:authors_adamw",
        aliases=("natural_galore_adamw",),
        options=(*_OF_GALORE, *_OF_NATURAL, *_OF_ADAM),
        projects=True,
        colour="#CC79A7",
        other_store="natural_galore8bit",
        recipes=(Recipe({"lr": 0.01, "galore_scale": 0.25}, "chosen here, untuned; as for galore_adamw"), _AT_7B),
    ),
    Method(
        name="natural_galore8bit",
        description="natural_galore with moments and history of 8 bits",
        home="galore_pretrain.optim.compositions:natural_galore8bit",
        companion="galore_pretrain.optim.compositions:authors_adamw8bit",
        aliases=("natural_galore_adamw8bit",),
        options=(*_OF_GALORE, *_OF_NATURAL, *_OF_ADAM),
        projects=True,
        moments_8bit=True,
        colour="#CC79A7",
        other_store="natural_galore",
        recipes=(Recipe({"lr": 0.01, "galore_scale": 0.25}, "chosen here, untuned; as for galore_adamw"), _AT_7B),
    ),
    Method(
        name="scale",
        description="gradients with each row normalized; a momentum for the head alone, Adam for vectors",
        home="galore_pretrain.optim.compositions:scale",
        companion="adamw",
        companions={
            "embedding": Companion("galore_pretrain.optim.compositions:scale_embedding", options=("moment_store",)),
            "head": Companion("galore_pretrain.optim.compositions:scale_head"),
            "vector": Companion("adamw", lr_scale=20.0),
        },
        options=(*_OF_ADAM, "vector_lr_scale"),
        matrix_options=("moment_store",),
        recipes=(
            Recipe({"lr": 0.001}, _SCALE),
            Recipe({"lr": 2e-4, "vector_lr_scale": 5.0}, _SCALE, model="llama_1b"),
            Recipe({"lr": 1e-4, "vector_lr_scale": 10.0}, _SCALE, model="llama_7b"),
        ),
    ),
    Method(
        name="apollo",
        description="the gradient with each channel scaled as AdamW scales it in a random subspace",
        home="galore_pretrain.optim.compositions:apollo",
        companion="galore_pretrain.optim.compositions:authors_adamw",
        aliases=("apollo_adamw",),
        has_low_rank=True,
        options=("rank", "rank_by_module", "update_proj_gap", "galore_scale", *_OF_ADAM),
        recipes=_RECIPES_OF_APOLLO,
    ),
    Method(
        name="apollo_mini",
        description="apollo at rank 1, with one scale for a whole matrix",
        home="galore_pretrain.optim.compositions:apollo_mini",
        companion="galore_pretrain.optim.compositions:authors_adamw",
        has_low_rank=True,
        options=("update_proj_gap", "galore_scale", *_OF_ADAM),
        recipes=_RECIPES_OF_APOLLO_MINI,
    ),
    Method(
        name="q_galore",
        description="galore_adamw8bit with weights of 8 bits, bases of 4, and refreshes as far as they turn",
        home="galore_pretrain.optim.compositions:q_galore",
        companion="adamw8bit",
        aliases=("q_galore_adamw8bit",),
        options=(*_OF_GALORE, *_OF_ADAM),
        projects=True,
        moments_8bit=True,
        recipes=(
            Recipe({"lr": 0.01, "galore_scale": 0.25, "betas": (0.9, 0.95)}, _Q_GALORE),
            Recipe({"weights": "int8", "weight_group": "256", "bases": "int4", "refresh": "lazy"}, _Q_GALORE),
            Recipe({"lr": 0.015}, _Q_GALORE, model="llama_60m"),
            Recipe({"lr": 0.015}, _Q_GALORE, model="llama_130m"),
            Recipe({"lr": 0.004, "update_proj_gap": 500}, _Q_GALORE, model="llama_7b"),
        ),
    ),
    Method(
        name="q_apollo",
        description="apollo with weights and moments of 8 bits",
        home="galore_pretrain.optim.compositions:q_apollo",
        companion="adamw8bit",
        has_low_rank=True,
        options=("rank", "rank_by_module", "update_proj_gap", "galore_scale", *_OF_ADAM),
        moments_8bit=True,
        recipes=(*_RECIPES_OF_APOLLO, _Q_APOLLO),
    ),
    Method(
        name="q_apollo_mini",
        description="apollo_mini with weights and moments of 8 bits",
        home="galore_pretrain.optim.compositions:q_apollo_mini",
        companion="adamw8bit",
        has_low_rank=True,
        options=("update_proj_gap", "galore_scale", *_OF_ADAM),
        moments_8bit=True,
        recipes=(*_RECIPES_OF_APOLLO_MINI, _Q_APOLLO),
    ),
    Method(
        name="fira",
        description="galore_adamw, and what is outside of the subspace scaled as what is inside",
        home="galore_pretrain.optim.compositions:fira",
        companion="galore_pretrain.optim.compositions:authors_adamw",
        aliases=("fira_adamw",),
        has_low_rank=True,
        options=(*_OF_GALORE, *_OF_ADAM),
        recipes=(
            Recipe({"lr": 0.01, "galore_scale": 0.25}, _FIRA),
            Recipe({"galore_scale": 0.0625}, _FIRA, model="llama_1b"),
            Recipe(
                {"lr": 0.005, "galore_scale": 0.0625, "rank": 64, "update_proj_gap": 500, "grad_clip": 1.0},
                _FIRA,
                model="llama_7b",
            ),
        ),
    ),
    Method(
        name="subtrack",
        description="fira in a subspace that follows the gradient by small rotations (SubTrack++)",
        home="galore_pretrain.optim.compositions:subtrack",
        companion="galore_pretrain.optim.compositions:authors_adamw",
        aliases=("subtrack_plus_plus", "subtrack++"),
        has_low_rank=True,
        options=(*_OF_SUBSPACE, "refresh", *_OF_ADAM),
        recipes=(
            Recipe({"lr": 0.01, "galore_scale": 0.25}, "MoARa's Table 3, all methods at one rate"),
            Recipe({"lr": 0.005, "grad_clip": 1.0, "update_proj_gap": 500}, "MoARa, SubTrack++", model="llama_7b"),
        ),
    ),
    Method(
        name="foam",
        description="AdamW with moments of blocks of 4 neighbours, and the rest of the gradient",
        home="galore_pretrain.optim.compositions:foam",
        companion="adamw",
        options=("galore_scale", *_OF_ADAM),
        recipes=(Recipe({"lr": 0.01, "galore_scale": 0.25}, "FOAM scripts (arXiv 2512.07112)"),),
    ),
    Method(
        name="muon",
        description="a momentum with equal singular values; AdamW for all but matrices",
        home="galore_pretrain.optim.compositions:muon",
        companion="galore_pretrain.optim.compositions:muon_rest",
        options=_OF_ADAM,
        matrix_options=("moment_store",),
        recipes=(
            Recipe({"lr": 0.001}, _MUON),
            Recipe({"weight_decay": 0.1, "grad_clip": 1.0}, _MUON, model="llama_1b"),
            Recipe({"weight_decay": 0.1, "grad_clip": 1.0}, f"{_MUON}, as for llama_1b", model="llama_7b"),
        ),
    ),
    Method(
        name="low_rank",
        description="matrices are products of two thin factors",
        factors_updated_by="adamw",
        aliases=("low_rank_adamw",),
        options=("rank", *_OF_ADAM),
        colour="#E69F00",
        recipes=(Recipe({"lr": 0.001}, f"chosen here: {_GRID}"),),
    ),
    Method(
        name="low_rank_adamw8bit",
        description="low_rank with moments of 8 bits",
        factors_updated_by="adamw8bit",
        options=("rank", *_OF_ADAM),
        moments_8bit=True,
        colour="#E69F00",
        recipes=(Recipe({"lr": 0.001}, f"chosen here: as for low_rank, {_GRID}"),),
    ),
    Method(
        name="lora",
        description="a product of two thin factors is added to each frozen matrix",
        factors_updated_by="adamw",
        aliases=("lora_adamw",),
        options=(*_OF_LORA, *_OF_ADAM),
        colour="#009E73",
        recipes=(Recipe({"lr": 0.001}, f"chosen here: {_GRID}"),),
    ),
    Method(
        name="lora_adamw8bit",
        description="lora with moments of 8 bits",
        factors_updated_by="adamw8bit",
        options=(*_OF_LORA, *_OF_ADAM),
        moments_8bit=True,
        colour="#009E73",
        recipes=(Recipe({"lr": 0.001}, f"chosen here: as for lora, {_GRID}"),),
    ),
    Method(
        name="relora",
        description="lora; now and then the product becomes a part of the matrix and begins anew",
        factors_updated_by="adamw",
        aliases=("relora_adamw",),
        options=(*_OF_RELORA, *_OF_ADAM),
        colour="#D55E00",
        recipes=(Recipe({"lr": 0.001}, f"chosen here: {_GRID}"),),
    ),
    Method(
        name="relora_adamw8bit",
        description="relora with moments of 8 bits",
        factors_updated_by="adamw8bit",
        options=(*_OF_RELORA, *_OF_ADAM),
        moments_8bit=True,
        colour="#D55E00",
        recipes=(Recipe({"lr": 0.001}, f"chosen here: as for relora, {_GRID}"),),
    ),
)
METHODS: dict[str, Method] = {entry.name: entry for entry in _ENTRIES}
"""The methods by name, in the order in which help lists them."""
ROWS = tuple(entry.name for entry in _ENTRIES if entry.home)
"""The names of those that are optimizers; the others are models in factors."""
# How transformers ("_layerwise"), galore_torch's scripts ("_per_layer") and users write the same.
_LAYERWISE = ("_layerwise", "_layer_wise", "_per_layer")


def method(name: str) -> Method:
    """Return the method that ``name``, or an alias, stands for; ValueError as from `resolve_name` if there is none.

    Of a method from outside the package that was not loaded (`load_method`), nothing but the name is known.
    """
    row, _ = resolve_name(name)
    if row not in METHODS:
        return Method(name=row, description="a method from outside the package", home=row)
    return METHODS[row]


def is_own(name: str) -> bool:
    """Return whether ``name`` is ``FILE.py:NAME`` or ``package.module:NAME``: of a method from outside the package."""
    return ":" in name


def resolve_name(name: str) -> tuple[str, bool]:
    """Return a method's name, and whether ``name`` also asks for layerwise updates.

    ``galore_adamw_8bit_per_layer`` is galore_adamw8bit, layerwise. Case, dashes and the underscore before ``8bit`` do
    not matter. A name with a colon is of a method from outside the package, and is returned as it is. Raises
    ValueError, which lists near names, for any other that is none of `METHODS`.
    """
    if is_own(name):
        return name, False
    aliases: dict[str, str] = {}
    for entry in METHODS.values():
        for alias in entry.aliases:
            aliases[alias] = entry.name
    plain = name.lower().replace("-", "_")
    layerwise = plain.endswith(_LAYERWISE)
    for suffix in _LAYERWISE:
        if plain.endswith(suffix):
            plain = plain.removesuffix(suffix)
            break
    plain = plain.replace("_8bit", "8bit")
    row = aliases.get(plain, plain)
    if row not in METHODS:
        near = difflib.get_close_matches(plain, [*METHODS, *aliases], n=3, cutoff=0.5)
        hint = "choose from "
        if near:
            hint = f"did you mean {' or '.join(near)}? All methods: "
        shipped = (row for row in METHODS if not is_own(row))
        raise ValueError(f"{name} is unknown; {hint}{', '.join(shipped)}, or FILE.py:NAME")
    return row, layerwise
