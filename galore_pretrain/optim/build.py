"""From a method of the table to its rules, and to one optimizer for a model."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any

import torch

from galore_pretrain.optim.compositions import Composition
from galore_pretrain.optim.galore import is_projected
from galore_pretrain.optim.methods import METHODS, NUMERICS, OPTIONS, ROWS, method, resolve_name
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.rule import UpdateRule


def composition_of(named: str) -> Composition:
    """Return the rules that ``named`` stands for, which is a method's name or ``module:attribute``.

    A rule, or a rule's class, is itself under both numerics.
    """
    home = METHODS[named].home if named in METHODS else named
    assert home is not None, f"{named} has no rule of its own"
    module, _, attribute = home.partition(":")
    found = getattr(import_module(module), attribute)
    if isinstance(found, Composition):
        return found
    rule: UpdateRule = found() if isinstance(found, type) else found
    return Composition(rule, rule)


REGISTRY: dict[str, Composition] = {name: composition_of(name) for name in ROWS}
"""The rule of each shipped method's matrices, by the method's name."""


def build_rules(row: str, numerics: str, **options: Any) -> tuple[UpdateRule, UpdateRule]:
    """Return a method's rule for matrices, and its companion for everything else.

    ``options`` replace the rules' own values where not None. Raises ValueError for an unknown method or value, and for
    an option that neither rule has a use for.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"numerics {numerics!r} is unknown; choose from {', '.join(NUMERICS)}")
    if numerics == "reference" and options.get("basis") == "svd":
        options["basis"] = "svd_unsigned"
    entry = method(row)
    if entry.factors_updated_by:
        way_out = f"give its factors to {entry.factors_updated_by!r}"
        raise ValueError(f"{entry.name} is a way to build a model, not an optimizer: {way_out}")
    given = {name: value for name, value in options.items() if value is not None}
    composed, composed_rest = composition_of(entry.name), composition_of(entry.companion or entry.name)
    matrices, used = _configured(getattr(composed, numerics), given)
    rest, used_by_rest = _configured(getattr(composed_rest, numerics), given)
    if unused := given.keys() - used - used_by_rest:
        option = min(unused)
        raise ValueError(f"{option} {options[option]} has no meaning for optimizer {entry.name}; leave it out")
    return matrices, rest


def build_optimizer(
    model: torch.nn.Module,
    row: str,
    *,
    lr: float,
    numerics: str = "sound",
    weight_decay: float = 0.0,
    matrix_lr_scale: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> RuleOptimizer:
    """One optimizer for all trainable parameters of ``model``, in two groups: its matrices, and everything else.

    The matrices are the weights of each ``torch.nn.Linear`` with ``attn`` or ``mlp`` somewhere in its name, the choice
    of the paper and the published code. A GaLore row projects them; everything else gets the row's companion rule.
    For another choice, make the groups yourself, as `GaLoreAdamW` takes them. ``matrix_lr_scale`` multiplies the
    matrices' learning rate. A schedule writes ``group["lr"] = lr * group["lr_scale"]``.

    ``options`` are the method's own: ``rank``, ``update_proj_gap``, ``scale``, ``proj_type``, ``basis``, ``refresh``
    and ``moments`` of GaLore, ``natural_history`` and ``natural_damping``, ``betas`` and ``eps``, or a field of its
    rule. What is left out or None stays as the rule has it; an option that the row cannot use raises ValueError.
    ``betas[0]`` is SGD's momentum and Adafactor's first moment, which they lack otherwise.
    """
    name, layerwise = resolve_name(row)
    if layerwise:
        raise ValueError(f"optimizer {row!r} asks for layerwise updates, which are not an optimizer's: name {name!r}")
    rule, companion = build_rules(name, numerics, **options)
    matrices = {f"{name}.weight" for name, module in model.named_modules() if is_projected(name, module)}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [(n, p) for n, p in trained if n in matrices], "rule": rule, "lr_scale": matrix_lr_scale},
        {"params": [(n, p) for n, p in trained if n not in matrices], "rule": companion, "lr_scale": 1.0},
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
    """Return how a bf16 weight takes an update: ``nearest`` or ``stochastic``."""
    return "nearest" if numerics == "reference" else "stochastic"


_OPTION_OF_FIELD = {field: option.argument for option in OPTIONS.values() for field in option.fields}


def _configured(part: Any, given: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """Return a rule with the options that are ``given`` in its fields, and the names of those that it has taken.

    An option sets the fields that `OPTIONS` names, or the field of its own name. Rules and moment stores inside of the
    rule take theirs likewise.
    """
    changes: dict[str, Any] = {}
    used: set[str] = set()
    for field in fields(part):
        value = getattr(part, field.name)
        option = field.name if field.name in given else _OPTION_OF_FIELD.get(field.name, field.name)
        if option in given:
            is_one_of_two = option == "betas" and field.name != "betas"
            changes[field.name] = given[option][0] if is_one_of_two else given[option]
            used.add(option)
        elif is_dataclass(value):
            changes[field.name], used_inside = _configured(value, given)
            used |= used_inside
    return replace(part, **changes), used
