"""The registry: a method is a row, composed of a wrapper, a rule and a moment store."""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch

from galore_pretrain.optim.adafactor import Adafactor
from galore_pretrain.optim.adam import Adam
from galore_pretrain.optim.galore import GaLore, is_projected
from galore_pretrain.optim.methods import NUMERICS, resolve_name, split
from galore_pretrain.optim.moments import Blockwise8bit, Dense
from galore_pretrain.optim.natural import Natural
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.rule import UpdateRule
from galore_pretrain.optim.sgd import SGD

_NEAREST, _8BIT = Dense(rounding="nearest"), Blockwise8bit()
_AUTHORS_ADAM = Adam(eps=1e-6, formula="transformers", decay="after", store=_NEAREST)


def _published(inner: UpdateRule, **options: Any) -> GaLore:
    return GaLore(inner, basis="svd_unsigned", refresh="together", published=True, **options)


@dataclass(frozen=True)
class Row:
    """A method as it should be, and as published code computes it: torch's, transformers', bitsandbytes', the authors'.

    ``bare`` updates what is not projected under reference numerics, where that differs from the inner rule.
    """

    sound: Any
    reference: Any
    bare: Any = None


REGISTRY: dict[str, Row] = {
    "sgd": Row(SGD(), SGD(store=_NEAREST)),
    "adam": Row(Adam(decay="l2"), Adam(decay="l2", store=_NEAREST)),
    "adamw": Row(Adam(), Adam(store=_NEAREST)),
    "adamw8bit": Row(Adam(store=_8BIT), Adam(store=_8BIT)),
    "adafactor": Row(Adafactor(), Adafactor(published=True)),
    "galore_adamw": Row(GaLore(Adam()), _published(_AUTHORS_ADAM)),
    "galore_adamw8bit": Row(
        GaLore(Adam(store=_8BIT)),
        _published(Adam(decay="after", scaled=True, store=_8BIT)),
        bare=Adam(store=_8BIT),
    ),
    "galore_adafactor": Row(GaLore(Adafactor()), _published(Adafactor(published=True), upcast=True)),
    "natural_galore": Row(GaLore(Natural(Adam())), _published(Natural(_AUTHORS_ADAM))),
    "natural_galore8bit": Row(
        GaLore(Natural(Adam(store=_8BIT), store=_8BIT)),
        _published(Natural(Adam(eps=1e-6, decay="after", store=_8BIT), store=_8BIT)),
    ),
}


def build_rules(row: str, numerics: str, **options: Any) -> tuple[UpdateRule, UpdateRule]:
    """(rule for matrices, rule for everything else) of a row, with ``options`` instead of the row's own where not None.

    Raises ValueError for an unknown row or value, and for an option that the row has no use for.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"numerics {numerics!r} is unknown; choose from {', '.join(NUMERICS)}")
    if numerics == "reference" and options.get("basis") == "svd":
        options["basis"] = "svd_unsigned"
    name, _ = resolve_name(row)
    if name not in REGISTRY:
        raise ValueError(f"{name} is a way to build a model, not an optimizer: give its factors to {split(name)[1]!r}")
    given = {key: value for key, value in options.items() if value is not None}
    entry = REGISTRY[name]
    matrices, used = _configure(getattr(entry, numerics), given)
    if unused := given.keys() - used:
        option = sorted(unused)[0]
        raise ValueError(f"{option} {options[option]} has no meaning for optimizer {name}; leave it out")
    bare = entry.bare if numerics == "reference" else None
    if bare is None:
        bare = entry.sound if numerics == "sound" else entry.reference
        while isinstance(bare, (GaLore, Natural)):
            bare = bare.inner
    return matrices, _configure(bare, given)[0]


def build_optimizer(
    model: torch.nn.Module,
    row: str,
    *,
    lr: float,
    rank: int | None = None,
    update_proj_gap: int | None = None,
    scale: float | None = None,
    proj_type: str | None = None,
    basis: str | None = None,
    refresh: str | None = None,
    moments: str | None = None,
    natural_history: int | None = None,
    natural_damping: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    numerics: str = "sound",
    weight_decay: float = 0.0,
    matrix_lr_scale: float = 1.0,
    seed: int = 0,
) -> RuleOptimizer:
    """One optimizer for all trainable parameters of ``model``, in two groups: its matrices, and everything else.

    The matrices are the weights of each ``torch.nn.Linear`` with ``attn`` or ``mlp`` somewhere in its name, the choice
    of the paper and the published code. A GaLore row projects them; everything else gets the row's bare inner rule.
    For another choice, make the groups yourself, as `GaLoreAdamW` takes them. ``matrix_lr_scale`` multiplies the
    matrices' learning rate. What is ``None`` stays as the row has it; an option that the row cannot use raises
    ValueError. ``betas[0]`` is SGD's momentum and Adafactor's first moment, which they lack otherwise. A schedule
    writes ``group["lr"] = lr * group["lr_scale"]``.
    """
    options: dict[str, Any] = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale, "proj_type": proj_type}
    options |= {"basis": basis, "refresh": refresh, "moments": moments}
    options |= {"natural_history": natural_history, "natural_damping": natural_damping, "betas": betas, "eps": eps}
    name, layerwise = resolve_name(row)
    if layerwise:
        raise ValueError(f"optimizer {row!r} asks for layerwise updates, which are not an optimizer's: name {name!r}")
    rule, bare = build_rules(name, numerics, **options)
    matrices = {f"{name}.weight" for name, module in model.named_modules() if is_projected(name, module)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in trained if n in matrices], "rule": rule, "lr_scale": matrix_lr_scale},
        {"params": [(n, p) for n, p in trained if n not in matrices], "rule": bare, "lr_scale": 1.0},
    ]
    if not groups[0]["params"] and rule.projects:
        raise ValueError(
            f"{row} found no matrix to project: no trained torch.nn.Linear of the model has attn or mlp in its name; "
            "put the matrices of your choice into a group with a rank, as GaLoreAdamW takes it"
        )
    for group in groups:
        group |= {"lr": lr * group["lr_scale"], "weight_decay": weight_decay}
    return RuleOptimizer([g for g in groups if g["params"]], lr=lr, rounding=rounding_of(numerics), seed=seed)


def rounding_of(numerics: str) -> str:
    """How a bf16 weight takes an update."""
    return "nearest" if numerics == "reference" else "stochastic"


_OPTIONS = {"momentum": "betas", "beta1": "betas", "history": "natural_history", "damping": "natural_damping"}


def _configure(prototype: UpdateRule, options: dict[str, Any]) -> tuple[UpdateRule, set[str]]:
    """The rule with its fields replaced by the options of their name, through all its layers; the options used."""
    used: set[str] = set()

    def replaced(part: Any) -> Any:
        changes = {}
        for field in fields(part):
            name = field.name if field.name in options else _OPTIONS.get(field.name)
            if name in options:
                used.add(name)
                first = name == "betas" and field.name != "betas"
                changes[field.name] = options[name][0] if first else options[name]
            elif is_dataclass(value := getattr(part, field.name)):
                changes[field.name] = replaced(value)
        return replace(part, **changes)

    return replaced(prototype), used
