"""From a method of the table to its rules, and to one optimizer for a model."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from galore_pretrain.optim.compositions import Composition
from galore_pretrain.optim.galore import is_projected
from galore_pretrain.optim.methods import (
    METHODS,
    MOMENT_STORES,
    NUMERICS,
    OPTIONS,
    ROWS,
    Method,
    is_own,
    method,
    resolve_name,
)
from galore_pretrain.optim.moments import Blockwise8bit, Dense, MomentStore
from galore_pretrain.optim.optimizer import RuleOptimizer
from galore_pretrain.optim.own import composition_at, load_method
from galore_pretrain.optim.rule import UpdateRule, option_names

NamedParameter = tuple[str, torch.nn.Parameter]
Targets = Callable[[str, torch.nn.Module], bool]
"""Tells, of a module and its name, whether its weight is a matrix for a method's own rule."""


def composition_of(name: str) -> Composition:
    """Return the rules that ``name`` stands for, which is a method's name or ``module:attribute``.

    A rule, or a rule's class, is itself under both numerics.
    """
    home: str | None = name
    if name in METHODS:
        home = METHODS[name].home
    assert home is not None, f"{name} has no rule of its own"
    return composition_at(home, name)


REGISTRY: dict[str, Composition] = {name: composition_of(name) for name in ROWS}
"""The rule of each shipped method's matrices, by the method's name."""


MATRIX = "matrix"
"""The role of a weight of attention or MLP."""
REST = "rest"
"""The role of whatever has no companion of its own."""


def rules_by_role(row: str, numerics: str, **options: Any) -> dict[str, UpdateRule]:
    """Return a method's rule for each role that it tells apart: ``matrix``, ``rest``, and those of its companions.

    ``options`` replace the rules' own values where not None. Raises ValueError for an unknown method or value, and for
    an option that no rule has a use for.
    """
    if numerics not in NUMERICS:
        raise ValueError(f"numerics {numerics!r} is unknown; choose from {', '.join(NUMERICS)}")
    if numerics == "reference" and options.get("basis") == "svd":
        options["basis"] = "svd_unsigned"  # the published code leaves the signs as its SVD returns them
    entry = load_method(row) if is_own(row) else method(row)
    if entry.factors_updated_by:
        way_out = f"give its factors to {entry.factors_updated_by!r}"
        raise ValueError(f"{entry.name} is a way to build a model, not an optimizer: {way_out}")
    values = {name: value for name, value in options.items() if value is not None}
    for flag, known in OPTIONS.items():
        if known.argument in values and flag not in entry.options:
            raise ValueError(_without_meaning(known.argument, values, entry.name))
    if "moment_store" in values:
        entry, values = _with_store(entry, values)
    homes = {MATRIX: entry.name, REST: entry.companion or entry.name}
    homes |= {role: companion.home for role, companion in entry.companions.items()}
    reach = {role: companion.options for role, companion in entry.companions.items()}
    reach[MATRIX] = entry.matrix_options
    rules: dict[str, UpdateRule] = {}
    unused = set(values)
    for role, home in homes.items():
        composition = composition_of(home)
        flags = reach.get(role)
        reaching = values
        if flags is not None:
            held_back = {OPTIONS[flag].argument for flag in entry.options if flag not in flags}
            reaching = {name: value for name, value in values.items() if name not in held_back}
        rules[role], used = _configured(getattr(composition, numerics), reaching)
        unused -= used
    if unused:
        option = min(unused)
        if option in {known.argument for known in OPTIONS.values()}:
            raise ValueError(_without_meaning(option, options, entry.name))
        names = dict.fromkeys(name for rule in rules.values() for name in option_names(rule))
        raise ValueError(f"optimizer {entry.name} has no option {option}; it has {', '.join(names)}")
    return rules


def _without_meaning(option: str, values: Mapping[str, Any], name: str) -> str:
    """Return what to say of an option that a method has no use for."""
    return f"{option} {values[option]} has no meaning for optimizer {name}; leave it out"


# A method whose 8-bit form is an entry of its own goes on as that entry: published code computes it differently. Any
# other one has its moment stores exchanged.
def _with_store(entry: Method, values: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Return the entry with moments of the store that the value ``moment_store`` names, and the values left to set."""
    name = values["moment_store"]
    if name not in MOMENT_STORES:
        raise ValueError(f"moment_store {name!r} is unknown; choose from {', '.join(MOMENT_STORES)}")
    others = {option: value for option, value in values.items() if option != "moment_store"}
    if entry.keeps_8bit(name) == entry.moments_8bit:
        return entry, others
    if entry.other_store is not None:
        return METHODS[entry.other_store], others
    stores: dict[str, MomentStore] = {"dense": Dense(), "8bit": Blockwise8bit()}
    return entry, others | {"moment_store": stores[name]}


def build_rules(row: str, numerics: str, **options: Any) -> tuple[UpdateRule, UpdateRule]:
    """Return a method's rule for matrices, and the one for everything that has no companion of its own.

    ``options`` and errors are those of `rules_by_role`.
    """
    rules = rules_by_role(row, numerics, **options)
    return rules[MATRIX], rules[REST]


def build_optimizer(
    model: torch.nn.Module,
    row: str,
    *,
    lr: float,
    numerics: str = "sound",
    weight_decay: float = 0.0,
    matrix_lr_scale: float = 1.0,
    rank_by_module: Mapping[str, float] | None = None,
    vector_lr_scale: float | None = None,
    targets: Targets = is_projected,
    undecayed: Collection[str] = (),
    seed: int = 0,
    **options: Any,
) -> RuleOptimizer:
    """Return one optimizer for all trainable parameters of ``model``, in groups: its matrices, and the rest.

    The matrices are the weights of each ``torch.nn.Linear`` with ``attn`` or ``mlp`` somewhere in its name, the choice
    of the paper and the published code. A GaLore row projects them; everything else gets the row's companion rule. Some
    rows have companions for the embedding, for the head (``get_output_embeddings()``, also where it is tied to the
    embedding) and for vectors: each is a group of its own. ``targets`` chooses other matrices: it is called with the
    name of each module and the module, and says whether its weight is one. Parameters whose names are in ``undecayed``
    get no weight decay, in groups of their own. ``matrix_lr_scale`` multiplies the matrices' learning rate,
    ``vector_lr_scale`` replaces the factor on that of the vectors where these have a companion. A schedule writes
    ``group["lr"] = lr * group["lr_scale"]``.

    ``rank_by_module`` multiplies the rank of some matrices: ``{"down": 2, "q": 0.5}`` that of ``down_proj`` by 2 and of
    ``q_proj`` by ½. A name is the last part of a module's name, with or without ``_proj``, or a pattern (``*.0.*``) for
    all of it; the first that fits counts. Matrices of one rank are a group.

    ``options`` are the method's own: ``rank``, ``update_proj_gap``, ``scale``, ``proj_type``, ``basis``, ``refresh``
    and ``moments`` of GaLore, ``natural_history`` and ``natural_damping``, ``betas`` and ``eps``, or a field of its
    rule. What is left out or None stays as the rule has it; an option that the row cannot use raises ValueError.
    ``betas[0]`` is SGD's momentum and Adafactor's first moment, which they lack otherwise.
    """
    name, layerwise = resolve_name(row)
    if layerwise:
        raise ValueError(f"optimizer {row!r} asks for layerwise updates, which are not an optimizer's: name {name!r}")
    if is_own(name):
        load_method(name)
    for option, value in (("rank_by_module", rank_by_module), ("vector_lr_scale", vector_lr_scale)):
        if value is not None and option not in METHODS[name].options:
            raise ValueError(f"{option} has no meaning for optimizer {name}; leave it out")
    rules = rules_by_role(name, numerics, **options)
    by_role = _by_role(model, rules, targets)
    if not by_role[MATRIX] and (rules[MATRIX].projects or targets is not is_projected):
        raise ValueError(_no_matrix(row, targets))
    groups = _matrix_groups(by_role.pop(MATRIX), rules[MATRIX], rank_by_module or {})
    for group in groups:
        group["lr_scale"] = matrix_lr_scale
    for role, named in by_role.items():
        lr_scale = 1.0
        if role in METHODS[name].companions:
            lr_scale = METHODS[name].companions[role].lr_scale
        if role == "vector" and vector_lr_scale is not None:
            lr_scale = vector_lr_scale
        groups.append({"params": named, "rule": rules[role], "lr_scale": lr_scale})
    groups = _by_decay(groups, weight_decay, undecayed)
    for group in groups:
        group["lr"] = lr * group["lr_scale"]
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
    betas: tuple[float, float] | None = _field_of(part, "betas")
    return betas


def _field_of(part: Any, name: str) -> Any:
    """Return the value of the field ``name`` of a rule, or of a rule inside of it; None where it has none."""
    for field in fields(part):
        value = getattr(part, field.name)
        if field.name == name:
            return value
        if is_dataclass(value) and not isinstance(value, type):
            inner = _field_of(value, name)
            if inner is not None:
                return inner
    return None


def _with_betas(rule: UpdateRule, betas: Sequence[float]) -> UpdateRule:
    """Return a rule with other betas, of lists or tuples."""
    changed, _ = _configured(rule, {"betas": tuple(betas)})
    assert isinstance(changed, UpdateRule)
    return changed


# A tied weight is embedding and head in one, and counts as the head: there a gradient has noise in every row. A head of
# its own is a matrix where the caller's targets say so.
def _by_role(
    model: torch.nn.Module, rules: Mapping[str, UpdateRule], targets: Targets
) -> dict[str, list[NamedParameter]]:
    """Return the trained parameters of ``model`` by their role, one of those that have ``rules``."""
    get_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get_head()
    roles: dict[Tensor, str] = {}
    for name, module in model.named_modules():
        if targets(name, module):
            roles[module.weight] = MATRIX
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            roles[module.weight] = "embedding"
    if head is not None and roles.get(head.weight) != MATRIX:
        roles[head.weight] = "head"
    by_role: dict[str, list[NamedParameter]] = {role: [] for role in rules}
    for name, p in model.named_parameters():
        role = roles.get(p, REST)
        if p.ndim < 2:
            role = "vector"
        if role not in rules:
            role = REST
        if p.requires_grad:
            by_role[role].append((name, p))
    return by_role


def _no_matrix(row: str, targets: Targets) -> str:
    """Return what to say where a model has no matrix for a method's own rule."""
    why = "no trained torch.nn.Linear of the model has attn or mlp in its name"
    if targets is not is_projected:
        why = "no trained module of the model is one of the targets"
    return (
        f"{row} found no matrix to project, or to update by its own rule: {why}; name other targets, or put the "
        "matrices of your choice into a group with a rank, as GaLoreAdamW takes it"
    )


def _by_decay(
    groups: Iterable[dict[str, Any]], weight_decay: float, undecayed: Collection[str]
) -> list[dict[str, Any]]:
    """Return the groups that have parameters, with their weight decay; ``undecayed`` parameters are groups apart."""
    parts: list[dict[str, Any]] = []
    for group in groups:
        decayed: list[NamedParameter] = []
        others: list[NamedParameter] = []
        for name, p in group["params"]:
            if weight_decay and name in undecayed:
                others.append((name, p))
            else:
                decayed.append((name, p))
        for named, decay in ((decayed, weight_decay), (others, 0.0)):
            if named:
                parts.append({**group, "params": named, "weight_decay": decay})
    return parts


def _matrix_groups(
    matrices: Sequence[NamedParameter], rule: UpdateRule, rank_by_module: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Return a group for the matrices of each rank, in the order in which ranks turn up.

    ValueError where a name of ``rank_by_module`` fits no matrix.
    """
    by_factor: dict[float, list[NamedParameter]] = {}
    unused = set(rank_by_module)
    for name, p in matrices:
        pattern = _pattern_for(name.removesuffix(".weight"), rank_by_module)
        unused.discard(pattern)
        factor = rank_by_module.get(pattern, 1.0)
        by_factor.setdefault(factor, []).append((name, p))
    if unused:
        ends = dict.fromkeys(name.split(".")[-2] for name, _ in matrices)
        raise ValueError(
            f"rank_by_module {', '.join(sorted(unused))} fits no matrix of attention or MLP; they are {', '.join(ends)}"
        )
    groups: list[dict[str, Any]] = []
    for factor, named in by_factor.items():
        of_factor = rule
        if factor != 1:
            rank = max(1, round(_field_of(rule, "rank") * factor))
            of_factor, _ = _configured(rule, {"rank": rank})
        groups.append({"params": named, "rule": of_factor})
    return groups


def _pattern_for(module_name: str, patterns: Iterable[str]) -> str:
    """Return the first of ``patterns`` that fits a module's name, or its last part; "" where none does."""
    last = module_name.rsplit(".", maxsplit=1)[-1]
    for pattern in patterns:
        if pattern in (last, last.removesuffix("_proj")) or fnmatchcase(module_name, pattern):
            return pattern
    return ""


def rounding_of(numerics: str) -> str:
    """Return how a bf16 weight takes an update: ``nearest`` or ``stochastic``."""
    if numerics == "reference":
        return "nearest"
    return "stochastic"


def _check_kind(option: str, value: Any, current: Any) -> None:
    """Raise ValueError where ``value`` cannot stand where ``current`` does: a flag, a number, a rule or a store."""
    if isinstance(current, bool) and not isinstance(value, bool):
        raise ValueError(f"{option} {value!r} must be True or False")
    if isinstance(current, (int, float)) and not isinstance(value, (int, float)):
        raise ValueError(f"{option} {value!r} must be a number, such as {current}")
    if (isinstance(current, UpdateRule) or hasattr(current, "is_dense")) and not is_dataclass(value):
        raise ValueError(f"{option} {value!r} must be a {type(current).__name__}; name one of its own options")


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
    if hasattr(part, "configured"):  # its options are no fields
        configured: tuple[Any, set[str]] = part.configured(values)
        return configured
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
            if is_one_of_two:
                value = value[0]
            _check_kind(option, value, current)
            changes[field.name] = value
            used.add(option)
        elif is_dataclass(current):
            changes[field.name], used_inside = _configured(current, values)
            used |= used_inside
    return replace(part, **changes), used
