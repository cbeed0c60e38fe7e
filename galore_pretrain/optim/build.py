"""From a method of the table to its rules, and to one optimizer for a model."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any

import torch

from galore_pretrain.optim.compositions import Composition
from galore_pretrain.optim.galore import is_projected
from galore_pretrain.optim.methods import METHODS, NUMERICS, OPTIONS, ROWS, method, resolve_name
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.rule import UpdateRule

NamedParameter = tuple[str, torch.nn.Parameter]


def composition_of(name: str) -> Composition:
    """Return the rules that ``name`` stands for, which is a method's name or ``module:attribute``.

    A rule, or a rule's class, is itself under both numerics.
    """
    home: str | None = name
    if name in METHODS:
        home = METHODS[name].home
    assert home is not None, f"{name} has no rule of its own"
    module_name, _, attribute = home.partition(":")
    value = getattr(import_module(module_name), attribute)
    if isinstance(value, Composition):
        return value
    if isinstance(value, type):
        value = value()
    rule: UpdateRule = value
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
        options["basis"] = "svd_unsigned"  # the published code leaves the signs as its SVD returns them
    entry = method(row)
    if entry.factors_updated_by:
        way_out = f"give its factors to {entry.factors_updated_by!r}"
        raise ValueError(f"{entry.name} is a way to build a model, not an optimizer: {way_out}")
    values = {name: value for name, value in options.items() if value is not None}
    matrices = composition_of(entry.name)
    companion = composition_of(entry.companion or entry.name)
    matrix_rule, used = _configured(getattr(matrices, numerics), values)
    companion_rule, used_by_companion = _configured(getattr(companion, numerics), values)
    unused = values.keys() - used - used_by_companion
    if unused:
        option = min(unused)
        raise ValueError(f"{option} {options[option]} has no meaning for optimizer {entry.name}; leave it out")
    return matrix_rule, companion_rule


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
    """Return one optimizer for all trainable parameters of ``model``, in two groups: its matrices, and the rest.

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
    matrices, rest = _matrices_and_rest(model)
    if rule.projects and not matrices:
        raise ValueError(
            f"{row} found no matrix to project: no trained torch.nn.Linear of the model has attn or mlp in its name; "
            "put the matrices of your choice into a group with a rank, as GaLoreAdamW takes it"
        )
    matrix_group: dict[str, Any] = {"params": matrices, "rule": rule, "lr_scale": matrix_lr_scale}
    rest_group: dict[str, Any] = {"params": rest, "rule": companion, "lr_scale": 1.0}
    groups = [group for group in (matrix_group, rest_group) if group["params"]]
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
        group["weight_decay"] = weight_decay
    return _RowOptimizer(groups, lr=lr, rounding=rounding_of(numerics), seed=seed)


# torch's schedulers that cycle momentum (OneCycleLR, CyclicLR) look for betas among the defaults, and change them in
# every group after each step. A rule is frozen, so a group goes on by a new rule where its betas are other ones.
class _RowOptimizer(RuleOptimizer):
    """Keeps betas in its groups, where all of its first rules have such, and updates by those that stand there."""

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        all_betas = [_betas_of(group["rule"]) for group in groups]
        self._has_betas = None not in all_betas
        super().__init__(groups, **options)
        if self._has_betas and all_betas:
            self.defaults["betas"] = all_betas[0]

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy take."""
        return {**super().__getstate__(), "_has_betas": self._has_betas}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with the betas of its rule; of a rule that has none, without."""
        group = {**param_group}
        betas: tuple[float, float] | None = None
        if is_dataclass(group.get("rule")):  # else it is refused below
            betas = _betas_of(group["rule"])
        if self._has_betas and betas is not None:
            group.setdefault("betas", betas)
        super().add_param_group(group)
        if betas is None:
            self.param_groups[-1].pop("betas", None)  # torch has put the defaults there

    def follow_groups(self) -> None:
        """Go on with the parameters and the betas that the groups have now."""
        super().follow_groups()
        for number, group in enumerate(self.param_groups):
            rule = self.slots.rule_named(group["settings"])
            if "betas" in group and tuple(group["betas"]) != _betas_of(rule):
                self.slots.follow(number, _with_betas(rule, group["betas"]))

    def take_settings(self, group: dict[str, Any], saved: Mapping[str, Any]) -> None:
        """Take over the betas that were saved with a group."""
        if "betas" in group and "betas" in saved:
            group["betas"] = saved["betas"]


def _betas_of(part: Any) -> tuple[float, float] | None:
    """Return the betas of a rule, or of a rule inside of it; None where it has none."""
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name == "betas":
            betas: tuple[float, float] = value
            return betas
        if is_dataclass(value):
            inner = _betas_of(value)
            if inner is not None:
                return inner
    return None


def _with_betas(rule: UpdateRule, betas: Sequence[float]) -> UpdateRule:
    """Return a rule with other betas, of lists or tuples."""
    changed, _ = _configured(rule, {"betas": tuple(betas)})
    assert isinstance(changed, UpdateRule)
    return changed


def _matrices_and_rest(model: torch.nn.Module) -> tuple[list[NamedParameter], list[NamedParameter]]:
    """Return the trained parameters of ``model``: its matrices of attention and MLP, and all others."""
    matrix_names = {f"{name}.weight" for name, module in model.named_modules() if is_projected(name, module)}
    matrices: list[NamedParameter] = []
    rest: list[NamedParameter] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        if name in matrix_names:
            matrices.append((name, p))
        else:
            rest.append((name, p))
    return matrices, rest


def rounding_of(numerics: str) -> str:
    """Return how a bf16 weight takes an update: ``nearest`` or ``stochastic``."""
    if numerics == "reference":
        return "nearest"
    return "stochastic"


_OPTION_OF_FIELD = {field: option.argument for option in OPTIONS.values() for field in option.fields}


# Rules are nested: GaLore has an inner rule, Adam a moment store. An option goes to every field that it names, at
# whatever depth, and the names of the options that were used come back up, so that one without any use is refused.
def _configured(part: Any, values: Mapping[str, Any]) -> tuple[Any, set[str]]:
    """Return a rule with options' ``values`` in its fields, and the names of those that it has taken.

    An option sets the fields that `OPTIONS` names, or the field of its own name. Rules and moment stores inside of the
    rule take theirs likewise.
    """
    if not is_dataclass(type(part)):
        raise TypeError(f"{type(part).__name__} must be a dataclass: write @dataclass(frozen=True) above the class")
    changes: dict[str, Any] = {}
    used: set[str] = set()
    for field in fields(part):
        current = getattr(part, field.name)
        option = field.name
        if option not in values:
            option = _OPTION_OF_FIELD.get(field.name, field.name)
        if option in values:
            value = values[option]
            is_one_of_two = option == "betas" and field.name != "betas"  # SGD's momentum, Adafactor's beta1
            changes[field.name] = value[0] if is_one_of_two else value
            used.add(option)
        elif is_dataclass(current):
            changes[field.name], used_inside = _configured(current, values)
            used |= used_inside
    return replace(part, **changes), used
