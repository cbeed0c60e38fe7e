"""GaLore and its rivals: one ``torch.optim.Optimizer``, a row of the table each.

optimizer = build_optimizer(model, "galore_adamw", lr=0.01, rank=128)

What other rooms of the package use of this one is named here, and nothing else of it is theirs. Names are resolved on
first use, so that asking for a row's name does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from galore_pretrain.optim.adam import Adam
    from galore_pretrain.optim.build import REGISTRY, build_optimizer, build_rules, rules_by_role
    from galore_pretrain.optim.check import Finding, check_methods
    from galore_pretrain.optim.checkpointing import saved_state, take_saved_state
    from galore_pretrain.optim.dropin import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit, NaturalGaLoreAdamW
    from galore_pretrain.optim.execution import Execution, GlobalStep, Layerwise, Outcome, Skips
    from galore_pretrain.optim.galore import GaLore, is_projected
    from galore_pretrain.optim.host_sums import HostSums
    from galore_pretrain.optim.methods import (
        BASIS_NAMES,
        BASIS_STORES,
        METHODS,
        MOMENT_STORES,
        MOMENTS,
        NUMERICS,
        OPTIONS,
        PROJ_TYPES,
        REFRESHES,
        Method,
        is_own,
        method,
        resolve_name,
    )
    from galore_pretrain.optim.moments import Blockwise8bit
    from galore_pretrain.optim.optimizer import Observer, RuleOptimizer
    from galore_pretrain.optim.own import load_method
    from galore_pretrain.optim.projector import random_basis, randomized_basis, sides
    from galore_pretrain.optim.rule import Direction, Layout, Scope, UpdateRule, describe
    from galore_pretrain.optim.update import Step

_NAMES = {  # file: what of it is named here
    "adam": ("Adam",),
    "build": ("REGISTRY", "build_optimizer", "build_rules", "rules_by_role"),
    "check": ("Finding", "check_methods"),
    "checkpointing": ("saved_state", "take_saved_state"),
    "dropin": ("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit", "NaturalGaLoreAdamW"),
    "galore": ("GaLore", "is_projected"),
    "host_sums": ("HostSums",),
    "methods": (
        "BASIS_NAMES",
        "BASIS_STORES",
        "METHODS",
        "MOMENT_STORES",
        "MOMENTS",
        "NUMERICS",
        "OPTIONS",
        "PROJ_TYPES",
        "REFRESHES",
        "Method",
        "is_own",
        "method",
        "resolve_name",
    ),
    "execution": ("Execution", "GlobalStep", "Layerwise", "Outcome", "Skips"),
    "moments": ("Blockwise8bit",),
    "optimizer": ("Observer", "RuleOptimizer"),
    "own": ("load_method",),
    "projector": ("random_basis", "randomized_basis", "sides"),
    "rule": ("Direction", "Layout", "Scope", "UpdateRule", "describe"),
    "update": ("Step",),
}
_HOMES = {name: file for file, names in _NAMES.items() for name in names}
__all__ = [
    "BASIS_NAMES",
    "BASIS_STORES",
    "METHODS",
    "MOMENTS",
    "MOMENT_STORES",
    "NUMERICS",
    "OPTIONS",
    "PROJ_TYPES",
    "REFRESHES",
    "REGISTRY",
    "Adam",
    "Blockwise8bit",
    "Direction",
    "Execution",
    "Finding",
    "GaLore",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "GlobalStep",
    "HostSums",
    "Layerwise",
    "Layout",
    "Method",
    "NaturalGaLoreAdamW",
    "Observer",
    "Outcome",
    "RuleOptimizer",
    "Scope",
    "Skips",
    "Step",
    "UpdateRule",
    "build_optimizer",
    "build_rules",
    "check_methods",
    "describe",
    "is_own",
    "is_projected",
    "load_method",
    "method",
    "random_basis",
    "randomized_basis",
    "resolve_name",
    "rules_by_role",
    "saved_state",
    "sides",
    "take_saved_state",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f"{__name__}.{_HOMES[name]}")
    except AttributeError as error:
        # Python would take it for this module's own, and say only that the name cannot be imported.
        raise ImportError(f"{__name__}.{_HOMES[name]} cannot be imported: {error}") from error
    return getattr(module, name)
